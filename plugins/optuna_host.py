"""Optuna as the host of a search: one study, any number of worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study
from optuna.trial import TrialState

from adq_search.errors import StorageError, TaskError
from adq_search.hosting import HostOptions, HostOutcome, alone_in
from adq_search.leading import leading
from adq_search.own_process import set_up_process
from adq_search.parallel import ALONE, Ranks
from adq_search.plan import Plan
from adq_search.plugins._interrupts import remembered
from adq_search.plugins.optuna_artifacts import fetch_session, open_store, publish
from adq_search.plugins.optuna_ending import is_stopped, why_stopped
from adq_search.plugins.optuna_lease import LeaseTerms, Sweeper, worker_name
from adq_search.plugins.optuna_objective import (
    FINGERPRINT,
    STOPPED,
    Verdict,
    check_study,
    directions,
    measuring,
)
from adq_search.plugins.optuna_pruner import make_pruner
from adq_search.plugins.optuna_sampler import make_sampler
from adq_search.plugins.optuna_status import hosted_trials, read_status, read_status_in
from adq_search.plugins.optuna_storage import JOURNAL, RESTART_S, open_storage, refuse_sqlite
from adq_search.plugins.optuna_study_page import StudyPage, begin_pages
from adq_search.plugins.optuna_trial_pages import should_write
from adq_search.plugins.optuna_worker import (
    FINISHED,
    OpenStudy,
    Worker,
    collect,
    n_measured,
    open_study,
    quiet,
)
from adq_search.progress import NoProgress, Progress
from adq_search.session import Session, reopen
from adq_search.stacking import why_not_stackable
from adq_search.status import StudyStatus


class OptunaHost:
    """Runs a session as an Optuna study.

    Args:
        terms: How soon the trial of a silent worker is given to others; a study keeps the terms
            that it was made with.
    """

    def __init__(self, terms: LeaseTerms | None = None) -> None:
        self._terms = terms or LeaseTerms()

    def check(self, plan: Plan, folder: Path, options: HostOptions) -> None:
        """Refuse a study that exists unasked, belongs to another job, or cannot be shared."""
        if options.address is not None:
            msg = "An --address is that of a Ray cluster. Give --host ray, or leave it out."
            raise StorageError(msg)
        _check_passes(plan)
        if options.storage is not None and options.workers > 1:
            refuse_sqlite(options.storage, who=f"{options.workers} workers")
        if options.artifacts is not None:
            open_store(options.artifacts)
        should_write(options.dashboard)
        journal = _journal_file(folder)
        if options.storage is None and not journal.exists():
            if options.resume:
                msg = f"There is nothing to resume in {folder}. Leave --resume out."
                raise StorageError(msg)
            return
        if options.storage is None:
            with alone_in(folder):  # to say it before anything is trained
                pass
        patience_s = RESTART_S if options.resume else 0.0
        storage = open_storage(_storage_url(folder, options), patience_s=patience_s)
        names = optuna.study.get_all_study_names(storage)
        if options.study not in names:
            if options.resume:
                msg = f"The storage has no study '{options.study}' to resume. Leave --resume out."
                raise StorageError(msg)
            return
        study = optuna.load_study(study_name=options.study, storage=storage)
        check_study(study, plan)
        if not options.resume:
            n = len(measuring(study.get_trials(deepcopy=False, states=FINISHED)))
            msg = (
                f"Study '{options.study}' exists, with {n} measured trials. Give --resume to go "
                "on, or choose another --study or --out."
            )
            raise StorageError(msg)

    def run(self, session: Session, options: HostOptions, progress: Progress) -> HostOutcome:
        """Measure policies until the job's number of trials is reached."""
        with quiet(), alone_in(session.folder), remembered() as check_interrupt:
            opened = self._open_study(session, options)
            Sweeper(opened.terms, has_heartbeats=opened.has_heartbeats).sweep(opened.study)
            publish(opened.study, session, options.artifacts or str(session.folder / "artifacts"))
            begin_pages(opened.study, session, options.dashboard)
            if is_stopped(opened.study):
                opened.study.set_user_attr(STOPPED, None)  # judged anew, maybe by another rule
            _enqueue_seeds(opened.study, session)
            page = StudyPage(opened.study, session)

            def between_trials() -> None:
                check_interrupt()
                page.refresh()

            helpers = _start_helpers(session, options)
            try:
                _work(opened, session, options, index=0, progress=progress, after=between_trials)
                for helper in helpers:
                    helper.join(_LAST_WORDS_S)
            finally:
                for helper in helpers:
                    helper.terminate()
                    helper.join()
            page.refresh(is_last=True)
            collect(opened.study, session)
            return _outcome(opened.study, session.plan)

    def work(
        self,
        storage: str,
        study: str,
        folder: Path,
        progress: Progress,
        *,
        ranks: Ranks = ALONE,
    ) -> int:
        """Join a running study from any machine; return how many policies it has measured.

        Args:
            storage: Its URL.
            study: Its name.
            folder: Where this worker keeps what it fetches and trains.
            progress: Told how many trials of the whole study are finished.
            ranks: Processes that train each trial together, of which this is the first.

        Raises:
            StorageError: There is no such study, or this worker may not take part in it.
        """
        refuse_sqlite(storage, who="a second worker")
        with quiet(), remembered() as check_interrupt:
            opened = open_study(storage, study)
            session = fetch_session(opened.study, folder)
            opened.study.sampler = _sampler(
                session,
                zlib.crc32(worker_name().encode()),
                n_before=len(opened.study.get_trials(deepcopy=False)),
            )
            with leading(session, ranks) as led:
                Worker(opened, led, shares=True).work(progress, check_interrupt)
            return n_measured(opened.study)

    def status(self, storage: str, study: str) -> StudyStatus:
        """Look at a study without touching it.

        Raises:
            StorageError: There is no such study, or it was not made by adq_search.
        """
        with quiet():
            return read_status(storage, study)

    def status_in(self, folder: Path) -> StudyStatus:
        """Look at the study in a run's folder without touching it.

        Raises:
            StorageError: The folder has no study, or several.
        """
        with quiet():
            return read_status_in(folder)

    def _open_study(self, session: Session, options: HostOptions) -> OpenStudy:
        """Make or load the study; a new one gets its fingerprint and its terms."""
        plan = session.plan
        url = _storage_url(session.folder, options)
        study = optuna.create_study(
            study_name=options.study,
            storage=open_storage(url),
            directions=directions(plan),
            load_if_exists=True,
        )
        if FINGERPRINT not in study.user_attrs:
            study.set_user_attr(FINGERPRINT, plan.fingerprint)
            study.set_metric_names([axis.name for axis in plan.job.search.axes])
            self._terms.publish(study)
        check_study(study, plan)
        return open_study(url, options.study)


