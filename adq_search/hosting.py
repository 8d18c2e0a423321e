"""What a host of the search is asked, and what it gives back: the seam to Optuna and Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adq_search.plan import Plan
from adq_search.progress import Progress
from adq_search.session import Session
from adq_search.trial import TrialResult


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What the user asks of a host.

    Attributes:
        study: Name of the study in its storage.
        storage: URL of the storage; None for a file in the session's folder.
        workers: Processes that run trials at once.
        resume: Go on with a study that exists.
        artifacts: Where workers elsewhere find weights: a folder or `s3://bucket`; None for a
            folder in the session's.
    """

    study: str
    storage: str | None = None
    workers: int = 1
    resume: bool = False
    artifacts: str | None = None


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
    """

    trials: tuple[HostedTrial, ...]
    n_rejected: int = 0
    n_repeated: int = 0


class Host(Protocol):
    """An AutoML system that runs the search: proposes parameters, keeps results."""

    def check(self, plan: Plan, folder: Path, options: HostOptions) -> None:
        """Refuse, before any training, a study that exists unasked or belongs to another job."""
        ...

    def run(self, session: Session, options: HostOptions, progress: Progress) -> HostOutcome:
        """Measure policies until the job's number of trials is reached."""
        ...
