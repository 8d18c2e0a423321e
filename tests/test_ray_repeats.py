"""Policies that Tune's own searchers draw again are not trained again."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator

from adq_search.job import Job, read_job
from adq_search.plan import plan
from adq_search.plugins._ray_records import hosted_trials, records_of
from adq_search.plugins.ray_recorder import SessionRecorder
from adq_search.plugins.ray_trainable import param_space, policy_trainable
from adq_search.session import prepare
from tests import clusters
from tests.faults.evidence import trainings

TINY = Path(__file__).parent / "tiny.yaml"
FIGURES = ("accuracy", "loss", "kl", "energy_pj", "state", "train_losses")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    clusters.start_here(n_cpus=2)
    yield
    ray.shutdown()


def noted_session(folder, *, trials=4, space=None, **training):
    """Return a session whose workers note every training in `folder / "log"`."""
    (folder / "harm").mkdir()
    content = read_job(TINY).to_plain()
    content["task"] = "tests.faults.evidence:noted_task"
    content["task_options"] = {"harm": str(folder / "harm"), "log": str(folder / "log")}
    content["space"]["default"] = space or content["space"]["default"]
    job = Job.model_validate(content).with_search(trials=trials, prior=None)
    return prepare(plan(job.with_training(**training)), folder / "session")


def fit(session, recorder, *, n, params=None, at_once=1):
    """Let Tune's own random search propose to one trial after another, or some at once."""
    return tune.Tuner(
        policy_trainable(session),
        param_space=params or param_space(session.plan),
        tune_config=tune.TuneConfig(
            num_samples=n,
            reuse_actors=True,
            search_alg=BasicVariantGenerator(max_concurrent=at_once, random_state=0),
        ),
        run_config=tune.RunConfig(
            storage_path=str(session.folder.parent / "storage"),
            verbose=0,
            callbacks=[] if recorder is None else [recorder],
        ),
    ).fit()


def test_a_policy_that_tunes_own_searcher_draws_again_is_not_trained_again(tmp_path):
    few = {"weight_bits": [2, 4], "input_bits": [4], "schemes": ["lsq"]}
    session = noted_session(tmp_path, space=few)
    recorder = SessionRecorder(session)
    grid = fit(session, recorder, n=12)
    assert not grid.errors
    reports = [result.metrics for result in grid]
    drawn = {report["policy_hash"] for report in reports}
    assert len(drawn) <= session.plan.space.n_policies < 12
    assert sorted(t.policy_hash for t in trainings(tmp_path / "log")) == sorted(drawn)
    first = {r["policy_hash"]: r for r in reports if not r["repeated"]}
    assert first.keys() == drawn
    again = [report for report in reports if report["repeated"]]
    assert len(again) == recorder.n_repeated == 12 - len(drawn)
    for report in again:
        expected = first[report["policy_hash"]]
        assert [report[name] for name in FIGURES] == [expected[name] for name in FIGURES]
        assert report["training_iteration"] == session.plan.job.training.epochs
    # Each policy has one record, which leads to the trial that was trained.
    assert {r.trial_id for r in records_of(session.folder)} == {
        r["trial_id"] for r in first.values()
    }
    assert len(hosted_trials(session)) == len(drawn)


def test_of_two_trials_that_draw_a_policy_at_once_one_trains(tmp_path):
    session = noted_session(tmp_path)
    params = session.plan.space.params_of(session.seeds[0].policy)
    recorder = SessionRecorder(session)
    grid = fit(session, recorder, n=2, params=params, at_once=2)
    assert not grid.errors
    assert len(trainings(tmp_path / "log")) == recorder.n_repeated == 1
    one, other = sorted((result.metrics for result in grid), key=lambda m: m["repeated"])
    assert other["repeated"] > one["repeated"]
    assert [one[name] for name in FIGURES] == [other[name] for name in FIGURES]
    (record,) = records_of(session.folder)
    assert record.trial_id == one["trial_id"]


def test_a_trial_that_waits_for_one_that_dies_measures_the_policy_itself(tmp_path):
    session = noted_session(tmp_path)
    policy = session.seeds[0].policy
    (tmp_path / "harm" / "kill").touch()
    recorder = SessionRecorder(session)
    grid = fit(session, recorder, n=2, params=session.plan.space.params_of(policy), at_once=2)
    assert len(grid.errors) == 1
    (found,) = (result.metrics for result in grid if result.error is None)
    assert found["state"] == "complete"
    assert not found["repeated"]
    assert len(trainings(tmp_path / "log")) == 2
    (record,) = records_of(session.folder)
    assert record.trial_id == found["trial_id"]
    assert session.result_of(policy).kl == found["kl"]


def test_a_second_experiment_knows_what_the_first_one_and_other_hosts_measured(tmp_path):
    session = noted_session(tmp_path)
    ours, theirs = (seed.policy for seed in session.seeds[:2])
    params = session.plan.space.params_of
    fit(session, SessionRecorder(session), n=1, params=params(ours))
    measured = replace(session, folder=session.folder).measure(theirs)
    n_before = len(trainings(tmp_path / "log"))
    for policy in (ours, theirs):
        (result,) = fit(session, SessionRecorder(session), n=1, params=params(policy))
        assert result.metrics["repeated"]
    assert result.metrics["kl"] == measured.kl
    assert len(trainings(tmp_path / "log")) == n_before


def test_without_a_recorder_every_draw_is_trained(tmp_path):
    session = noted_session(tmp_path)
    params = session.plan.space.params_of(session.seeds[0].policy)
    grid = fit(session, None, n=2, params=params)
    assert not any(result.metrics["repeated"] for result in grid)
    assert len(trainings(tmp_path / "log")) == 2
