"""Searches on Ray, on this machine: the host, and a user's own `Tuner` with our parts."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from adq_search.errors import StorageError
from adq_search.hosting import HostOptions
from adq_search.job import read_job
from adq_search.pareto import front_indices
from adq_search.plan import plan
from adq_search.plugins._ray_records import RayRecord, hosted_trials, records_of, write_record
from adq_search.plugins.ray_host import RayHost
from adq_search.plugins.ray_recorder import SessionRecorder
from adq_search.plugins.ray_scheduler import FrontScheduler
from adq_search.plugins.ray_searcher import PolicySearcher
from adq_search.plugins.ray_trainable import param_space, policy_trainable
from adq_search.progress import NoProgress
from adq_search.results import write_outcome
from adq_search.session import prepare
from tests import clusters, fragile

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    clusters.start_here(n_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(plan(read_job(TINY)), tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def session(prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path / "session")
    return replace(prepared, folder=tmp_path / "session")


def fragile_session(tmp_path, *, epochs=4, trials=4, **training):
    """Return a session whose trials harm themselves as files in `tmp_path / "harm"` say."""
    job = fragile.job(tmp_path, trials=trials, epochs=epochs, **training)
    return prepare(plan(job), tmp_path / "session")


def run(session, **options):
    asked = HostOptions("tiny", **({"workers": 2, "resume": True} | options))
    host = RayHost()
    host.check(session.plan, session.folder, asked)
    return host.run(session, asked, NoProgress())


def front_of(session):
    """Return the hashes of the policies on the front of what is measured."""
    complete = [t.result for t in hosted_trials(session) if t.result.state == "complete"]
    values = [session.plan.values(result) for result in complete]
    found = front_indices(values, [axis.direction for axis in session.plan.job.search.axes])
    return [complete[i].policy.hash for i in found]


def trial_folders(session):
    return [f for f in (session.folder / "ray" / "tiny").iterdir() if f.is_dir()]


@pytest.mark.slow
def test_the_host_measures_what_any_host_measures(session, prepared, tmp_path):
    outcome = run(session)
    assert len(outcome.trials) == session.plan.job.search.trials == 6
    assert [t.number for t in outcome.trials] == list(range(6))
    assert {t.origin for t in outcome.trials} >= {s.origin for s in session.seeds[:5]}
    for trial in outcome.trials:
        alone = replace(prepared, folder=tmp_path / "alone").measure(trial.result.policy)
        for figure in ("accuracy", "loss", "kl", "cost", "weights_fingerprint", "epochs"):
            assert getattr(trial.result, figure) == getattr(alone, figure)
        assert session.plan.space.policy_of(trial.parameters) == trial.result.policy
        assert session.weights_file(trial.result.policy).exists()
        assert trial.worker
    # One record for each Ray trial (R3), and its curve is kept.
    assert len(trial_folders(session)) == len(records_of(session.folder)) == 6
    assert all(len(record.train_losses) == 2 for record in records_of(session.folder))
    # The same files as with Optuna, and nothing measured again by a resumption.
    report = write_outcome(session, outcome, HostOptions("tiny"), started=0.0)
    assert report.points
    for name in ("front.json", "trials.csv", "report.html", "run.json"):
        assert (session.folder / name).exists(), name
    assert run(session).trials == outcome.trials
    assert len(trial_folders(session)) == 6


def own_tuner(session, tmp_path, *, n=8, callbacks=(), **config):
    run_config = tune.RunConfig(
        name="own",
        storage_path=str(tmp_path / "storage"),
        verbose=0,
        callbacks=[SessionRecorder(session), *callbacks],
    )
    flat = {} if isinstance(config.get("search_alg"), PolicySearcher) else param_space(session.plan)
    tune_config = tune.TuneConfig(num_samples=n, reuse_actors=True, **config)
    return tune.Tuner(
        policy_trainable(session), param_space=flat, tune_config=tune_config, run_config=run_config
    )


def longer(session, epochs):
    job = session.plan.job.with_training(epochs=epochs)
    return replace(session, plan=plan(job))


def check_stopped_are_apart(session, grid):
    """R1: what was stopped has no score, is recorded as stopped, and is on no front."""
    hosted = hosted_trials(session)
    stopped = [t for t in hosted if t.result.state == "stopped"]
    reports = [r.metrics for r in grid]
    assert len(stopped) == len({r["policy_hash"] for r in reports if r["state"] == "running"}) > 0
    assert all(t.result.accuracy is None for t in stopped)
    assert all(t.result.epochs < session.plan.job.training.epochs for t in stopped)
    outcome = replace(RayHost().run(session, HostOptions("own"), NoProgress()), trials=hosted)
    report = write_outcome(session, outcome, HostOptions("own"), started=0.0)
    assert not {p.policy_hash for p in report.points} & {t.result.policy.hash for t in stopped}
    assert report.counts["stopped"] == len(stopped)


@pytest.mark.slow
def test_tunes_own_searcher_and_asha_work_with_our_trainable(session, tmp_path):
    session = longer(session, 4)
    session = replace(session, plan=plan(session.plan.job.with_search(trials=1)))
    asha = ASHAScheduler(metric="train_loss", mode="min", max_t=4, reduction_factor=2)
    searcher = OptunaSearch(metric=["accuracy", "energy_pj"], mode=["max", "min"], seed=0)
    grid = own_tuner(session, tmp_path, scheduler=asha, search_alg=searcher).fit()
    assert not grid.errors
    check_stopped_are_apart(session, grid)
    # Nor does Optuna's own study take a stopped trial for a finished one.
    assert all(t.values is None or t.values[0] > 0 for t in searcher._ot_study.trials)


class Ends(tune.Callback):
    """Ends the driver once some trials are complete."""

    def __init__(self, n):
        self.n = n

    def on_step_end(self, iteration, trials, **info):
        if sum(t.status == "TERMINATED" for t in trials) >= self.n:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_user_restores_an_experiment_with_searcher_and_rungs(session, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    monkeypatch.setenv("TUNE_DISABLE_SIGINT_HANDLER", "1")
    session = longer(session, 4)
    session = replace(session, plan=plan(session.plan.job.with_search(trials=1)))

    def scheduler():
        objectives = {"accuracy": "max", "energy_pj": "min"}
        return FrontScheduler((1, 2), objectives=objectives, measured="accuracy", spared=0.0)

    tuner = own_tuner(
        session,
        tmp_path,
        n=30,
        scheduler=scheduler(),
        search_alg=PolicySearcher(session),
        callbacks=[Ends(14)],
    )
    with pytest.raises(KeyboardInterrupt):
        tuner.fit()
    clusters.start_here(n_cpus=2)
    before = clusters.measured_in(session.folder)
    assert 10 <= len(before) < 20
    restored = tune.Tuner.restore(
        str(tmp_path / "storage" / "own"), policy_trainable(session), resume_unfinished=True
    )
    restored._local_tuner._run_config.callbacks = [
        c for c in restored._local_tuner._run_config.callbacks if not isinstance(c, Ends)
    ]
    grid = restored.fit()
    assert len(grid) == 30
    assert not grid.errors
    after = clusters.measured_in(session.folder)
    assert len(after) == 30  # one policy each: none was proposed twice (R5)
    assert {name: after[name] for name in before} == before
    check_stopped_are_apart(session, grid)


@pytest.mark.slow
def test_a_trial_goes_on_from_its_checkpoint_on_another_worker(tmp_path):
    session = fragile_session(tmp_path, epochs=6, trials=2, checkpoint_every_s=0.0)
    seen = []

    class Watch(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            seen.append((result["training_iteration"], result["pid"]))
            if result["training_iteration"] == 3 and len({pid for _, pid in seen}) == 1:
                (tmp_path / "harm" / "kill").touch()

    grid = tune.Tuner(
        policy_trainable(session),
        param_space=session.plan.space.params_of(session.seeds[0].policy),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "storage"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[Watch(), SessionRecorder(session)],
        ),
    ).fit()
    assert not grid.errors
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5, 6]  # no epoch was trained again
    assert len({pid for _, pid in seen}) == 2
    (hosted,) = hosted_trials(session)
    alone = replace(session, folder=tmp_path / "alone").measure(hosted.result.policy)
    for figure in ("accuracy", "loss", "kl", "weights_fingerprint"):
        assert getattr(hosted.result, figure) == getattr(alone, figure)


class Dies:
    """A monitor that ends its process's training after three epochs, as a kill does."""

    def report(self, epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    def should_stop(self):
        return False


@pytest.mark.slow
def test_a_resumption_goes_on_from_the_checkpoints_of_a_lost_experiment(tmp_path, monkeypatch):
    """Driver and workers died; all that is left of the trial is its record and its checkpoint."""
    job = read_job(TINY).with_search(trials=1, prior=None)
    job = job.with_training(epochs=6, checkpoint_every_s=0.0)
    session = prepare(plan(job), tmp_path / "session")
    policy = session.seeds[1].policy
    params = session.plan.space.params_of(policy)
    write_record(
        session.folder, RayRecord(policy.hash, 0, "lost", "tiny/lost", params, "sampler", "", "")
    )
    left = session.folder / "ray" / "tiny" / "lost" / "checkpoint_000002"
    with pytest.raises(KeyboardInterrupt):
        replace(session, folder=left).measure(policy, Dies())
    heard, record = [], SessionRecorder.on_trial_result

    def listen(recorder, **told):
        heard.append(told["result"]["training_iteration"])
        record(recorder, **told)

    monkeypatch.setattr(SessionRecorder, "on_trial_result", listen)
    (hosted,) = run(session).trials
    assert (hosted.number, hosted.result.policy) == (0, policy)
    assert heard == [4, 5, 6]
    alone = replace(session, folder=session.folder / "alone").measure(policy)
    assert hosted.result.kl == alone.kl
    assert hosted.result.weights_fingerprint == alone.weights_fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["kill", "memory"])
