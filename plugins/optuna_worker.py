"""The loop of every process that runs trials of a study: the first one, its helpers, and others."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from safetensors import SafetensorError

from adq_search.errors import ParallelError, StorageError
from adq_search.pareto import front_indices
from adq_search.plugins._outages import disk_is_out
from adq_search.plugins.optuna_artifacts import download, store_of, upload
from adq_search.plugins.optuna_checkpoints import SharedCheckpoints
from adq_search.plugins.optuna_ending import Replicates, StopRule, is_stopped, replicated
from adq_search.plugins.optuna_lease import Lease, LeaseTerms, Sweeper, give_up, requeue
from adq_search.plugins.optuna_objective import (
    REPLICATE_SEED,
    PolicyObjective,
    measuring,
    result_of,
)
from adq_search.plugins.optuna_pruner import make_pruner
from adq_search.plugins.optuna_storage import RESTART_S, open_storage
from adq_search.plugins.optuna_trial_pages import TrialPages
from adq_search.policy import Policy
from adq_search.progress import Progress
from adq_search.session import Session
from adq_search.trial import TrialResult

#: User attribute of a trial: where its weights lie in the artifact store.
WEIGHTS = "weights"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_POLL_S = 0.2
#: Draws in a row that measured nothing new, after which the space counts as exhausted.
_MAX_IDLE_DRAWS = 300
#: Draws for each place in a pass, after which it starts with fewer networks.
_DRAWS_PER_NETWORK = 10


class OpenStudy(NamedTuple):
    """A study opened by a process that runs its trials.

    Attributes:
        study: The study.
        terms: Of leases and heartbeats, as the study states them.
        has_heartbeats: Whether the storage keeps Optuna's heartbeats.
    """

    study: Study
    terms: LeaseTerms
    has_heartbeats: bool


def open_study(url: str, name: str) -> OpenStudy:
    """Open a study for a process that runs its trials, on the terms that the study states.

    Raises:
        StorageError: The storage cannot be opened, or has no such study.
    """
    glance = load_study(open_storage(url, patience_s=RESTART_S, is_there=True), name)
    terms = LeaseTerms.of(glance.user_attrs)
    storage = open_storage(url, terms, on_stale=requeue, patience_s=RESTART_S)
    return OpenStudy(load_study(storage, name), terms, isinstance(storage, RDBStorage))


def load_study(storage: BaseStorage, name: str) -> Study:
    """Load a study.

    Raises:
        StorageError: There is none of that name; the text lists those there are.
    """
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        known = ", ".join(optuna.study.get_all_study_names(storage)) or "none"
        msg = f"The storage has no study '{name}'. Known: {known}."
        raise StorageError(msg) from error


class Worker:
    """Runs trials of a study in this process, beside any number of others.

    Args:
        opened: The study, its sampler set.
        session: The prepared job; measured results lie in its folder.
        shares: Whether weights go to the study's artifact store, for processes elsewhere.
    """

    def __init__(self, opened: OpenStudy, session: Session, *, shares: bool) -> None:
        study, terms, has_heartbeats = opened
        self._study = study
        self._session = session
        self._n_trials = session.plan.job.search.trials
        self._n_per_pass = session.plan.job.training.networks_per_pass
        self._running: set[int] = set()
        if self._n_per_pass > 1 and has_heartbeats:
            msg = (
                f"A worker that trains {self._n_per_pass} networks at once holds as many leases, "
                "which a database has none of. Use the journal file (leave --storage out), or set "
                "networks_per_pass to 1."
            )
            raise StorageError(msg)
        self._lease = Lease(terms)
        self._sweeper = Sweeper(terms, has_heartbeats=has_heartbeats)
        self._store = store_of(study) if shares else None
        self._checkpoints = SharedCheckpoints(session, self._store)
        self._stop_rule = StopRule(study, session)
        self._replicates = Replicates(study, session)
        self._pages = TrialPages(study, session, has_weights=shares)
        self._objective = PolicyObjective(
            session,
            n_trials=self._n_trials,
            pruner=make_pruner(session.plan),
            checkpoint_of=self._checkpoints.of,
            on_measured=self._share,
            while_waiting=self._look_about,
        )

    def work(self, progress: Progress, after: Callable[[], None]) -> None:
        """Run trials until the study has as many finished ones as its job asks for, or settles.

        Then the policies of its front are trained again, as often as the job asks for.

        Args:
            progress: Told how many trials are finished.
            after: Called between trials and while waiting for others; may raise to end the work.

        Raises:
            StorageError: The storage stays out of reach, or the disk is full.
        """
        is_over = False
        while True:
            after()
            trials = self._sweeper.sweep(self._study)
            if is_over or self._is_over(trials, progress):
                is_over = True
                if self._replicates.advance(progress, self._run_one):
                    return
            elif self._is_full(trials) or is_stopped(self._study):
                time.sleep(_POLL_S)
            elif self._n_per_pass == 1:
                self._run_one()
            else:
                self._run_pass()

    def _is_over(self, trials: Sequence[FrozenTrial], progress: Progress) -> bool:
        """Whether the search has ended: by its number of trials, its space, or its stop rule."""
        finished = [t for t in trials if t.state in FINISHED]
        done = len(measuring(finished))
        progress.update("trials", min(done, self._n_trials), self._n_trials)
        return done >= self._n_trials or is_exhausted(finished) or self._stop_rule.is_met(finished)

    def _is_full(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether as many policies as the job asks for are measured or being measured."""
        at_work = [t for t in trials if t.state in (TrialState.RUNNING, *FINISHED)]
        return len(measuring(at_work)) >= self._n_trials

    def _run_pass(self) -> None:
        """Draw policies until a pass is full, train them together, and tell their results."""
        drawn: list[tuple[Trial, Policy]] = []
        with ExitStack() as leases:
            try:
                for _ in range(_DRAWS_PER_NETWORK * self._n_per_pass):
                    if len(drawn) == self._n_per_pass:
                        break
                    if self._is_full(self._study.get_trials(deepcopy=False)):
                        break
                    trial = self._study.ask()
                    self._running.add(trial.number)
                    leases.enter_context(self._lease.held(trial))
                    is_replicate = REPLICATE_SEED in trial.user_attrs
                    answer = self._objective if is_replicate else self._objective.settle
                    found = self._tell(trial, partial(answer, trial))
                    if isinstance(found, Policy):
                        drawn.append((trial, found))
                if not drawn:
                    return
                results = self._session.measure_together([policy for _, policy in drawn])
                for (trial, _), result in zip(drawn, results, strict=True):
                    self._tell(trial, partial(self._objective.finish, trial, result))
            except BaseException as error:
                self._hand_back(self._running)
                self._explain(error)
                raise
            finally:
                self._running.clear()

    def _tell(
        self, trial: Trial, ask: Callable[[], Policy | tuple[float, ...]]
    ) -> Policy | tuple[float, ...] | None:
        """Tell the study what `ask` says of a trial, unless that is a policy to measure."""
        try:
            try:
                found = ask()
            except optuna.TrialPruned:
                self._study.tell(trial, state=TrialState.PRUNED)
                return None
            if not isinstance(found, Policy):
                self._study.tell(trial, found)
        except (UpdateFinishedTrialError, ValueError) as error:
            if not _was_taken(error):
                raise
            return None
        return found

    def _run_one(self) -> None:
        running: list[int] = []

        def objective(trial: Trial) -> tuple[float, ...]:
            running.append(trial.number)
            with self._lease.held(trial), self._checkpoints.dropped_after(trial):
                return self._objective(trial)

        try:
            self._study.optimize(objective, n_trials=1)
        except (UpdateFinishedTrialError, ValueError) as error:
            if not _was_taken(error):
                raise
        except UnboundLocalError as error:  # Optuna's, where Ctrl-C comes while it tells a result
            self._hand_back(running)
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise
        except (KeyboardInterrupt, OSError, SafetensorError, ParallelError) as error:
            self._hand_back(running)
            self._explain(error)
            raise

    def _hand_back(self, running: Collection[int]) -> None:
        """Fail trials that are not told yet, and queue their policies again, for others."""
        trials = self._study.get_trials(deepcopy=False)
        for number in running:
            give_up(self._study, trials[number])

    def _explain(self, error: BaseException) -> None:
        """Say what to do where the disk is full."""
        if isinstance(error, SafetensorError) or (
            isinstance(error, OSError) and disk_is_out(error)
        ):
            msg = (
                f"A trial needs room for its weights, but {self._session.folder} has none: "
                f"{error}. Make room and start again; nothing finished is lost."
            )
            raise StorageError(msg) from error

    def _share(self, trial: Trial, result: TrialResult) -> None:
        """Upload a complete trial's weights and write its page, before its result is told."""
        if self._store is not None and result.state == "complete":
            file = self._session.weights_file(result.policy)
            if file.exists():
                trial.set_user_attr(WEIGHTS, upload(self._store, file, trial))
        self._pages.write(trial, result)

    def _look_about(self, trial: Trial) -> None:
        self._sweeper.sweep(self._study, mine={trial.number, *self._running})


