"""Warm starts on Ray: trials on any node begin from the nearest finished policy's weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import tune

from adq_search.donors import DonorFiles, bring_donor, donor_files, donor_of
from adq_search.errors import AdqSearchWarning, StorageError
from adq_search.hosting import HostOptions
from adq_search.job import Job, read_job
from adq_search.plan import plan
from adq_search.plugins._ray_records import hosted_trials
from adq_search.plugins.ray_host import RayHost
from adq_search.plugins.ray_recorder import SessionRecorder
from adq_search.plugins.ray_trainable import policy_trainable
from adq_search.progress import NoProgress
from adq_search.report import read_trials
from adq_search.results import write_outcome
from adq_search.session import prepare
from adq_search.warm_start import nearest
from tests import clusters

TINY = Path(__file__).parent / "tiny.yaml"
FIGURES = ("accuracy", "loss", "kl", "donor", "epochs_before", "weights_fingerprint")


@pytest.fixture
def cluster():
    clusters.start_here(n_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    job = read_job(TINY).with_search(prior=None).with_training(warm_start=True, epochs=1)
    return prepare(plan(job), tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def session(prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path / "session")
    return replace(prepared, folder=tmp_path / "session")


def run(session, **options):
    asked = HostOptions("tiny", **({"resume": True} | options))
    host = RayHost()
    host.check(session.plan, session.folder, asked)
    return host.run(session, asked, NoProgress())


def check_against_training_here(session, result, folder):
    """A trial ended as it does here, in a folder that holds nothing but its donor."""
    alone = replace(session, folder=folder / result.policy.hash)
    bring_donor(alone.folder, result.policy, donor_files(session.folder, result.policy))
    measured = alone.measure(result.policy)
    for figure in FIGURES:
        assert getattr(result, figure) == getattr(measured, figure), figure


def test_a_donor_is_brought_to_another_folder(session, tmp_path):
    first, second = (seed.policy for seed in session.seeds[:2])
    session.measure(first)
    files = donor_files(session.folder, second)
    bring_donor(tmp_path / "there", second, files)
    here, there = donor_of(session.folder, second), donor_of(tmp_path / "there", second)
    assert files.policy_hash == there.policy.hash == first.hash
    assert there.epochs == here.epochs == 1
    assert all((there.weights[name] == weight).all() for name, weight in here.weights.items())
    assert donor_files(tmp_path / "empty", second) is None
    bring_donor(tmp_path / "cold", second, None)
    assert donor_of(tmp_path / "cold", second) is None


def test_half_a_donor_is_never_begun_from(session, tmp_path):
    """A name without files, as when writing them was interrupted, is told."""
    first, second = (seed.policy for seed in session.seeds[:2])
    bring_donor(tmp_path, second, DonorFiles(first.hash, b"{}", b""))
    (tmp_path / "weights" / f"{first.hash}.safetensors").unlink()
    with pytest.raises(StorageError, match="has lost them"):
        donor_of(tmp_path, second)


@pytest.mark.slow
def test_each_trial_begins_from_the_nearest_finished_policy(cluster, session, tmp_path):
    session = replace(session, plan=plan(session.plan.job.with_search(trials=7, replicates=2)))
    outcome = run(session)
    results = [trial.result for trial in outcome.trials]
    assert results[0].donor is None
    for i, result in enumerate(results[1:], start=1):
        earlier = {r.policy.hash: r for r in results[:i] if r.state == "complete"}
        expected = nearest(result.policy, [r.policy for r in earlier.values()])
        assert result.donor == expected.hash
        given = earlier[result.donor]
        assert result.epochs_before == given.epochs + given.epochs_before
    check_against_training_here(session, results[-1], tmp_path / "alone")
    write_outcome(session, outcome, HostOptions("tiny"), started=0.0)
    assert [r.donor for r in read_trials(session.folder)] == [r.donor for r in results]
    donors = {r.policy.hash: r.donor for r in results}
    replicates = list((session.folder / "replicates").glob("*.json"))
    assert replicates
    for file in replicates:  # of a policy begin as its trial did
        assert json.loads(file.read_text())["donor"] == donors[file.stem.split("-")[0]]


def check_donors(session, outcome, n_at_once):
    """All but the first trials began from policies that were finished."""
    known = {trial.result.policy.hash for trial in outcome.trials}
    donors = [trial.result.donor for trial in outcome.trials]
    assert len(known) == session.plan.job.search.trials
    assert set(donors) - {None} <= known
    assert donors.count(None) <= n_at_once


@pytest.mark.slow
def test_trials_at_once_begin_from_what_either_has_finished(cluster, session):
    check_donors(session, run(session, workers=2), 2)


@pytest.mark.slow
def test_trials_of_other_nodes_begin_from_what_any_has_finished(session):
    with clusters.nodes(3) as cluster:
        check_donors(session, run(session, workers=0, address=cluster.address), 3)


@pytest.mark.slow
def test_a_trial_whose_donor_is_lost_begins_from_the_teacher_and_says_so(cluster, session):
    first, second = (seed.policy for seed in session.seeds[:2])
    session.measure(first)
    session = replace(session, plan=plan(session.plan.job.with_search(trials=2)))
    choice = session.folder / "donors" / f"{second.hash}.json"
    choice.write_text(json.dumps({"donor": "0123456789abcdef"}))
    with pytest.warns(AdqSearchWarning, match=f"{second.hash} is trained from the teacher.*lost"):
        run(session)
    result = session.result_of(second)
    assert (result.state, result.donor, result.epochs_before) == ("complete", None, 0)
    assert json.loads(choice.read_text()) == {"donor": None}  # for its replicates


@pytest.mark.slow
def test_without_a_recorder_trials_begin_from_the_teacher_and_say_so(cluster, session):
    session.measure(session.seeds[0].policy)
    (result,) = tune.Tuner(
        policy_trainable(session),
        param_space=session.plan.space.params_of(session.seeds[1].policy),
        run_config=tune.RunConfig(storage_path=str(session.folder / "ray"), verbose=0),
    ).fit()
    assert result.metrics["donor"] is None
    assert "nobody answers" in result.metrics["warning"]


@pytest.mark.slow
def test_a_warm_trial_goes_on_from_its_checkpoint_with_the_same_donor(cluster, tmp_path):
    (tmp_path / "harm").mkdir()
    content = read_job(TINY).to_plain()
    content["task"] = "tests.faults.evidence:noted_task"
    content["task_options"] = {"harm": str(tmp_path / "harm"), "log": str(tmp_path / "log")}
    job = Job.model_validate(content).with_search(trials=4, prior=None)
    job = job.with_training(epochs=4, checkpoint_every_s=0.0, warm_start=True)
    session = prepare(plan(job), tmp_path / "session")
    first, second = (seed.policy for seed in session.seeds[:2])
    session.measure(first)

    class Kills(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            if result["training_iteration"] == 2 and not again:
                again.append(result["pid"])
                session.measure(session.seeds[2].policy)  # which might be chosen now
                (tmp_path / "harm" / "kill").touch()

    again = []
    grid = tune.Tuner(
        policy_trainable(session),
        param_space=session.plan.space.params_of(second),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "storage"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[Kills(), SessionRecorder(session)],
        ),
    ).fit()
    assert not grid.errors
    assert grid[0].metrics["pid"] != again[0]
    (result,) = [trial.result for trial in hosted_trials(session)]
    assert result.state == "complete"
    assert result.donor == first.hash
    check_against_training_here(session, result, tmp_path / "alone")