def test_a_worker_that_dies_or_is_out_of_memory_costs_no_trial(tmp_path, harm):
    session = fragile_session(tmp_path, trials=5)
    for i in range(2):
        (tmp_path / "harm" / f"{harm}-{i}").touch()
    outcome = run(session)
    assert len(outcome.trials) == 5
    assert {t.result.state for t in outcome.trials} <= {"complete", "diverged"}
    assert len(records_of(session.folder)) == 5
    assert not list((tmp_path / "harm").iterdir())


@pytest.mark.slow
def test_the_front_is_trained_again_on_the_cluster(session):
    session = replace(session, plan=plan(session.plan.job.with_search(replicates=2)))
    run(session)
    on_front = set(front_of(session))
    there = {f.stem for f in (session.folder / "replicates").glob("*.json")}
    assert there == {f"{name}-{seed}" for name in on_front for seed in (1, 2)}
    (policy,) = [s.policy for s in session.seeds if s.policy.hash in on_front][:1]
    alone = replace(session, folder=session.folder / "alone").measure(policy, seed=2)
    assert session.result_of(policy, seed=2).kl == alone.kl


@pytest.mark.slow
def test_a_broken_task_ends_the_search_and_says_why(tmp_path):
    session = fragile_session(tmp_path, trials=5)
    for i in range(200):
        (tmp_path / "harm" / f"error-{i}").touch()
    with pytest.raises(StorageError, match="this task is broken"):
        run(session)
    assert len(list((tmp_path / "harm").iterdir())) > 180  # it ended at the first such trial
    for file in (tmp_path / "harm").iterdir():
        file.unlink()
    assert len(run(session).trials) == 5


def test_what_this_machine_lacks_is_said(session):
    with pytest.raises(StorageError, match="asks for 1 GPU"):
        run(session, gpus_per_trial=1.0)


@pytest.mark.slow
def test_trials_share_a_gpu(session):
    """As Ray counts: whether there is one does not matter to it."""
    clusters.start_here(n_cpus=2, n_gpus=1)
    session = replace(session, plan=plan(session.plan.job.with_search(trials=4)))
    assert len(run(session, gpus_per_trial=0.5).trials) == 4
    with pytest.raises(StorageError, match="asks for 2 GPU, but this machine has 1"):
        run(session, gpus_per_trial=2.0)
