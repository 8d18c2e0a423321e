"""The simulator: exact fronts, honest noise, and the numbers that its problem was built to have."""

import csv
import itertools

import numpy as np
import pytest

from adq_search.errors import SpaceError
from adq_search.pareto import front_indices
from adq_search.prior import rank_correlation
from adq_search.simulator import published_problem, read_table
from adq_search.simulator.published import LAYERS, WEIGHT_BITS


@pytest.fixture(scope="module")
def problem():
    return published_problem(seed=3)


def cut(problem, n):
    """Return the first n groups of a problem, as arrays, small enough for brute force."""
    return problem.losses[:n], problem.pairs[: n - 1], problem.costs[:n]


def test_the_true_front_is_that_of_brute_force(problem):
    n = 5
    losses, pairs, costs = cut(problem, n)
    small = type(problem)(problem.space, problem.prior, losses, pairs, costs)
    every = np.array(list(itertools.product(range(len(WEIGHT_BITS)), repeat=n)))
    points = list(zip(np.exp(-small.true_kl(every)), small.cost(every), strict=True))
    front = {points[i] for i in front_indices(points, ("maximize", "minimize"))}
    assert len(small.true_front) == len(front)
    assert np.allclose(sorted(small.true_front), sorted(front))


def test_loss_falls_and_cost_rises_with_bits(problem):
    assert np.all(np.diff(problem.losses, axis=1) <= 0.0)
    assert np.all(np.diff(problem.costs, axis=1) > 0)
    rows = np.random.default_rng(0).integers(0, 5, (50, 19))
    more = rows.copy()
    more[:, 7] += 1
    assert np.all(problem.true_kl(more) <= problem.true_kl(rows))


def test_measurements_repeat_by_seed_and_scatter_around_the_truth(problem):
    policy = next(iter(problem.space.uniform_policies().values()))
    assert problem.measure(policy, seed=1) == problem.measure(policy, seed=1)
    logs = np.log([problem.measure(policy, seed=s).kl for s in range(400)])
    true = float(np.log(problem.true_kl(problem.indices_of([policy])))[0])
    assert logs.mean() == pytest.approx(true, abs=0.01)
    assert logs.std() == pytest.approx(problem.noise, rel=0.15)


def test_curves_end_at_the_measurement(problem):
    policy = next(iter(problem.space.uniform_policies().values()))
    found = problem.measure(policy, seed=0)
    assert len(found.curve) == problem.epochs
    assert found.curve[-1] == found.kl
    assert found.curve[0] > found.kl


def test_the_prior_is_right_in_order_but_not_in_size(problem):
    rows = np.random.default_rng(0).integers(0, 6, (200, 19))
    groups = problem.space.groups
    predicted = [
        problem.prior.predict(
            problem.space.policy_from({g.name: g.choices[c] for g, c in zip(groups, r)})
        )
        for r in rows
    ]
    assert 0.6 < rank_correlation(predicted, list(problem.true_kl(rows))) < 0.99


def test_published_perturbations_follow_the_rule_that_gives_other_widths():
    """`delta_weights_8bit_square` of the notebook, all 19 layers."""
    at_8_bits = [0.0235, 0.0125, 0.0102, 0.0082, 0.0145, 0.0344, 0.0023, 0.0287, 0.0148, 0.0333]
    at_8_bits += [0.0682, 0.0027, 0.0448, 0.0336, 0.0576, 0.1130, 0.0102, 0.0947, 0.0532]
    for (_, _, at_4_bits, _), published in zip(LAYERS, at_8_bits):
        assert at_4_bits * (15.0 / 255.0) ** 2 == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(
    ("n", "share"), [(12, 0.679), (100, 0.757), (400, 0.794)], ids=["12", "100", "400"]
)
def test_random_policies_reach_what_was_measured_before(n, share):
    """performance.md 2.2, whose program is not at hand: the same problem, drawn anew."""
    shares = []
    for seed in range(6):
        problem = published_problem(seed=seed)
        rng = np.random.default_rng(seed)
        policies = [
            problem.space.policy_from(
                {g.name: g.choices[rng.integers(6)] for g in problem.space.groups}
            )
            for _ in range(n)
        ]
        shares.append(problem.share_of_hypervolume(policies))
    assert np.mean(shares) == pytest.approx(share, abs=0.03)


@pytest.fixture
def table(problem, tmp_path):
    """A table of 40 policies of the published problem, as a recorder would write it."""
    rng = np.random.default_rng(0)
    file = tmp_path / "measured.csv"
    policies = []
    with file.open("w", newline="") as out:
        writer = None
        for _ in range(40):
            choices = {g.name: g.choices[rng.integers(6)] for g in problem.space.groups}
            policies.append(problem.space.policy_from(choices))
            found = problem.measure(policies[-1], seed=0)
            row = {**problem.space.params_of(policies[-1]), "accuracy": found.accuracy}
            row |= {"kl": found.kl} | {f"train_loss_{i}": k for i, k in enumerate(found.curve, 1)}
            writer = writer or csv.DictWriter(out, row)
            if out.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
    return file, policies


def test_a_table_answers_with_what_it_holds(problem, table):
    file, policies = table
    found = read_table(file, problem.space)
    assert found.policies == tuple(policies)
    for policy in policies:
        answer, truth = found.measure(policy), problem.measure(policy, seed=0)
        assert answer.is_measured
        assert (answer.kl, answer.accuracy, answer.scores) == (
            truth.kl,
            truth.accuracy,
            truth.curve,
        )


def test_a_table_expects_of_others_what_their_like_measured(problem, table):
    found = read_table(table[0], problem.space)
    groups = problem.space.groups
    cheap, dear = (
        found.measure(problem.space.policy_from({g.name: g.choices[c] for g in groups}))
        for c in (0, 5)
    )
    assert not cheap.is_measured
    assert cheap.kl > 2.0 * dear.kl
    assert cheap.accuracy < dear.accuracy
    assert len(cheap.scores) == problem.epochs


def test_a_table_of_another_space_is_refused(problem, tmp_path):
    file = tmp_path / "measured.csv"
    file.write_text("layer9.weight_bits,accuracy,kl\n2,0.5,0.1\n")
    with pytest.raises(SpaceError, match=r"has no column layer1\.0\.conv1\.weight_bits"):
        read_table(file, problem.space)


def test_a_table_may_hold_the_indices_of_choices(problem, tmp_path):
    file = tmp_path / "measured.csv"
    groups = problem.space.groups
    code = [i % len(g.choices) for i, g in enumerate(groups)]
    text = " ".join(map(str, code))
    file.write_text(f"policy,accuracy,kl,train_loss_1\n{text},0.5,0.1,0.2\n")
    chosen = {g.name: g.choices[i] for g, i in zip(groups, code, strict=True)}
    assert read_table(file, problem.space).policies == (problem.space.policy_from(chosen),)


@pytest.mark.parametrize("wrong", ["0 1", "6" + 18 * " 0", "-1" + 18 * " 0", "x" + 18 * " 0"])
def test_indices_of_another_space_are_refused(problem, tmp_path, wrong):
    file = tmp_path / "measured.csv"
    file.write_text(f"policy,accuracy,kl\n{wrong},0.5,0.1\n")
    with pytest.raises(SpaceError, match="is 19 indices, each below the number of its group's"):
        read_table(file, problem.space)
