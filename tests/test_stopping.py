"""The stop rule: quiet searches end, growing ones go on, and noise is what decides."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from adq_search.errors import SpaceError
from adq_search.job import load_job, read_job
from adq_search.pareto import hypervolume
from adq_search.plan import plan
from adq_search.stopping import FalseStops, settled
from adq_search.trial import TrialResult
from tests.test_job import MINIMAL

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def planned():
    return plan(read_job(TINY).with_search(stop={"patience": 10}))


def results_of(planned, kls, *, seed=0, costs=None, scatter=0.0):
    """Return results of random policies with given KL and accuracy 0.9 - KL."""
    rng = np.random.default_rng(seed)
    space, out = planned.space, []
    for i, kl in enumerate(kls):
        chosen = {g.name: g.choices[rng.integers(len(g.choices))] for g in space.groups}
        cost = float(costs[i]) if costs is not None else float(rng.uniform(1.0, 2.0))
        accuracy = 0.9 - kl + scatter * float(rng.standard_normal())
        policy = space.policy_from(chosen)
        figures = {"energy_pj": cost}
        out.append(TrialResult(policy, "complete", accuracy, kl, kl, figures, 1, 0.1, 0.1, seed=0))
    return out


def with_rule(planned, **rule):
    return dataclasses.replace(planned, job=planned.job.with_search(stop=rule))


def test_without_a_rule_a_search_never_ends(planned):
    results = results_of(planned, [0.1] * 60)
    none = dataclasses.replace(planned, job=planned.job.with_search(stop=None))
    assert settled(none, results) is None
    assert settled(planned, results) is not None


def test_it_waits_for_twice_its_patience(planned):
    results = results_of(planned, [0.1] * 30)
    assert settled(planned, results[:19]) is None
    assert settled(planned, results[:20]) is not None


def test_growth_beyond_the_noise_goes_on_and_within_it_ends(planned):
    costs = [1.0 + 0.01 * i for i in range(40)]
    kls = [0.20 - 0.002 * i for i in range(40)]  # each trial is a little better than all before
    results = results_of(planned, kls, costs=costs[::-1])
    assert settled(with_rule(planned, patience=10, noise=0.001), results) is None
    found = settled(with_rule(planned, patience=10, noise=1.0), results)
    assert found is not None
    assert found.growth < found.error
    assert (found.n_trials, found.patience) == (40, 10)


def test_growth_and_error_are_those_of_a_plain_bootstrap(planned):
    rng = np.random.default_rng(1)
    results = results_of(planned, list(rng.uniform(0.05, 0.3, 40)), seed=3)
    rule = with_rule(planned, patience=10, errors=50.0, noise=0.02)
    found = settled(rule, results)
    points = [planned.values(r) for r in results]
    accuracies, costs = zip(*points, strict=True)
    corner = (
        min(accuracies) - 0.1 * (max(accuracies) - min(accuracies)),
        max(costs) + 0.1 * (max(costs) - min(costs)),
    )

    def volume(some):
        return hypervolume(some, ("maximize", "minimize"), corner)

    now = volume(points)
    drawn = [
        volume([(a + 0.02 * rng.standard_normal(), c) for a, c in points]) for _ in range(2000)
    ]
    assert found.growth == pytest.approx((now - volume(points[:30])) / now)
    assert found.error == pytest.approx(np.std(drawn) / now, rel=0.2)
    assert found.noise == pytest.approx(0.02, rel=0.15)


def test_noise_is_learned_from_the_trials(planned):
    """Policies of equal loss whose KL scatters by a known amount: the model must find it."""
    rng = np.random.default_rng(2)
    levels = {}
    noisy = []
    for result in results_of(planned, [0.1] * 120, seed=4):
        p = result.policy["3"]
        base = levels.setdefault((p.weight_bits, p.input_bits), 0.05 + 0.02 * len(levels))
        kl = base * math.exp(0.2 * rng.standard_normal())
        noisy.append(dataclasses.replace(result, kl=kl, accuracy=0.9 - kl))
    found = settled(with_rule(planned, patience=10, errors=1e6), noisy)
    typical = 0.2 * float(np.median([r.kl for r in noisy]))
    assert found.noise == pytest.approx(typical, rel=0.4)


def test_replicates_tell_the_noise_better_than_the_model(planned):
    results = results_of(planned, [0.1] * 40)
    again = [
        dataclasses.replace(results[0], accuracy=a, seed=s)
        for s, a in enumerate((0.80, 0.82, 0.84), start=1)
    ]
    found = settled(planned, results, {results[0].policy: again})
    assert found.noise == pytest.approx(0.02, rel=0.15)


def test_trials_that_failed_count_for_patience_alone(planned):
    good = results_of(planned, [0.3] * 20)
    failed = [
        dataclasses.replace(r, state="diverged", accuracy=None, kl=None, loss=None)
        for r in results_of(planned, [0.1] * 10, seed=9)
    ]
    found = settled(planned, [*good, *failed])
    assert found is not None
    assert found.growth == 0.0
    assert settled(planned, [*failed, *failed[:5], *good[:7]]) is None  # too few to learn from


def test_all_workers_judge_alike(planned):
    results = results_of(planned, list(np.random.default_rng(0).uniform(0.1, 0.2, 40)))
    assert settled(planned, results) == settled(planned, results)


def test_false_stops_have_a_rate():
    assert FalseStops(9, 4, 1).rate == 0.25
    assert math.isnan(FalseStops(9, 0, 0).rate)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("search: {stop: {patience: 2}}\n", "search.stop.patience.*greater than or equal to 5"),
        ("search: {stop: {patiense: 9}}\n", "unknown key 'search.stop.patiense'.*'patience'"),
        ("search: {stop: {noise: 0}}\n", "search.stop.noise.*greater than 0"),
        ("search: {stop: {}, objectives: [kl, accuracy, bops]}\n", "'stop' forecasts one measured"),
        ("search: {pruner: front, objectives: [kl, loss, bops]}\n", "'pruner' forecasts one"),
        ("search: {pruner: median}\n", "search.pruner.*'front' or 'none'"),
        ("search: {replicates: 1}\n", "0 or at least 2"),
        (
            "search: {pruner: front}\ntraining: {networks_per_pass: 2}\n",
            "stops trials one by one, but 2 networks",
        ),
    ],
)
def test_wrong_settings_get_one_sentence(text, match):
    with pytest.raises(SpaceError, match=match) as caught:
        load_job(MINIMAL + text, what="the job file x.yaml")
    assert "\n" not in str(caught.value)


def test_how_a_search_ends_is_no_part_of_its_results(planned):
    other = plan(planned.job.with_search(stop=None, replicates=3, pruner="front", trials=99))
    assert other.fingerprint == planned.fingerprint
