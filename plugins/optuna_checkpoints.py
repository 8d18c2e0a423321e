"""Checkpoints of running trials in the study's artifact store: any machine goes on with them.

The latest one of a trial is named by its user attribute `checkpoint`. A trial that is queued again
after its worker died carries the attribute over; who takes it up fetches the file first.
"""

from __future__ import annotations

import hashlib
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from adq_search.checkpoint import TrainingCheckpoint, read_checkpoint
from adq_search.errors import AdqSearchWarning, StorageError
from adq_search.plugins.optuna_artifacts import download
from adq_search.plugins.optuna_lease import CHECKPOINT
from adq_search.policy import Policy
from adq_search.session import Session

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore


class SharedCheckpoints:
    """Where the trials of a study save themselves, for whoever may have to finish them.

    Args:
        session: Its folder holds the file of a running trial.
        store: Holds a copy, for other machines; None where all workers see the folder.
    """

    def __init__(self, session: Session, store: ArtifactStore | None) -> None:
        self._session = session
        self._store = store

    def of(self, trial: Trial, policy: Policy, seed: int | None = None) -> TrainingCheckpoint:
        """Return where a trial saves itself; what a lost trial left of the policy is fetched.

        Warns (`AdqSearchWarning`) where that cannot be fetched; training begins anew then.

        Args:
            trial: The running trial.
            policy: What it measures.
            seed: Of a replicate; None for the job's.
        """
        file = self._session.checkpoint_file(policy, seed=seed)
        left = trial.user_attrs.get(CHECKPOINT, {})
        if self._store is not None and "artifact_id" in left and left["epochs"] > _epochs_in(file):
            try:
                download(self._store, left, file)
            except Exception as error:  # whatever the client of a store raises
                msg = f"{error} Trial {trial.number} begins anew, not from its checkpoint."
                warnings.warn(msg, AdqSearchWarning, stacklevel=2)
        share = partial(self._share, trial, file)
        return self._session.checkpoint_of(policy, seed=seed, on_saved=share)

    @contextmanager
    def dropped_after(self, trial: Trial) -> Iterator[None]:
        """Remove a trial's checkpoint from the store once its result is written into it."""
        try:
            yield
        finally:
            if "result" in trial.user_attrs:
                self._drop(trial.user_attrs.get(CHECKPOINT, {}))

    def _share(self, trial: Trial, file: Path, epochs: int) -> None:
        """Copy the file that was just written into the store, and drop the one before.

        Raises:
            UpdateFinishedTrialError: The trial was given to others, and this process trains alone.
        """
        before = trial.user_attrs.get(CHECKPOINT, {})
        found = self._put(file)
        if found is None:
            return
        try:
            trial.set_user_attr(CHECKPOINT, {"epochs": epochs, **found})
        except UpdateFinishedTrialError:
            self._drop(found)
            if self._session.ranks.size == 1:
                raise
            return  # other processes are in the middle of the training: it ends as it would
        self._drop(before)

    def _put(self, file: Path) -> dict[str, str] | None:
        """Copy a file into the store, if there is one; return how to find it again.

        Warns (`AdqSearchWarning`) and returns None where that fails.
        """
        if self._store is None:
            return {}
        artifact = f"checkpoint-{uuid.uuid4()}"
        try:
            with file.open("rb") as content:
                self._store.write(artifact, content)
        except Exception as error:  # whatever the client of a store raises
            msg = (
                f"The checkpoint {file.name} cannot be copied to the artifact store: {error}. "
                "Should this machine be lost, its trial goes on from an earlier one."
            )
            warnings.warn(msg, AdqSearchWarning, stacklevel=2)
            return None
        return {"artifact_id": artifact, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}

    def _drop(self, found: Mapping[str, Any]) -> None:
        if self._store is not None and "artifact_id" in found:
            with suppress(Exception):  # what stays behind takes room and does no harm
                self._store.remove(found["artifact_id"])


def _epochs_in(file: Path) -> int:
    """Return how far a checkpoint of this machine is; 0 where there is none, or no whole one."""
    try:
        return len(read_checkpoint(file)[0].losses)
    except (StorageError, FileNotFoundError):
        return 0
