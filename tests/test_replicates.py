"""How sure a front is: errors and probabilities against closed forms and quadrature."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from adq_search.replicates import spread_of

DIRECTIONS = ("maximize", "minimize")


def trainings(accuracies, cost):
    return [(a, cost) for a in accuracies]


def test_means_and_pooled_errors():
    found = spread_of(
        [trainings([0.90, 0.92, 0.94], 1.0), trainings([0.80, 0.80], 0.5)], DIRECTIONS, seed=0
    )
    deviation = math.sqrt((0.02**2 + 0.0 + 0.02**2 + 0.0 + 0.0) / 3)
    np.testing.assert_allclose(found.means, [[0.92, 1.0], [0.80, 0.5]])
    np.testing.assert_allclose(found.deviations, [deviation, 0.0], atol=1e-15)
    expected = [[deviation / math.sqrt(3), 0.0], [deviation / math.sqrt(2), 0.0]]
    np.testing.assert_allclose(found.errors, expected, atol=1e-15)


@pytest.mark.parametrize(("n_1", "n_2"), [(2, 2), (3, 3), (4, 2)])
def test_two_policies_of_equal_cost_are_students(n_1, n_2):
    rng = np.random.default_rng(n_1)
    first, second = rng.normal(0.90, 0.01, n_1), rng.normal(0.895, 0.01, n_2)
    found = spread_of([trainings(first, 1.0), trainings(second, 1.0)], DIRECTIONS, seed=1)
    freedom = n_1 + n_2 - 2
    pooled = ((n_1 - 1) * first.var(ddof=1) + (n_2 - 1) * second.var(ddof=1)) / freedom
    t = (first.mean() - second.mean()) / math.sqrt(pooled * (1 / n_1 + 1 / n_2))
    exact = stats.t.cdf(t, freedom)
    np.testing.assert_allclose(found.probabilities, [exact, 1 - exact], atol=0.02)


def test_a_chain_of_costs_is_a_product_of_normal_integrals():
    """With many trainings errors are normal: P_i = integral of phi_i times all cheaper Phi_j."""
    rng = np.random.default_rng(3)
    n, costs, centres = 400, [1.0, 2.0, 3.0], [0.900, 0.901, 0.9005]
    runs = [rng.normal(c, 0.02, n) for c in centres]
    found = spread_of(
        [trainings(r, cost) for r, cost in zip(runs, costs, strict=True)], DIRECTIONS, seed=2
    )
    pooled = math.sqrt(np.mean([r.var(ddof=1) for r in runs]) / n)

    def density(x, i):
        cheaper = math.prod(stats.norm.cdf(x, runs[j].mean(), pooled) for j in range(i))
        return stats.norm.pdf(x, runs[i].mean(), pooled) * cheaper

    exact = [integrate.quad(density, 0.88, 0.92, args=(i,), points=[0.9])[0] for i in range(3)]
    assert exact[0] == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(found.probabilities, exact, atol=0.02)


def test_the_cheapest_policy_is_never_dominated():
    found = spread_of([trainings([0.5, 0.6], 1.0), trainings([0.9, 0.99], 2.0)], DIRECTIONS, seed=0)
    assert found.probabilities[0] == 1.0


def test_a_policy_whose_trainings_all_diverged_counts_for_nothing():
    found = spread_of(
        [[], trainings([0.90, 0.91], 2.0), trainings([0.80, 0.81], 1.0)], DIRECTIONS, seed=0
    )
    assert found.probabilities[0] == 0.0
    assert np.isnan(found.means[0]).all()
    assert found.probabilities[2] == 1.0


def test_one_training_each_tells_nothing_of_the_spread():
    found = spread_of([trainings([0.9], 1.0), trainings([0.8], 2.0)], DIRECTIONS, seed=0)
    assert np.isnan(found.errors).all()
    assert found.probabilities.tolist() == [1.0, 0.0]


def test_correlated_objectives_are_drawn_together():
    """Of two policies equal in cost, one ahead in both measured objectives or in none."""
    rng = np.random.default_rng(5)
    a = rng.normal(0.0, 1.0, (3, 1))
    b = rng.normal(0.0, 1.0, (3, 1))
    both = [np.hstack([a, -a, 0 * a + 1.0]), np.hstack([b, -b, 0 * b + 1.0])]
    found = spread_of([x.tolist() for x in both], ("maximize", "minimize", "minimize"), seed=0)
    assert sum(found.probabilities) == pytest.approx(1.0, abs=1e-9)


def test_draws_follow_the_seed():
    runs = [trainings([0.90, 0.93], 1.0), trainings([0.91, 0.93], 2.0)]
    first, again, other = (spread_of(runs, DIRECTIONS, seed=s).probabilities for s in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
