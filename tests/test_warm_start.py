"""Warm start: who the donor is, what is taken over from it, and what results say of it."""

import json
from pathlib import Path

import pytest
import torch

from adq_search.distill import Teacher
from adq_search.donors import donor_of
from adq_search.errors import StorageError
from adq_search.evaluation import evaluate
from adq_search.hosting import HostOptions
from adq_search.job import load_job, read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.policy import LayerPrecision, Policy
from adq_search.progress import NoProgress
from adq_search.report import read_front, read_trials
from adq_search.results import write_outcome
from adq_search.session import prepare, reopen
from adq_search.teacher import make_teacher
from adq_search.training import TrainingSettings
from adq_search.trial import TrialResult, run_trial, run_trials, weights_of
from adq_search.warm_start import Donor, begin_from_, distance, nearest
from tests import tiny
from tests.test_job import MINIMAL

TINY = Path(__file__).parent / "tiny.yaml"
LAYERS = ("0", "3", "5", "8")
SETTINGS = TrainingSettings(epochs=2, batch_size=10, learning_rate=0.05)
LSQ_8, LSQ_4, POST_4 = (
    LayerPrecision(8, 8, "lsq"),
    LayerPrecision(4, 4, "lsq"),
    LayerPrecision(4, 4, "post"),
)
ADQ_4 = LayerPrecision(4, 4, "adq", 0.9)


def policy_of(*precisions, **options):
    return Policy.of(dict(zip(LAYERS, precisions, strict=True)), options)


@pytest.fixture(scope="module")
def task():
    return tiny.make()


@pytest.fixture(scope="module")
def teacher(task):
    return Teacher(make_teacher(task, seed=0), task)


@pytest.fixture(scope="module")
def donor(task, teacher):
    policy = policy_of(LSQ_8, LSQ_4, ADQ_4, LSQ_8)
    _, network = run_trial(policy, task, teacher, SETTINGS, {}, seed=0)
    return Donor(policy, weights_of(network), 2)


def test_distance_counts_layers():
    first = policy_of(LSQ_8, LSQ_4, ADQ_4, LSQ_8)
    assert distance(first, first) == 0
    assert distance(first, policy_of(LSQ_8, POST_4, ADQ_4, LSQ_8)) == 1
    assert distance(first, policy_of(LSQ_4, POST_4, LSQ_4, LSQ_4)) == 4
    assert distance(first, policy_of(LSQ_8, LSQ_4, ADQ_4, LSQ_8, post={"levels": "eq17"})) == 4


def test_the_nearest_policy_gives_and_ties_go_by_hash():
    policy = policy_of(LSQ_8, LSQ_4, ADQ_4, LSQ_8)
    far = policy_of(LSQ_8, POST_4, POST_4, LSQ_8)
    near = [policy_of(LSQ_8, p, ADQ_4, LSQ_8) for p in (POST_4, LSQ_8, ADQ_4)]
    first = min(near, key=lambda p: p.hash)
    assert nearest(policy, [far, *near]) == first
    assert nearest(policy, [*reversed(near), far]) == first
    assert nearest(policy, []) is None


def test_the_donors_own_policy_is_the_donors_network(task, donor):
    network = begin_from_(
        task.make_network(), donor.policy, donor, task.calibration(20, seed=0)
    ).eval()
    for name, weight in weights_of(network).items():
        assert torch.equal(weight, donor.weights[name]), name


def test_changed_layers_alone_get_new_quantizers(task, donor):
    policy = policy_of(LSQ_8, POST_4, ADQ_4, LSQ_8)
    network = begin_from_(task.make_network(), policy, donor, task.calibration(20, seed=0))
    found = weights_of(network)
    changed = {name for name in found if "3." in name and "quantizer" in name}
    assert changed
    for name, weight in found.items():
        if name not in changed:
            assert torch.equal(weight, donor.weights[name]), name
    made = begin_from_(
        task.make_network(),
        policy_of(POST_4, POST_4, POST_4, POST_4),
        donor,
        task.calibration(20, seed=0),
    )
    fresh = weights_of(made)  # all layers changed: the quantizer of layer 3 is fitted alike
    for name in changed:
        assert torch.equal(found[name], fresh[name]), name


