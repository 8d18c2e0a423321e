"""The Ray trials of a session, as files in its folder: one record for each policy.

A record is written when its trial starts, and its result joins the session's other results when it
ends. What has a record and no result was interrupted. Nothing here is unpickled: the folder and
the trials' checkpoints say all that a resumption needs.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from adq_search.donors import note_donor
from adq_search.errors import AdqSearchError, StorageError
from adq_search.files import read_json, write_atomic, write_json
from adq_search.hosting import HostedTrial
from adq_search.pareto import front_indices
from adq_search.plugins._ray_installed import arrow_files, tune
from adq_search.session import Session
from adq_search.stopping import FalseStops
from adq_search.trial import TrialResult, fingerprint_of

_FOLDER = "ray_trials"
#: What a full disk and a full quota say to who writes.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class RayRecord:
    """A Ray trial.

    Attributes:
        policy_hash: What it measures; names the record.
        number: In the order in which policies were first tried.
        trial_id: Ray's name of the last attempt.
        place: Folder of that attempt's checkpoints, below the experiment's storage path.
        parameters: What was drawn.
        origin: Who proposed the policy.
        worker: Host and process that run it, once it has reported.
        started_at: ISO 8601, UTC, of the first attempt.
        train_losses: Mean training loss of each epoch, once it has ended.
        condemned: Whether a `FrontScheduler` gave it up; it may have been spared all the same.
    """

    policy_hash: str
    number: int
    trial_id: str
    place: str
    parameters: dict[str, Any]
    origin: str
    worker: str
    started_at: str
    train_losses: tuple[float, ...] = ()
    condemned: bool = False


def records_of(folder: Path) -> list[RayRecord]:
    """Return the records in a session's folder, by their numbers.

    Raises:
        StorageError: One of them is damaged.
    """
    found = [_read_record(file) for file in (folder / _FOLDER).glob("*.json")]
    return sorted(found, key=lambda record: record.number)


def record_of(folder: Path, policy_hash: str) -> RayRecord | None:
    """Return the record of the policy with this hash, None where it has none.

    Raises:
        StorageError: It is damaged.
    """
    file = _record_file(folder, policy_hash)
    return _read_record(file) if file.exists() else None


def write_record(folder: Path, record: RayRecord) -> None:
    """Write a record, in the place of the policy's earlier one."""
    write_json(_record_file(folder, record.policy_hash), asdict(record))


def remove_record(folder: Path, record: RayRecord) -> None:
    """Remove the record of a trial that measured nothing."""
    _record_file(folder, record.policy_hash).unlink(missing_ok=True)


def hosted_trials(session: Session) -> tuple[HostedTrial, ...]:
    """Return every trial that has a record and a result."""
    return tuple(
        HostedTrial(
            number=record.number,
            parameters=record.parameters,
            result=result,
            origin=record.origin,
            worker=record.worker,
            started_at=record.started_at,
        )
        for record in records_of(session.folder)
        if (result := session.result_of_hash(record.policy_hash)) is not None
    )


def measured_records(session: Session) -> list[tuple[TrialResult, tuple[float, ...]]]:
    """Return the results of all records that have one, with their training losses."""
    return [
        (result, record.train_losses)
        for record in records_of(session.folder)
        if (result := session.result_of_hash(record.policy_hash)) is not None
    ]


def false_stops(session: Session) -> FalseStops | None:
    """Return what became of condemned trials; None where the job asks for no pruner."""
    if session.plan.job.search.pruner == "none":
        return None
    condemned = {r.policy_hash for r in records_of(session.folder) if r.condemned}
    complete = [r for r, _ in measured_records(session) if r.state == "complete"]
    directions = [axis.direction for axis in session.plan.job.search.axes]
    front = front_indices([session.plan.values(r) for r in complete], directions)
    spared = {result.policy.hash for result in complete} & condemned
    n_on_front = len(spared & {complete[i].policy.hash for i in front})
    return FalseStops(len(condemned), len(spared), n_on_front)


