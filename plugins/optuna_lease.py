"""Who still works at which trial, and what becomes of the trials of workers that are gone.

A worker renews a lease: the user attribute `lease` of its trial, seconds since 1970 by its own
clock. Who judges compares leases with nothing but themselves, so clocks need not agree: a lease
that did not change for the grace period is over. On a database Optuna's heartbeats are judged
instead, which its own tools know too; there the lease only lets everybody see who is at work.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

LEASE = "lease"
WORKER = "worker"
#: User attribute of a trial that saved itself: the epochs it had, and where the file lies.
CHECKPOINT = "checkpoint"
#: Times a policy is queued again after its worker died without having got further; a policy that
#: kills its workers ends there.
MAX_RETRIES = 3
_TERMS = "adq_search.lease"
#: Number of the process namespace outside all containers (Linux, PROC_PID_INIT_INO).
_OUTERMOST = 0xEFFFFFFC
#: What a trial that is queued again takes over from the one that was lost.
_CARRIED = ("policy_hash", "result", "weights", CHECKPOINT)


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How often a worker says that it is alive, and how long its silence is borne.

    Attributes:
        interval_s: Seconds between two signs of life, at least 1.
        grace_s: Seconds of silence after which its trial is given to others.
    """

    interval_s: float = 15.0
    grace_s: float = 60.0

    def publish(self, study: Study) -> None:
        """Write the terms into the study, for all who join."""
        study.set_user_attr(_TERMS, asdict(self))

    @classmethod
    def of(cls, study_attrs: dict[str, Any]) -> Self:
        """Read a study's terms from its user attributes; the defaults where it has none."""
        return cls(**study_attrs.get(_TERMS, {}))


def worker_name() -> str:
    """Return what this process is called in the study: machine and process number."""
    return f"{_machine()}:{os.getpid()}"


def _machine() -> str:
    """Return a name that two processes share only if they see each other's process numbers.

    Containers of one host may share its name, but each has process numbers of its own: theirs are
    told apart by the namespace of their processes.
    """
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = _OUTERMOST
    name = socket.gethostname()
    return name if namespace == _OUTERMOST else f"{name}@{namespace}"


class Lease:
    """Holds the lease of the trial that this process runs.

    Args:
        terms: How often to renew.
    """

    def __init__(self, terms: LeaseTerms) -> None:
        self._terms = terms

    @contextmanager
    def held(self, trial: Trial) -> Iterator[None]:
        """Renew the trial's lease from another thread until the block is left."""
        trial.set_user_attr(WORKER, worker_name())
        done = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(trial, done), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()

    def _renew(self, trial: Trial, done: threading.Event) -> None:
        while not done.is_set():
            try:
                trial.set_user_attr(LEASE, round(time.time(), 1))
            except UpdateFinishedTrialError:
                return  # it was given to others; the worker notices when it tells its result
            done.wait(self._terms.interval_s)


class Sweeper:
    """Fails the trials of workers that are gone, and queues their policies again.

    Args:
        terms: How long silence is borne.
        has_heartbeats: Whether the storage keeps Optuna's heartbeats.
    """

    def __init__(self, terms: LeaseTerms, *, has_heartbeats: bool) -> None:
        self._terms = terms
        self._has_heartbeats = has_heartbeats
        self._seen: dict[int, tuple[Any, float]] = {}

    def sweep(self, study: Study, *, mine: Collection[int] = ()) -> list[FrozenTrial]:
        """Look at every running trial once.

        Args:
            study: The study.
            mine: Numbers of the trials that this process is running.

        Returns:
            All trials of the study, as they are afterwards: a database is slow to read them again.
        """
        if self._has_heartbeats:
            optuna.storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number not in mine]
        lost = [t for t in running if self._is_over(t)]
        for trial in lost:
            give_up(study, trial)
        return study.get_trials(deepcopy=False) if lost else trials

    def _is_over(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and is_gone(worker):
            return True
        if worker is not None and self._has_heartbeats:
            return False
        sign, now = (worker, trial.user_attrs.get(LEASE)), time.monotonic()
        before, since = self._seen.get(trial.number, (None, now))
        if before != sign:
            since = now
        self._seen[trial.number] = (sign, since)
        return now - since > self._terms.grace_s


def is_gone(worker: str) -> bool:
    """Whether a worker is known to have ended: a process of this machine that is no more.

    Of this process itself it is asked between two trials, so a trial in its name is another's.
    """
    host, _, process = worker.rpartition(":")
    if host != _machine():
        return False
    if int(process) == os.getpid():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def is_alive(trial: FrozenTrial, terms: LeaseTerms) -> bool:
    """Whether a running trial's worker seems to be at work, as far as one look can tell."""
    worker = trial.user_attrs.get(WORKER)
    if worker is None or (is_gone(worker) and worker != worker_name()):
        return False
    renewed = float(trial.user_attrs.get(LEASE, math.inf))
    return time.time() - renewed < terms.grace_s


def give_up(study: Study, trial: FrozenTrial) -> None:
    """Fail a trial that nobody finishes, unless it is finished, and queue its policy again."""
    try:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    except UpdateFinishedTrialError:
        return  # another process was faster
    if study.get_trials(deepcopy=False)[trial.number].state == TrialState.FAIL:
        requeue(study, trial)


def requeue(study: Study, trial: FrozenTrial) -> None:
    """Queue the policy of a lost trial again, with what it had measured if it had.

    Draws that were not to be measured, or whose policy was not known yet, are not missed.
    """
    attributes = trial.user_attrs
    epochs = attributes.get(CHECKPOINT, {}).get("epochs", 0)
    got_further = epochs > attributes.get("resumed_epochs", 0)
    retries = 1 if got_further else attributes.get("retries", 0) + 1
    is_missed = attributes.get("verdict") in (None, "measured") and "policy_hash" in attributes
    if not is_missed or retries > MAX_RETRIES:
        return
    parameters = trial.system_attrs.get("fixed_params") or trial.params
    carried = {key: attributes[key] for key in _CARRIED if key in attributes}
    counts = {"retries": retries, "resumed_epochs": epochs}
    study.enqueue_trial(parameters, user_attrs={**carried, **counts})