def test_a_warm_trial_says_so_and_repeats_itself(task, teacher, donor):
    policy = policy_of(LSQ_8, POST_4, ADQ_4, LSQ_8)
    runs = [run_trial(policy, task, teacher, SETTINGS, {}, donor=donor, seed=3) for _ in range(2)]
    (result, network), (_, again) = runs
    cold, _ = run_trial(policy, task, teacher, SETTINGS, {}, seed=3)
    assert (result.donor, result.epochs_before, result.epochs) == (donor.policy.hash, 2, 2)
    assert (cold.donor, cold.epochs_before) == (None, 0)
    assert (result.seed, cold.seed) == (3, 3)
    assert result.weights_fingerprint != cold.weights_fingerprint
    for a, b in zip(weights_of(network).values(), weights_of(again).values(), strict=True):
        assert torch.equal(a, b)
    assert TrialResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_warm_start_without_training_keeps_what_was_learned(task, teacher, donor):
    """One step of no size on the policy of the donor leaves its accuracy."""
    still = TrainingSettings(epochs=1, batch_size=30, learning_rate=1e-12)
    result, network = run_trial(donor.policy, task, teacher, still, {}, donor=donor, seed=0)
    learned, _ = run_trial(donor.policy, task, teacher, SETTINGS, {}, seed=0)
    assert result.accuracy == pytest.approx(learned.accuracy, abs=0.04)
    assert evaluate(network, task.validation).accuracy == result.accuracy


def test_a_pass_of_several_networks_takes_donors_too(task, teacher, donor):
    policies = [policy_of(LSQ_8, p, ADQ_4, LSQ_8) for p in (POST_4, LSQ_8)]
    found = run_trials(policies, task, teacher, SETTINGS, [{}, {}], donors=[donor, None], seed=0)
    assert [r.donor for r, _ in found] == [donor.policy.hash, None]
    alone, _ = run_trial(policies[0], task, teacher, SETTINGS, {}, donor=donor, seed=0)
    assert found[0][0].kl == pytest.approx(alone.kl, rel=0.05)


@pytest.fixture(scope="module")
def planned():
    job = read_job(TINY).with_training(warm_start=True, epochs=1)
    return plan(job)


def run(session, **options):
    host, asked = OptunaHost(), HostOptions(study="tiny", **options)
    host.check(session.plan, session.folder, asked)
    return host.run(session, asked, NoProgress()), asked


def test_a_search_begins_each_trial_from_the_nearest_finished_one(planned, tmp_path):
    session = prepare(planned, tmp_path)
    outcome, asked = run(session)
    results = [t.result for t in outcome.trials]
    assert results[0].donor is None
    for i, result in enumerate(results[1:], start=1):
        earlier = {r.policy.hash: r for r in results[:i] if r.state == "complete"}
        expected = nearest(result.policy, [r.policy for r in earlier.values()])
        assert result.donor == expected.hash
        given = earlier[result.donor]
        assert result.epochs_before == given.epochs + given.epochs_before
    write_outcome(session, outcome, asked, started=0.0)
    assert {r.policy_hash: r.donor for r in read_trials(tmp_path)} == {
        r.policy.hash: r.donor for r in results
    }
    front = read_front(tmp_path)
    assert any(p.donor is not None for p in front.points)
    for point in front.points:  # donors of the front stay, so that its policies can be repeated
        if point.donor is not None:
            assert (tmp_path / "weights" / f"{point.donor}.safetensors").exists()
    assert "began from another policy's weights" in " ".join(
        (tmp_path / "report.html").read_text().replace("&#39;", "'").split()
    )


@pytest.mark.slow
def test_two_workers_begin_from_what_either_has_finished(planned, tmp_path):
    outcome, _ = run(prepare(planned, tmp_path), workers=2)
    known = {t.result.policy.hash for t in outcome.trials}
    donors = [t.result.donor for t in outcome.trials]
    assert len(known) == planned.job.search.trials
    assert set(donors) - {None} <= known
    assert donors.count(None) <= 2


def test_a_donor_is_chosen_once(planned, tmp_path):
    """A replicate, and a trial begun again, take the donor of the first start."""
    session = prepare(planned, tmp_path)
    first, second, third = (seed.policy for seed in session.seeds[:3])
    session.measure(first)
    assert session.measure(second).donor == first.hash
    session.measure(third)
    assert reopen(tmp_path).measure(second, seed=7).donor == first.hash
    session.weights_file(first).unlink()
    with pytest.raises(StorageError, match="has lost them. Restore them"):
        session.measure(second, seed=8)


def test_nothing_finished_means_a_cold_start(tmp_path):
    policy = policy_of(LSQ_8, LSQ_4, ADQ_4, LSQ_8)
    assert donor_of(tmp_path, policy) is None


def test_warm_results_never_join_a_cold_study(planned):
    cold = plan(planned.job.with_training(warm_start=False))
    assert cold.fingerprint["recipe"] != planned.fingerprint["recipe"]
    assert load_job(MINIMAL + "training: {warm_start: true}\n", what="x").training.warm_start