def adopt(
    session: Session, checkpoint: tune.Checkpoint, policy_hash: str, *, seed: int | None = None
) -> TrialResult:
    """Bring a trial's result and weights from its checkpoint into the session's folder.

    Args:
        session: The prepared job.
        checkpoint: The trial's last one.
        policy_hash: What it measured.
        seed: Of a replicate, which has no weights; None for the job's.

    Raises:
        StorageError: They are not there, or damaged.
    """
    with checkpoint.as_directory() as name:
        there = replace(session, folder=Path(name))
        result = there.result_of_hash(policy_hash, seed=seed)
        if result is None or result.policy.hash != policy_hash:
            msg = f"The checkpoint {checkpoint.path} has no result of policy {policy_hash}."
            raise StorageError(msg)
        if result.state == "complete" and seed is None:
            source = there.weights_file(result.policy)
            _check_weights(source, result)
            write_atomic(session.weights_file(result.policy), lambda path: _copy(source, path))
    if session.plan.job.training.warm_start and seed is None:
        note_donor(session.folder, result.policy, result.donor)
    session.adopt(result)
    return result


class TrialStore:
    """The storage path of Ray experiments: a folder, or a URI that Arrow reads.

    Args:
        place: Where it is.

    Raises:
        StorageError: It is no such place.
    """

    def __init__(self, place: str) -> None:
        try:
            self._files, self._root = arrow_files.FileSystem.from_uri(place)
        except (OSError, ValueError) as error:
            msg = f"Ray cannot reach the storage {place}: {error}. Give a folder or s3://bucket."
            raise StorageError(msg) from error

    def checkpoints(self, record: RayRecord) -> Iterator[tune.Checkpoint]:
        """Yield the checkpoints of a trial, the last first."""
        place = arrow_files.FileSelector(f"{self._root}/{record.place}", allow_not_found=True)
        for found in sorted(self._files.get_file_info(place), key=lambda f: f.base_name)[::-1]:
            if found.base_name.startswith("checkpoint_"):
                yield tune.Checkpoint(found.path, filesystem=self._files)


def reconcile(session: Session, store: TrialStore) -> dict[str, tune.Checkpoint]:
    """Make every Ray trial one record, and every result one of a trial.

    A result that a trial left in the storage, and a killed driver did not bring home, is brought.
    A result of another host, which has no record, gets one.

    Returns:
        The last checkpoint of each interrupted trial that has one, by the hash of its policy.

    Raises:
        OSError: There is no room for a result.
    """
    checkpoints: dict[str, tune.Checkpoint] = {}
    records = records_of(session.folder)
    for record in records:
        if session.result_of_hash(record.policy_hash) is None:
            for checkpoint in store.checkpoints(record):
                try:
                    adopt(session, checkpoint, record.policy_hash)
                except (AdqSearchError, OSError) as error:
                    if isinstance(error, OSError) and error.errno in _FULL:
                        raise
                    # Of an unfinished trial, or half-written.
                    checkpoints.setdefault(record.policy_hash, checkpoint)
                else:
                    checkpoints.pop(record.policy_hash, None)
                    break
    recorded = {record.policy_hash for record in records}
    number = max((record.number for record in records), default=-1)
    for file in sorted((session.folder / "trials").glob("*.json")):
        result = session.result_of_hash(file.stem)
        if file.stem not in recorded and result is not None:
            number += 1
            params = session.plan.space.params_of(result.policy)
            origin = session.origin_of(result.policy)
            record = RayRecord(file.stem, number, "", "", dict(params), origin, "", "")
            write_record(session.folder, record)
    return checkpoints


def _record_file(folder: Path, policy_hash: str) -> Path:
    return folder / _FOLDER / f"{policy_hash}.json"


def _read_record(file: Path) -> RayRecord:
    content = read_json(file, StorageError, what="Ray trial")
    try:
        record = RayRecord(**content)
    except TypeError as error:
        msg = (
            f"The Ray trial {file} was written by another version ({error}). Remove the "
            f"folder {file.parent} to go on from the results alone."
        )
        raise StorageError(msg) from error
    return replace(record, train_losses=tuple(record.train_losses))


def _check_weights(file: Path, result: TrialResult) -> None:
    """Refuse weights that are not those that were measured."""
    try:
        found = fingerprint_of(load_file(file))
    except (OSError, SafetensorError) as error:
        msg = f"The weights {file} cannot be read: {error}."
        raise StorageError(msg) from error
    if found != result.weights_fingerprint:
        msg = f"The weights {file} are not those that were measured."
        raise StorageError(msg)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
