"""The folder of a search as its trials see it, on whatever node they run.

An actor on the driver's machine answers for it: whether a policy is measured already, or another
trial's to measure now, and the files of the donor that a warm trial begins from. It needs no
processor of its own, and ends with the driver.
"""

from __future__ import annotations

import enum
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adq_search.donors import DonorFiles, donor_files
from adq_search.errors import StorageError
from adq_search.files import read_json
from adq_search.plugins._ray_installed import (
    NodeAffinitySchedulingStrategy,
    RayActorError,
    RayTaskError,
    ray,
)
from adq_search.plugins._ray_records import record_of
from adq_search.policy import Policy
from adq_search.trial import TrialResult

#: Seconds after which a trial asks again for a policy that another one measures.
_POLL_S = 0.2


@dataclass(frozen=True)
class Measured:
    """A policy's result.

    Attributes:
        result: What was measured; of any state.
        train_losses: Mean training loss of each epoch; empty where another host measured it.
    """

    result: TrialResult
    train_losses: tuple[float, ...]


class Turn(enum.Enum):
    """Whose turn it is to measure a policy that has no result."""

    OURS = enum.auto()
    OTHERS = enum.auto()


class Home:
    """Answers for a session's folder.

    Args:
        folder: Absolute.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._measured_by: dict[str, str] = {}

    def give(self, policy_hash: str, trial_id: str) -> None:
        """Leave a policy to one trial; others that draw it wait for its result."""
        self._measured_by[policy_hash] = trial_id

    def give_back(self) -> None:
        """Forget who measures what: no trial runs."""
        self._measured_by.clear()

    def measured(self, policy_hash: str, trial_id: str) -> Measured | Turn:
        """Return what was measured of a policy with the job's seed; if nothing was, whose turn.

        Args:
            policy_hash: Of the policy.
            trial_id: Of the trial that asks.
        """
        file = self._folder / "trials" / f"{policy_hash}.json"
        if not file.exists():
            is_ours = self._measured_by.get(policy_hash, trial_id) == trial_id
            return Turn.OURS if is_ours else Turn.OTHERS
        result = TrialResult.from_json(read_json(file, StorageError, what="trial"))
        record = record_of(self._folder, policy_hash)
        return Measured(result, () if record is None else record.train_losses)

    def donor(self, policy: Policy) -> DonorFiles | None:
        """Return whose weights a policy's trials begin from, None for the teacher's.

        Raises:
            StorageError: The donor's result or weights are gone.
        """
        return donor_files(self._folder, policy)


def serve(folder: Path) -> Any:
    """Let the trials of this driver ask about a folder, until Ray is shut down.

    Returns:
        The actor that answers.
    """
    context = ray.get_runtime_context()
    return _served(_name_of(str(folder.resolve())), str(folder.resolve()), context.get_node_id())


def measured_at_home(home: str, policy_hash: str, trial_id: str) -> Measured | None:
    """Return what was measured of a policy, once no other trial is at it.

    None where it is this trial's to measure, as where nobody answers for the folder.

    Args:
        home: The folder, as the driver sees it; absolute.
        policy_hash: Of the policy.
        trial_id: Of the trial that asks.
    """
    try:
        while (answer := _ask(home, "measured", policy_hash, trial_id)) is Turn.OTHERS:
            time.sleep(_POLL_S)
    except _UnansweredError:
        return None
    return answer if isinstance(answer, Measured) else None


def donor_at_home(home: str, policy: Policy) -> DonorFiles | None:
    """Return the files of a policy's donor, None where it begins from the teacher.

    Args:
        home: The folder, as the driver sees it; absolute.
        policy: What is to be trained.

    Raises:
        StorageError: The donor's files are gone, or nobody answers for the folder.
    """
    answer: DonorFiles | None = _ask(home, "donor", policy)
    return answer


class _UnansweredError(StorageError):
    """Nobody answers for a folder."""


@functools.cache
def _served(name: str, folder: str, node: str) -> Any:
    """Start an actor on a node and return its handle, which is kept: the actor lives by it."""
    actor = ray.remote(Home).options(
        name=name,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return actor.remote(folder)


def _ask(home: str, question: str, *about: str | Policy) -> Any:
    """Put a question to the actor of a folder; what it raises there is raised here."""
    try:
        actor = ray.get_actor(_name_of(home))
        return ray.get(getattr(actor, question).remote(*about))
    except RayTaskError as error:
        raise error.cause from error
    except (ValueError, RayActorError) as error:
        msg = (
            f"Trials must be able to ask about the search's folder, but nobody answers for {home}. "
            "Give the Tuner the callback SessionRecorder(session)."
        )
        raise _UnansweredError(msg) from error


def _name_of(folder: str) -> str:
    """Return the actor's name: drivers may share a namespace, and machines the path of a folder."""
    return f"adq_search {ray.get_runtime_context().get_job_id()} {folder}"