def n_measured(study: Study) -> int:
    """Return how many policies of a study are finished."""
    return len(measuring(study.get_trials(deepcopy=False, states=FINISHED)))


def is_exhausted(finished: Sequence[FrozenTrial]) -> bool:
    """Whether the last many draws of a study brought nothing new, by its finished trials."""
    last = [t for t in finished if REPLICATE_SEED not in t.user_attrs][-_MAX_IDLE_DRAWS:]
    return len(last) == _MAX_IDLE_DRAWS and not measuring(last)


def collect(study: Study, session: Session) -> None:
    """Bring what workers elsewhere measured into the session's folder.

    Every result comes, of the weights those of the front and of the baselines.

    Raises:
        StorageError: An artifact is missing or damaged.
    """
    trials = measuring(study.get_trials(deepcopy=False, states=FINISHED))
    results = {t.number: r for t in trials if (r := result_of(t)) is not None}
    for result in [*results.values(), *replicated(study)]:
        session.adopt(result)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    directions = [axis.direction for axis in session.plan.job.search.axes]
    on_front = {complete[i].number for i in front_indices([t.values for t in complete], directions)}
    for trial in complete:
        is_baseline = trial.user_attrs.get("origin", "").startswith("uniform ")
        file = session.weights_file(results[trial.number].policy)
        if (trial.number in on_front or is_baseline) and not file.exists():
            download(store_of(study), trial.user_attrs[WEIGHTS], file)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's line per trial and its notes on experimental features; ours are shown."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)


def _was_taken(error: Exception) -> bool:
    """Whether a trial was given to others while this process ran it."""
    return isinstance(error, UpdateFinishedTrialError) or "Cannot tell a" in str(error)
