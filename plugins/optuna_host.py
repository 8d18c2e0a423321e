"""Optuna as the host of a search: one study, any number of worker processes on this machine."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from adq_search.errors import StorageError
from adq_search.hosting import HostedTrial, HostOptions, HostOutcome
from adq_search.plan import Plan
from adq_search.plugins._interrupts import remembered
from adq_search.plugins.optuna_journal import mend_journal, open_journal
from adq_search.plugins.optuna_objective import (
    FINGERPRINT,
    PolicyObjective,
    Verdict,
    check_study,
    directions,
    measuring,
    result_of,
)
from adq_search.plugins.optuna_sampler import make_sampler
from adq_search.progress import NoProgress, Progress
from adq_search.session import Session, reopen

_POLL_S = 0.5
#: Draws in a row that measured nothing new, after which the space counts as exhausted.
_MAX_IDLE_DRAWS = 300


class OptunaHost:
    """Runs a session as an Optuna study."""

    def check(self, plan: Plan, folder: Path, options: HostOptions) -> None:
        """Refuse a study that exists unasked, belongs to another job, or cannot be shared."""
        if options.storage is not None and options.workers > 1 and "sqlite" in options.storage:
            msg = (
                f"SQLite locks its whole file, so {options.workers} workers would fail on it. Use "
                "the journal file (leave --storage out), or a PostgreSQL or MySQL URL."
            )
            raise StorageError(msg)
        journal = _journal_file(folder)
        if options.storage is None and not journal.exists():
            if options.resume:
                msg = f"There is nothing to resume in {folder}. Leave --resume out."
                raise StorageError(msg)
            return
        if options.storage is None:
            with _alone_in(folder):
                mend_journal(journal)
        storage = _open_storage(folder, options)
        names = optuna.study.get_all_study_names(storage)
        if options.study not in names:
            if options.resume:
                msg = f"The storage has no study '{options.study}' to resume. Leave --resume out."
                raise StorageError(msg)
            return
        study = optuna.load_study(study_name=options.study, storage=storage)
        check_study(study, plan)
        if not options.resume:
            n = len(measuring(study.get_trials(deepcopy=False, states=_FINISHED)))
            msg = (
                f"Study '{options.study}' exists, with {n} measured trials. Give --resume to go "
                "on, or choose another --study or --out."
            )
            raise StorageError(msg)

    def run(self, session: Session, options: HostOptions, progress: Progress) -> HostOutcome:
        """Measure policies until the job's number of trials is reached."""
        with _quiet(), _alone_in(session.folder), remembered() as check_interrupt:
            study = _open_study(session, options)
            _requeue_abandoned(study)
            _enqueue_seeds(study, session)
            n_trials = session.plan.job.search.trials
            helpers = _start_helpers(session, options)
            try:
                while True:
                    _work(session, options, index=0, progress=progress, after=check_interrupt)
                    _wait_for(helpers, study, n_trials, progress)
                    check_interrupt()
                    _requeue_abandoned(study)
                    if _n_measured(study) >= n_trials or _is_exhausted(study):
                        return _outcome(study)
                    time.sleep(_POLL_S)
            finally:
                for helper in helpers:
                    helper.terminate()
                    helper.join()


_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def _open_study(session: Session, options: HostOptions) -> Study:
    """Make or load the study; a new one gets its fingerprint and its seeds."""
    plan = session.plan
    study = optuna.create_study(
        study_name=options.study,
        storage=_open_storage(session.folder, options),
        directions=directions(plan),
        load_if_exists=True,
    )
    if FINGERPRINT not in study.user_attrs:
        study.set_user_attr(FINGERPRINT, plan.fingerprint)
        study.set_metric_names([axis.name for axis in plan.job.search.axes])
    check_study(study, plan)
    return study


def _enqueue_seeds(study: Study, session: Session) -> None:
    """Queue the seeds that no live trial of the study stands for."""
    states = (TrialState.WAITING, TrialState.RUNNING, *_FINISHED)
    trials = study.get_trials(deepcopy=False, states=states)
    present = {t.user_attrs.get("policy_hash") for t in trials}
    for seed in session.seeds:
        if seed.policy.hash not in present:
            _enqueue(study, session.plan.space.params_of(seed.policy), seed.policy.hash)


def _enqueue(study: Study, parameters: dict[str, Any], policy_hash: str) -> None:
    study.enqueue_trial(parameters, user_attrs={"policy_hash": policy_hash})


def _open_storage(folder: Path, options: HostOptions) -> BaseStorage:
    if options.storage is None:
        return open_journal(_journal_file(folder))
    try:
        if "://" not in options.storage:
            return open_journal(Path(options.storage))
        return RDBStorage(options.storage)
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        msg = f"The storage '{options.storage}' cannot be opened: {detail}. Check the URL."
        raise StorageError(msg) from error


def _journal_file(folder: Path) -> Path:
    return folder / "study.journal"


