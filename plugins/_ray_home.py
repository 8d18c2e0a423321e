"""The folder of a search as its trials see it, on whatever node they run.

An actor on the driver's machine reads the folder for them: whether a policy is measured already,
and the files of the donor that a warm trial begins from. It needs no processor of its own, and ends
with the driver.
"""

from __future__ import annotations

import functools
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


@dataclass(frozen=True)
class Measured:
    """A policy's result.

    Attributes:
        result: What was measured; of any state.
        train_losses: Mean training loss of each epoch; empty where another host measured it.
    """

    result: TrialResult
    train_losses: tuple[float, ...]


class Home:
    """Answers for a session's folder.

    Args:
        folder: Absolute.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def measured(self, policy_hash: str) -> Measured | None:
        """Return what was measured of a policy with the job's seed, None if nothing was."""
        file = self._folder / "trials" / f"{policy_hash}.json"
        if not file.exists():
            return None
        result = TrialResult.from_json(read_json(file, StorageError, what="trial"))
        record = record_of(self._folder, policy_hash)
        return Measured(result, () if record is None else record.train_losses)

    def donor(self, policy: Policy) -> DonorFiles | None:
        """Return whose weights a policy's trials begin from, None for the teacher's.

        Raises:
            StorageError: The donor's result or weights are gone.
        """
        return donor_files(self._folder, policy)


def serve(folder: Path) -> None:
    """Let the trials of this driver ask about a folder, until Ray is shut down."""
    context = ray.get_runtime_context()
    _served(_name_of(str(folder.resolve())), str(folder.resolve()), context.get_node_id())


def measured_at_home(home: str, policy_hash: str) -> Measured | None:
    """Return what was measured of a policy; None also where nobody answers for the folder.

    Args:
        home: The folder, as the driver sees it; absolute.
        policy_hash: Of the policy.
    """
    try:
        answer: Measured | None = _ask(home, "measured", policy_hash)
    except _UnansweredError:
        return None
    return answer


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


def _ask(home: str, question: str, about: str | Policy) -> Any:
    """Put a question to the actor of a folder; what it raises there is raised here."""
    try:
        actor = ray.get_actor(_name_of(home))
        return ray.get(getattr(actor, question).remote(about))
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
