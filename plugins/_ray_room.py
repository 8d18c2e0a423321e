"""Waiting for room: a search whose disk is full goes on once files can be written again."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from adq_search.errors import AdqSearchError, AdqSearchWarning, StorageError
from adq_search.plugins._outages import PATIENCE_S, disk_is_out

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0

Outcome = TypeVar("Outcome")


class DiskError(StorageError):
    """A disk of a search is full or out of reach."""


def despite_full_disks(
    attempt: Callable[[], Outcome], folder: Path, *, patience_s: float = PATIENCE_S
) -> Outcome:
    """Return what an attempt returns, trying again with doubling pauses while a disk is full.

    Args:
        attempt: Runs a search, or goes on with it, until it is over. A disk of any machine of the
            search may fail it.
        folder: Of the search: no attempt is made before it has room for a network.
        patience_s: Sum of the pauses, with nothing finished between them, after which the fault
            counts as lasting.

    Raises:
        StorageError: The fault lasted longer.
    """
    patience = _Patience(patience_s)
    while True:
        n_before = _n_finished(folder)
        try:
            with disks_watched():
                _check_room(folder)
                return attempt()
        except DiskError as error:
            told = str(error)  # and not the error, whose frames hold the lost experiment
        if _n_finished(folder) > n_before:
            patience = _Patience(patience_s)
        _warn(f"{told} Make room: the search waits for it, and goes on.")
        if not patience.pause():
            msg = (
                f"{told} Pauses of {patience_s:g} s in all brought no room. Make some, then give "
                "--resume; nothing finished is lost."
            )
            raise StorageError(msg)


@contextmanager
def disks_watched() -> Iterator[None]:
    """Raise every error that comes of a disk as a `DiskError`, but those that are told already."""
    try:
        yield
    except AdqSearchError:
        raise
    except Exception as error:
        if (fault := fault_of_disk(error)) is None:
            raise
        raise disk_error(fault) from error


def disk_error(fault: BaseException) -> DiskError:
    """Return the user's form of what a disk said."""
    told = " ".join(str(fault).split()).rstrip(".")
    return DiskError(f"A search must write its files, but a disk does not take them: {told}.")


def fault_of_disk(error: BaseException | None) -> BaseException | None:
    """Return what a disk said that an error comes of, None where none did; Tune wraps errors."""
    while error is not None and not _is_of_disk(error):
        error = error.__cause__ or error.__context__
    return error


class _Patience:
    """Pauses that double, up to a sum of seconds."""

    def __init__(self, patience_s: float) -> None:
        self._left_s = patience_s
        self._pause_s = _FIRST_PAUSE_S

    def pause(self) -> bool:
        """Pause; return False, at once, where no patience is left."""
        if self._pause_s > self._left_s:
            return False
        time.sleep(self._pause_s)
        self._left_s -= self._pause_s
        self._pause_s = min(2.0 * self._pause_s, _LONGEST_PAUSE_S)
        return True


def _is_of_disk(error: BaseException) -> bool:
    """Whether a file system raised an error; safetensors tells the number in its text alone."""
    is_of_writing = isinstance(error, SafetensorError) and "I/O error" in str(error)
    return is_of_writing or disk_is_out(error)


def _check_room(folder: Path) -> None:
    """Write as much as a network takes, and remove it."""
    n_bytes = (folder / "teacher.safetensors").stat().st_size
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(n_bytes))


def _n_finished(folder: Path) -> int:
    """Return how many trainings have a result in a session's folder."""
    return sum(len(list((folder / part).glob("*.json"))) for part in ("trials", "replicates"))


def _warn(told: str) -> None:
    with suppress(OSError):  # what is said may go to a file on the full disk
        warnings.warn(told, AdqSearchWarning, stacklevel=3)