def _sampler(session: Session, index: int, *, n_before: int) -> optuna.samplers.BaseSampler:
    """Return the job's sampler, each worker and each resumption with its own seed."""
    seed = session.plan.job.search.seed + 1_000 * index + 1_000_000 * n_before
    return make_sampler(session, seed=seed % 2**32)


def _work(
    session: Session,
    options: HostOptions,
    *,
    index: int,
    progress: Progress,
    after: Callable[[], None],
) -> None:
    """Run trials in this process until the study has as many as the job asks for.

    `after` is called after each trial, and may raise to end the work.
    """
    n_trials = session.plan.job.search.trials
    study = optuna.load_study(
        study_name=options.study, storage=_open_storage(session.folder, options)
    )
    study.sampler = _sampler(session, index, n_before=len(study.get_trials(deepcopy=False)))
    objective = PolicyObjective(session, n_trials=n_trials)

    def stop_when_enough(study: Study, _: FrozenTrial) -> None:
        _tell(study, n_trials, progress)
        after()
        if len(_claimed(study)) >= n_trials or _is_exhausted(study):
            study.stop()

    _tell(study, n_trials, progress)
    if len(_claimed(study)) < n_trials:
        study.optimize(objective, callbacks=[stop_when_enough])


def _claimed(study: Study) -> list[FrozenTrial]:
    """Return the trials that measured a policy or are measuring one now."""
    states = (TrialState.RUNNING, *_FINISHED)
    return measuring(study.get_trials(deepcopy=False, states=states))


def _n_measured(study: Study) -> int:
    return len(measuring(study.get_trials(deepcopy=False, states=_FINISHED)))


def _is_exhausted(study: Study) -> bool:
    """Whether the last many draws brought nothing new."""
    last = study.get_trials(deepcopy=False, states=_FINISHED)[-_MAX_IDLE_DRAWS:]
    return len(last) == _MAX_IDLE_DRAWS and not measuring(last)


def _start_helpers(
    session: Session, options: HostOptions
) -> list[multiprocessing.process.BaseProcess]:
    context = multiprocessing.get_context("spawn")
    helpers: list[multiprocessing.process.BaseProcess] = []
    for index in range(1, options.workers):
        helper = context.Process(
            target=_help,
            args=(session.folder, options, index, torch.get_num_threads()),
            daemon=True,
        )
        helper.start()
        helpers.append(helper)
    return helpers


def _help(folder: Path, options: HostOptions, index: int, n_threads: int) -> None:
    """Be a worker process; Ctrl-C in the terminal is the first process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(n_threads)
    parent = multiprocessing.parent_process()

    def stop_when_orphaned() -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit

    with _quiet():
        _work(reopen(folder), options, index=index, progress=NoProgress(), after=stop_when_orphaned)


def _wait_for(
    helpers: list[multiprocessing.process.BaseProcess],
    study: Study,
    n_trials: int,
    progress: Progress,
) -> None:
    while any(helper.is_alive() for helper in helpers):
        _tell(study, n_trials, progress)
        time.sleep(_POLL_S)


def _requeue_abandoned(study: Study) -> None:
    """Fail trials whose process on this machine is gone, and queue their parameters again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_alive(trial.user_attrs.get("worker")):
            continue
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        if trial.user_attrs.get("verdict") == Verdict.MEASURED:
            _enqueue(study, trial.params, trial.user_attrs["policy_hash"])


def _is_alive(worker: str | None) -> bool:
    """Whether the process of a running trial may still be at work."""
    if worker is None:
        return False
    host, _, process = worker.rpartition(":")
    if host != socket.gethostname():
        return True
    if int(process) == os.getpid():
        return False  # this process is between trials; the number was another's before
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _outcome(study: Study) -> HostOutcome:
    trials = study.get_trials(deepcopy=False, states=_FINISHED)
    hosted = []
    for trial in measuring(trials):
        result = result_of(trial)
        if result is None:
            msg = (
                f"Trial {trial.number} of study '{study.study_name}' has lost its result. The "
                "storage is damaged; restore it from a copy."
            )
            raise StorageError(msg)
        started = trial.datetime_start
        hosted.append(
            HostedTrial(
                number=trial.number,
                parameters=dict(trial.params),
                result=result,
                origin=trial.user_attrs.get("origin", "sampler"),
                worker=trial.user_attrs.get("worker", ""),
                started_at="" if started is None else started.isoformat(timespec="seconds"),
            )
        )
    verdicts = [t.user_attrs.get("verdict") for t in trials]
    return HostOutcome(
        trials=tuple(hosted),
        n_rejected=verdicts.count(Verdict.OVER_BUDGET),
        n_repeated=verdicts.count(Verdict.REPEATED),
    )


def _tell(study: Study, n_trials: int, progress: Progress) -> None:
    progress.update("trials", min(_n_measured(study), n_trials), n_trials)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two runs in one folder would take each other's trials for dead."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            msg = f"Another run is at work in {folder}. Wait for it, or choose another --out."
            raise StorageError(msg) from error
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's line per trial and its notes on experimental features; ours are shown."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)
