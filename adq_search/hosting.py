"""What a host of the search is asked, and what it gives back: the seam to Optuna and Ray."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from adq_search.errors import StorageError
from adq_search.plan import Plan
from adq_search.progress import Progress
from adq_search.session import Session
from adq_search.stopping import FalseStops, SearchEnd
from adq_search.trial import TrialResult

_LOCK = "run.lock"
#: Who looks whether a lock is held holds it for an instant: a run tries again.
_TRIES, _PAUSE_S = 3, 0.05


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What the user asks of a host.

    Attributes:
        study: Name of the study in its storage.
        storage: URL of the storage; None for a file in the session's folder.
        workers: Processes that run trials at once; 0 for as many as a cluster has room for.
        resume: Go on with a study that exists.
        artifacts: Where workers elsewhere find weights: a folder or `s3://bucket`; None for a
            folder in the session's.
        dashboard: Write notes, files and figures for optuna-dashboard; None does where it is
            installed.
        address: Of a Ray cluster, or `auto`; None for this machine alone.
        cpus_per_trial: Processors that a Ray trial reserves.
        gpus_per_trial: GPUs that a Ray trial reserves; a fraction shares one.
    """

    study: str
    storage: str | None = None
    workers: int = 1
    resume: bool = False
    artifacts: str | None = None
    dashboard: bool | None = None
    address: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0


@dataclass(frozen=True)
class HostedTrial:
    """One policy that a host had measured.

    Attributes:
        number: The host's number of the trial.
        parameters: What the host drew, by parameter name.
        result: What was measured.
        origin: Who proposed the policy.
        worker: Which process ran it.
        started_at: ISO 8601, UTC.
    """

    number: int
    parameters: dict[str, Any]
    result: TrialResult
    origin: str
    worker: str = ""
    started_at: str = ""


@dataclass(frozen=True)
class HostOutcome:
    """Everything a host ran.

    Attributes:
        trials: One for each distinct policy measured, in the order of their numbers.
        n_rejected: Draws over budget, refused before training.
        n_repeated: Draws of a policy that was measured already.
        end: Why the search ended before its last trial; None where it did not.
        false_stops: What became of trials that a pruner condemned; None where none was at work.
    """

    trials: tuple[HostedTrial, ...]
    n_rejected: int = 0
    n_repeated: int = 0
    end: SearchEnd | None = None
    false_stops: FalseStops | None = None


class Host(Protocol):
    """An AutoML system that runs the search: proposes parameters, keeps results."""

    def check(self, plan: Plan, folder: Path, options: HostOptions) -> None:
        """Refuse, before any training, a study that exists unasked or belongs to another job."""
        ...

    def run(self, session: Session, options: HostOptions, progress: Progress) -> HostOutcome:
        """Measure policies until the job's number of trials is reached."""
        ...


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder's lock: two runs in one folder would take each other's trials for dead.

    Raises:
        StorageError: Another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        if not any(_takes(lock, fcntl.LOCK_EX) for _ in range(_TRIES)):
            msg = f"Another run is at work in {folder}. Wait for it, or choose another --out."
            raise StorageError(msg)
        yield


def is_at_work(folder: Path) -> bool:
    """Whether a run holds a folder's lock, as far as this machine can see."""
    if not (folder / _LOCK).exists():
        return False
    with (folder / _LOCK).open() as lock:
        return not _takes(lock, fcntl.LOCK_SH)


def _takes(lock: TextIO, kind: int) -> bool:
    """Take a lock that is free; say whether it was, after a pause where it was not."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        time.sleep(_PAUSE_S)
        return False
    return True
