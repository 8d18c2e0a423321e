"""What a worker asks of a storage: a database that many share is slow to read all trials."""

from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_ending import StopRule
from adq_search.plugins.optuna_lease import LeaseTerms, Sweeper
from adq_search.plugins.optuna_objective import directions, distribution, measuring
from adq_search.plugins.optuna_sampler import PolicySampler, make_sampler
from adq_search.plugins.optuna_worker import OpenStudy, Worker
from adq_search.progress import NoProgress
from adq_search.session import prepare
from adq_search.simulator import published_problem

TINY = Path(__file__).parent / "tiny.yaml"


class CountingStorage(InMemoryStorage):
    """Counts how often all trials are read and each attribute of a trial is written."""

    def __init__(self):
        super().__init__()
        self.n_reads = 0
        self.written = Counter()

    def set_trial_user_attr(self, trial_id, key, value):
        self.written[key] += 1
        super().set_trial_user_attr(trial_id, key, value)

    def get_all_trials(self, *arguments, **named):
        self.n_reads += 1
        return super().get_all_trials(*arguments, **named)


@pytest.fixture
def storage():
    return CountingStorage()


@pytest.fixture
def study(storage):
    return optuna.create_study(storage=storage, directions=["maximize", "minimize"])


class EnoughError(Exception):
    pass


def test_a_turn_of_a_worker_reads_all_trials_four_times(storage, tmp_path):
    # To look about, by Optuna for queued trials, for the proposal, and for equal policies.
    planned = plan(read_job(TINY))
    session = prepare(planned, tmp_path)
    study = optuna.create_study(
        storage=storage, directions=directions(planned), sampler=make_sampler(session, seed=0)
    )
    worker = Worker(OpenStudy(study, LeaseTerms(), has_heartbeats=False), session, shares=False)
    reads = []

    def after():
        reads.append(storage.n_reads)
        if len(reads) == 4:
            raise EnoughError

    with pytest.raises(EnoughError):
        worker.work(NoProgress(), after)
    assert list(np.diff(reads)) == [4, 4, 4]
    assert len(measuring(study.get_trials())) == 3
    assert storage.written["worker"] == storage.written["verdict"] == 3


def test_a_sweep_returns_the_trials_as_it_leaves_them(storage, study):
    study.ask()
    lost = study.ask()
    lost.set_user_attr("policy_hash", "x")
    lost.set_user_attr("verdict", "measured")
    sweeper = Sweeper(LeaseTerms(grace_s=-1.0), has_heartbeats=False)
    before = storage.n_reads
    found = sweeper.sweep(study, mine={0, 1})
    assert storage.n_reads == before + 1
    assert [t.state for t in found] == [TrialState.RUNNING] * 2
    found = sweeper.sweep(study, mine={0})
    states = {t.number: t.state for t in found}
    assert states == {0: TrialState.RUNNING, 1: TrialState.FAIL, 2: TrialState.WAITING}


def test_the_stop_rule_reads_nothing_while_nothing_new_is_finished(storage, study, tmp_path):
    session = prepare(plan(read_job(TINY).with_search(stop={"patience": 5})), tmp_path)
    rule = StopRule(study, session)
    before = storage.n_reads
    assert not rule.is_met([])
    assert storage.n_reads == before


def test_a_proposal_reads_the_trials_once_and_each_its_own(storage, study):
    problem = published_problem(seed=0)
    study.sampler = PolicySampler(problem.space, seed=0)
    for _ in range(2):
        trial = study.ask()
        before = storage.n_reads
        for parameter in problem.space.parameters:
            found = distribution(parameter)
            trial.suggest_int(parameter.name, found.low, found.high, step=found.step)
        assert storage.n_reads == before + 1
        study.tell(trial, (0.5, 1.0))
