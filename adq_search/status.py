"""Studies that several processes share: how one stands, and what a host must do to offer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from adq_search.hosting import Host, HostedTrial
from adq_search.job import Job
from adq_search.parallel import ALONE, Ranks
from adq_search.progress import Progress
from adq_search.report import select_front
from adq_search.report.indicators import hypervolume_of
from adq_search.results import record_of


@dataclass(frozen=True)
class CurrentPoint:
    """One policy of the front so far.

    Attributes:
        number: Its trial.
        policy_hash: Its name in the results.
        values: Objectives by name.
        origin: Who proposed it.
    """

    number: int
    policy_hash: str
    values: dict[str, float]
    origin: str


@dataclass(frozen=True)
class StudyStatus:
    """How a study stands.

    Attributes:
        study: Its name.
        n_trials: Policies that were asked for.
        n_finished: Policies that were measured.
        counts: Trials by what became of them: `complete`, `diverged`, `stopped`, `running`,
            `waiting`, `failed`, and draws not measured by their reason.
        workers: Processes at work, each by host and process number.
        hypervolume: Share of the space of objectives that the front dominates, 0 to 1, as in
            `front.json`; None while there is no reference point.
        seconds_per_trial: Mean wall seconds of a finished trial.
        eta_s: Seconds until all are finished if the workers stay; None while nobody works or
            nothing is finished.
        front: The front so far, cheapest first.
    """

    study: str
    n_trials: int
    n_finished: int
    counts: dict[str, int]
    workers: tuple[str, ...]
    hypervolume: float | None
    seconds_per_trial: float | None
    eta_s: float | None
    front: tuple[CurrentPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON content."""
        return {"schema": "adq_search.status/1", **asdict(self)}


@runtime_checkable
class SharingHost(Host, Protocol):
    """A host whose studies others can join and look at."""

    def work(
        self,
        storage: str,
        study: str,
        folder: Path,
        progress: Progress,
        *,
        ranks: Ranks = ALONE,
    ) -> int:
        """Join a running study; return how many policies it has measured in the end."""
        ...

    def status(self, storage: str, study: str) -> StudyStatus:
        """Look at a study without touching it."""
        ...


@runtime_checkable
class WatchedHost(Host, Protocol):
    """A host whose searches can be looked at in their folders."""

    def status_in(self, folder: Path) -> StudyStatus:
        """Look at the search in a folder without touching it."""
        ...


def study_status(
    study: str,
    job: Job,
    trials: Sequence[HostedTrial],
    *,
    counts: Mapping[str, int],
    workers: Sequence[str],
    is_over: bool = False,
) -> StudyStatus:
    """Compute a study's status.

    Args:
        study: Its name.
        job: What it searches.
        trials: The finished ones that measured a policy.
        counts: Trials by what became of them.
        workers: Processes at work.
        is_over: Whether the search ended before its last trial.
    """
    search = job.search
    records = [record_of(trial) for trial in trials]
    front = select_front(records, search.axes, search.budgets)
    volume = hypervolume_of(records, search.axes, search.budgets)
    mean_s = sum(r.wall_s for r in records) / len(records) if records else None
    left = 0 if is_over else max(0, search.trials - len(records))
    if left == 0:
        eta_s: float | None = 0.0
    else:
        eta_s = None if mean_s is None or not workers else left * mean_s / len(workers)
    return StudyStatus(
        study=study,
        n_trials=search.trials,
        n_finished=len(records),
        counts=dict(counts),
        workers=tuple(workers),
        hypervolume=None if volume is None else volume.share,
        seconds_per_trial=mean_s,
        eta_s=eta_s,
        front=tuple(
            CurrentPoint(
                number=r.number,
                policy_hash=r.policy_hash,
                values={axis.name: r.value(axis.name) for axis in search.axes},
                origin=r.origin,
            )
            for r in front
        ),
    )