def _check_passes(plan: Plan) -> None:
    """Refuse to train several networks a pass where they cannot be stacked."""
    n = plan.job.training.networks_per_pass
    reason = why_not_stackable(plan.task.make_network, plan.task.example()) if n > 1 else None
    if reason is not None:
        msg = (
            f"{n} networks a pass are stacked along their channels, but the network of task "
            f"'{plan.task.name}' cannot be: {reason}. Set networks_per_pass to 1."
        )
        raise TaskError(msg)


#: Seconds that helper processes get to end by themselves once the study is full.
_LAST_WORDS_S = 10.0


def _enqueue_seeds(study: Study, session: Session) -> None:
    """Queue the seeds that no live trial of the study stands for."""
    states = (TrialState.WAITING, TrialState.RUNNING, *FINISHED)
    trials = study.get_trials(deepcopy=False, states=states)
    stand = [t.user_attrs for t in trials if t.user_attrs.get("verdict") != Verdict.SURPLUS]
    present = {attributes.get("policy_hash") for attributes in stand}
    for seed in session.seeds:
        if seed.policy.hash not in present:
            _enqueue(study, session.plan.space.params_of(seed.policy), seed.policy.hash)


def _enqueue(study: Study, parameters: dict[str, Any], policy_hash: str) -> None:
    study.enqueue_trial(parameters, user_attrs={"policy_hash": policy_hash})


def _storage_url(folder: Path, options: HostOptions) -> str:
    return options.storage or str(_journal_file(folder))


def _journal_file(folder: Path) -> Path:
    return folder / JOURNAL


def _sampler(session: Session, index: int, *, n_before: int) -> optuna.samplers.BaseSampler:
    """Return the job's sampler, each worker and each resumption with its own seed."""
    seed = session.plan.job.search.seed + 1_000 * index + 1_000_000 * n_before
    return make_sampler(session, seed=seed % 2**32)


def _work(
    opened: OpenStudy,
    session: Session,
    options: HostOptions,
    *,
    index: int,
    progress: Progress,
    after: Callable[[], None],
) -> None:
    """Run trials in this process until the study has as many as the job asks for."""
    n_before = len(opened.study.get_trials(deepcopy=False))
    opened.study.sampler = _sampler(session, index, n_before=n_before)
    Worker(opened, session, shares=options.storage is not None).work(progress, after)


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
    set_up_process(n_threads)
    parent = multiprocessing.parent_process()

    def stop_when_orphaned() -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit

    with quiet():
        opened = open_study(_storage_url(folder, options), options.study)
        session = reopen(folder)
        heard = NoProgress()
        _work(opened, session, options, index=index, progress=heard, after=stop_when_orphaned)


def _outcome(study: Study, plan: Plan) -> HostOutcome:
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    hosted = hosted_trials(study)
    pruner = make_pruner(plan)
    verdicts = [t.user_attrs.get("verdict") for t in trials]
    return HostOutcome(
        trials=tuple(hosted),
        n_rejected=verdicts.count(Verdict.OVER_BUDGET),
        n_repeated=verdicts.count(Verdict.REPEATED),
        end=why_stopped(study),
        false_stops=None if pruner is None else pruner.false_stops(study),
    )
