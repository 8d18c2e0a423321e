"""Optuna's journal file, made safe against interruption at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from adq_search.plugins._interrupts import uninterrupted
from adq_search.plugins._outages import disk_is_out, wait_out

#: A writer killed while it held the journal's lock keeps others out this long; appending takes
#: milliseconds.
_LOCK_GRACE_S = 10
_CHUNK = 65_536


def open_journal(file: Path) -> JournalStorage:
    """Open a journal file as a storage; made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(file), grace_period=_LOCK_GRACE_S)
    return JournalStorage(_WholeAppends(str(file), lock))


class _WholeAppends(JournalFileBackend):
    """A backend whose lines are whole, whatever happens to their writers.

    Ctrl-C waits until an append is done and its lock released. Optuna reads no further than a
    damaged line, so a half one that a killed writer left is cut off by the next writer, and one
    that did not fit on the disk by its own, who then waits for room.
    """

    def __init__(self, file: str, lock: JournalFileSymlinkLock) -> None:
        super().__init__(file, lock_obj=lock)
        self._file = Path(file)
        self._append_lock = lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        wait_out(lambda: self._append(text.encode()), disk_is_out)

    def _append(self, lines: bytes) -> None:
        with uninterrupted(), self._locked(), self._file.open("r+b", buffering=0) as journal:
            end = _cut_half_line(journal)
            try:
                _write_all(journal, lines)
                os.fsync(journal.fileno())
            except OSError:
                journal.truncate(end)
                raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._append_lock.acquire()
        try:
            yield
        finally:
            self._append_lock.release()


def _write_all(file: Any, content: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _cut_half_line(journal: Any) -> int:
    """Truncate a file behind its last line break, and return that position, in bytes."""
    size = end = journal.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _CHUNK)
        journal.seek(start)
        found = journal.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        journal.truncate(end)
    journal.seek(end)
    return int(end)
