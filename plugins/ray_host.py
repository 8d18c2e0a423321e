"""Ray Tune as the host of a search: on this machine, or on a cluster of any size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna

from adq_search.errors import StorageError
from adq_search.files import read_json
from adq_search.hosting import HostOptions, HostOutcome, alone_in
from adq_search.plan import Plan, check_fingerprint
from adq_search.plugins._ray_cluster import check_cluster, cluster
from adq_search.plugins._ray_experiment import first_fault, run_experiment, storage_place
from adq_search.plugins._ray_home import serve
from adq_search.plugins._ray_installed import tune
from adq_search.plugins._ray_records import (
    TrialStore,
    false_stops,
    hosted_trials,
    measured_records,
    reconcile,
    records_of,
)
from adq_search.plugins._ray_replicates import run_replicates
from adq_search.plugins._ray_room import despite_full_disks
from adq_search.plugins.optuna_sampler import make_sampler
from adq_search.plugins.ray_recorder import SessionRecorder
from adq_search.plugins.ray_scheduler import make_scheduler
from adq_search.plugins.ray_searcher import PolicySearcher
from adq_search.plugins.ray_status import read_status
from adq_search.progress import Progress
from adq_search.session import Session
from adq_search.status import StudyStatus
from adq_search.stopping import SearchEnd, settled
from adq_search.trial import TrialResult

#: Experiments in a row that may lose a trial to machines that failed before it began.
_MAX_ROUNDS = 5

#: A result with the mean training loss of each epoch.
Known = tuple[TrialResult, tuple[float, ...]]


class RayHost:
    """Runs a session as Ray Tune experiments; each resumption is a new one.

    What is finished lies in the session's folder from the moment it ends, and an interrupted trial
    leaves its checkpoints in the storage path: a resumption reads these, and nothing that Tune
    keeps of an experiment for itself.
    """

    def check(self, plan: Plan, folder: Path, options: HostOptions) -> None:
        """Refuse a folder that holds trials unasked, or of another job, and impossible wishes."""
        check_cluster(options)
        if options.storage is not None:
            msg = "The host 'ray' keeps its trials in --out. Leave --storage out."
            raise StorageError(msg)
        if options.dashboard:
            msg = (
                "Pages of optuna-dashboard lie in an Optuna storage, which the host 'ray' has not. "
                "Leave --dashboard out."
            )
            raise StorageError(msg)
        TrialStore(storage_place(folder, options))
        is_begun = (folder / "session.json").exists()
        if options.resume and not is_begun:
            msg = f"There is nothing to resume in {folder}. Leave --resume out."
            raise StorageError(msg)
        if is_begun:
            stored = read_json(folder / "session.json", StorageError, what="session")
            check_fingerprint(stored["fingerprint"], plan.fingerprint, where=f"folder {folder}")
            if not options.resume:
                n_known = len(list((folder / "trials").glob("*.json")))
                msg = (
                    f"{folder} holds a search with {n_known} measured trials. Give --resume to go "
                    "on, or choose another --out."
                )
                raise StorageError(msg)

    def run(self, session: Session, options: HostOptions, progress: Progress) -> HostOutcome:
        """Measure policies until the job's number of trials is reached, or its stop rule is met.

        Where a disk is full, the search waits until there is room, and goes on.

        Raises:
            StorageError: A trial failed again and again, for the reason told, a disk had no room
                for long, or another run is at work in the folder.
        """
        with alone_in(session.folder):
            search = _Search(session, options, progress)
            return despite_full_disks(search.go_on, session.folder)

    def status_in(self, folder: Path) -> StudyStatus:
        """Look at the search in a folder without touching it.

        Raises:
            StorageError: The folder holds no search, or is damaged.
        """
        return read_status(folder)


class _Search:
    """A search, as experiments that follow one another.

    Args:
        session: The prepared job.
        options: What the user asked of the host.
        progress: Told how many trials are finished.
    """

    def __init__(self, session: Session, options: HostOptions, progress: Progress) -> None:
        self._session = session
        self._options = options
        self._progress = progress
        self._store = TrialStore(storage_place(session.folder, options))
        self._n_rejected = self._n_repeated = 0

    def go_on(self) -> HostOutcome:
        """Run what is missing, from whatever state the search was left in."""
        session = self._session
        with cluster(self._options):
            if session.plan.job.training.warm_start:
                serve(session.folder)
            end = self._run_trials()
            run_replicates(session, self._options, self._progress)
        return HostOutcome(
            hosted_trials(session),
            n_rejected=self._n_rejected,
            n_repeated=self._n_repeated,
            end=end,
            false_stops=false_stops(session),
        )

    def _run_trials(self) -> SearchEnd | None:
        """Run experiments until no trial is missing; return why the search ended before that."""
        plan = self._session.plan
        told = ""
        for _ in range(_MAX_ROUNDS):
            checkpoints = reconcile(self._session, self._store)
            known = measured_records(self._session)
            end = settled(plan, [result for result, _ in known])
            n_missing = plan.job.search.trials - len(known)
            if n_missing <= 0 or end is not None:
                return end
            results, end = self._experiment(known, checkpoints, n_missing)
            if not results.num_errors:
                return end
            if (fault := first_fault(results.errors)) is not None:
                raise fault
            told = str(results.errors[0]).strip().splitlines()[-1]
        msg = (
            f"Trials were lost in {_MAX_ROUNDS} experiments in a row: {told} Give --resume once "
            "machines and disks are well; nothing finished is lost."
        )
        raise StorageError(msg)

    def _experiment(
        self, known: Sequence[Known], interrupted: Mapping[str, tune.Checkpoint], n_trials: int
    ) -> tuple[tune.ResultGrid, SearchEnd | None]:
        """Run an experiment; return its results, and why it ended before its last trial."""
        session = self._session
        scheduler = make_scheduler(session.plan, known)
        # The searcher proposes no policy twice: there is nobody who would ask about the folder.
        recorder = SessionRecorder(session, self._progress, scheduler=scheduler, serves=False)
        searcher = _searcher(session, known, recorder)
        results = run_experiment(
            session,
            self._options,
            searcher,
            [recorder],
            name=self._options.study,
            n_trials=n_trials,
            scheduler=scheduler,
            interrupted=interrupted,
        )
        self._n_rejected += searcher.n_rejected
        self._n_repeated += searcher.n_repeated
        return results, recorder.end


def _searcher(
    session: Session, known: Sequence[Known], recorder: SessionRecorder
) -> PolicySearcher:
    """Return a searcher that knows what is measured, and begins with what was interrupted."""
    measured = {result.policy.hash for result, _ in known}
    records = records_of(session.folder)
    first = [record.parameters for record in records if record.policy_hash not in measured]
    sampler = None
    if session.plan.job.search.sampler != "guide":
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = make_sampler(session, seed=session.plan.job.search.seed + len(known))
    return PolicySearcher(
        session, known=known, first=first, sampler=sampler, is_over=recorder.is_over
    )
