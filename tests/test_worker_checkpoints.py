"""Trials of workers that died in the middle: others go on from where they were."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from adq_search.checkpoint import TrainingCheckpoint
from adq_search.errors import AdqSearchWarning
from adq_search.hosting import HostOptions
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_artifacts import publish, store_of
from adq_search.plugins.optuna_checkpoints import SharedCheckpoints
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_lease import CHECKPOINT, MAX_RETRIES, give_up, requeue
from adq_search.plugins.optuna_objective import measuring, result_of
from adq_search.plugins.optuna_pruner import FrontPruner, scores_of
from adq_search.plugins.optuna_worker import FINISHED, Worker
from adq_search.progress import NoProgress
from adq_search.session import prepare
from tests.servers import object_server

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny.yaml"
EPOCHS, KILLED_AFTER = 4, 3
#: A worker that is killed with SIGKILL once its first trial has saved itself three times.
DYING = """
import os, signal, sys, torch
from pathlib import Path
from adq_search.checkpoint import TrainingCheckpoint
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.progress import NoProgress
torch.set_num_threads(1)
after_epoch = TrainingCheckpoint.after_epoch
def die(self, *arguments, **named):
    after_epoch(self, *arguments, **named)
    if len(self._losses) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
TrainingCheckpoint.after_epoch = die
OptunaHost().work(sys.argv[1], "tiny", Path(sys.argv[2]), NoProgress())
"""


@pytest.fixture
def session(tmp_path):
    job = read_job(TINY).with_training(epochs=EPOCHS, checkpoint_every_s=0.0)
    return prepare(plan(job.with_search(trials=2, seeds=1)), tmp_path / "run")


@pytest.fixture
def began(session):
    return begin(session)


def begin(session, place=None):
    url = str(session.folder / "study.journal")
    opened = OptunaHost()._open_study(session, HostOptions("tiny", url))
    publish(opened.study, session, place or str(session.folder / "artifacts"))
    policy = session.seeds[0].policy
    parameters = session.plan.space.params_of(policy)
    opened.study.enqueue_trial(parameters, user_attrs={"policy_hash": policy.hash})
    return opened


def interrupt_a_worker(began, session, monkeypatch, *, shares):
    """Begin a trial in this process, and leave it in the queue with its checkpoint."""
    after_epoch = TrainingCheckpoint.after_epoch

    def interrupt(self, *arguments, **named):
        after_epoch(self, *arguments, **named)
        if len(self._losses) == KILLED_AFTER:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCheckpoint, "after_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Worker(began, session, shares=shares).work(NoProgress(), lambda: None)


@pytest.fixture
def trained(began, monkeypatch):
    """Notes the file of each epoch that this process trains."""
    noted = []
    after_epoch = TrainingCheckpoint.after_epoch

    def note(self, *arguments, **named):
        noted.append(self.file.stem)
        after_epoch(self, *arguments, **named)

    monkeypatch.setattr(TrainingCheckpoint, "after_epoch", note)
    return noted


def checkpoints_in(session):
    return list((session.folder / "artifacts").glob("checkpoint-*"))


def timeless(result):
    return replace(result, wall_s=0.0, train_s=0.0)


@pytest.mark.slow
def test_a_worker_elsewhere_goes_on_where_another_was_killed(session, began, tmp_path, trained):
    url = str(session.folder / "study.journal")
    command = [sys.executable, "-c", DYING, url, str(tmp_path / "dies"), str(KILLED_AFTER)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    (lost,) = began.study.get_trials(states=(TrialState.RUNNING,))
    assert lost.user_attrs[CHECKPOINT]["epochs"] == KILLED_AFTER
    assert len(checkpoints_in(session)) == 1
    OptunaHost().work(url, "tiny", tmp_path / "lives", NoProgress())
    name = lost.user_attrs["policy_hash"]
    assert trained.count(name) == EPOCHS - KILLED_AFTER
    assert len(trained) == EPOCHS - KILLED_AFTER + EPOCHS
    first, second = measuring(began.study.get_trials(states=FINISHED))
    (again,) = (t for t in (first, second) if t.user_attrs["policy_hash"] == name)
    assert (again.user_attrs["retries"], again.user_attrs["resumed_epochs"]) == (1, KILLED_AFTER)
    assert checkpoints_in(session) == []
    assert not list((tmp_path / "lives").glob("checkpoints/*"))
    assert timeless(result_of(again)) == timeless(session.measure(result_of(again).policy))


def test_workers_in_one_folder_share_its_checkpoints(session, began, monkeypatch, trained):
    """Without an artifact store: the helpers of a run, or the run itself when it is resumed."""
    interrupt_a_worker(began, session, monkeypatch, shares=False)
    assert len(trained) == KILLED_AFTER
    assert checkpoints_in(session) == []
    trained.clear()
    Worker(began, session, shares=False).work(NoProgress(), lambda: None)
    assert len(trained) == EPOCHS - KILLED_AFTER + EPOCHS
    assert list((session.folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("fault", ["lost", "half written"])
def test_a_checkpoint_that_does_not_arrive_costs_epochs_and_no_trial(
    fault, session, began, monkeypatch, trained
):
    interrupt_a_worker(began, session, monkeypatch, shares=True)
    trained.clear()
    (artifact,) = checkpoints_in(session)
    (local,) = (session.folder / "checkpoints").iterdir()
    local.unlink()
    if fault == "lost":
        artifact.unlink()
    else:
        artifact.write_bytes(artifact.read_bytes()[:-100])
    worker = Worker(began, session, shares=True)
    match = "SHA-256" if fault == "half written" else "artifact store has no"
    with pytest.warns(AdqSearchWarning, match=f"{match}.* begins anew, not from its checkpoint"):
        worker.work(NoProgress(), lambda: None)
    assert len(trained) == 2 * EPOCHS
    assert len(measuring(began.study.get_trials(states=FINISHED))) == 2


def test_a_worker_that_lost_its_trial_stops_at_the_next_checkpoint(
    session, began, trained, monkeypatch
):
    note, taken = TrainingCheckpoint.after_epoch, []

    def take(self, *arguments, **named):
        if not taken and len(trained) == 1:
            taken.extend(began.study.get_trials(states=(TrialState.RUNNING,)))
            give_up(began.study, taken[0])
        note(self, *arguments, **named)

    monkeypatch.setattr(TrainingCheckpoint, "after_epoch", take)
    Worker(began, session, shares=True).work(NoProgress(), lambda: None)
    name = taken[0].user_attrs["policy_hash"]
    assert trained.count(name) == EPOCHS  # two until it noticed, and the rest
    assert len(measuring(began.study.get_trials(states=FINISHED))) == 2
    assert checkpoints_in(session) == []


def test_a_policy_that_gets_further_each_time_is_not_let_go(session, began):
    trial = began.study.ask()
    for epochs in range(1, 2 * MAX_RETRIES):
        trial.set_user_attr(CHECKPOINT, {"epochs": epochs})
        give_up(began.study, began.study.trials[trial.number])
        trial = began.study.ask()
        assert trial.user_attrs["retries"] == 1
        assert trial.user_attrs["resumed_epochs"] == epochs
    for retries in range(2, MAX_RETRIES + 1):
        requeue(began.study, began.study.trials[trial.number])
        trial = began.study.ask()
        assert trial.user_attrs["retries"] == retries
    requeue(began.study, began.study.trials[trial.number])
    assert not began.study.get_trials(states=(TrialState.WAITING,))


def test_a_store_that_takes_nothing_leaves_the_checkpoint_before(session, began):
    shared = SharedCheckpoints(session, store_of(began.study))
    trial, file = began.study.ask(), session.checkpoint_file(session.seeds[0].policy)
    file.parent.mkdir()
    file.write_bytes(b"first")
    shared._share(trial, file, 1)
    before = trial.user_attrs[CHECKPOINT]
    (session.folder / "artifacts").rename(session.folder / "moved")
    with pytest.warns(AdqSearchWarning, match="cannot be copied to the artifact store"):
        shared._share(trial, file, 2)
    assert trial.user_attrs[CHECKPOINT] == before
    assert (session.folder / "moved" / before["artifact_id"]).read_bytes() == b"first"


def test_checkpoints_travel_through_s3(session, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with object_server() as server:
        opened = begin(session, f"s3://bucket?endpoint={server}")
        shared = SharedCheckpoints(session, store_of(opened.study))
        policy = session.seeds[0].policy
        trial = opened.study.ask()
        file = session.checkpoint_file(policy)
        file.parent.mkdir()
        for content in (b"first", b"second"):
            file.write_bytes(content)
            shared._share(trial, file, 1)
        file.unlink()
        shared.of(trial, policy)
        assert file.read_bytes() == b"second"
        trial.set_user_attr("result", json.loads("{}"))
        with shared.dropped_after(trial):
            pass
        file.unlink()
        with pytest.warns(AdqSearchWarning, match="artifact store has no"):
            shared.of(trial, policy)


def test_a_pruner_decides_once_on_each_epoch(tmp_path, monkeypatch):
    """What was trained before the interruption is kept as scores, but not judged again."""
    job = read_job(TINY).with_training(epochs=EPOCHS, checkpoint_every_s=0.0)
    job = job.with_search(trials=1, seeds=1, pruner="front")
    session = prepare(plan(job), tmp_path / "run")
    began, asked = begin(session), []
    should_stop = FrontPruner.should_stop

    def note(self, trial, epoch, score, *, known=()):
        asked.append(epoch)
        return should_stop(self, trial, epoch, score, known=known)

    monkeypatch.setattr(FrontPruner, "should_stop", note)
    interrupt_a_worker(began, session, monkeypatch, shares=False)
    Worker(began, session, shares=False).work(NoProgress(), lambda: None)
    assert asked == [1, 2, 3]
    (trial,) = measuring(began.study.get_trials(states=FINISHED))
    assert list(scores_of(trial)) == [1, 2, 3, 4]
