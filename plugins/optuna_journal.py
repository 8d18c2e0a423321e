"""Optuna's journal file, made safe against interruption at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from adq_search.plugins._interrupts import uninterrupted

#: A writer killed while it held the journal's lock keeps others out this long; appending takes
#: milliseconds.
_LOCK_GRACE_S = 10


def open_journal(file: Path) -> JournalStorage:
    """Open a journal file as a storage; made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(file), grace_period=_LOCK_GRACE_S)
    return JournalStorage(_WholeAppends(str(file), lock_obj=lock))


def mend_journal(file: Path) -> None:
    """Cut off a last line that a killed writer left unfinished.

    Optuna appends whole lines and reads no further than a damaged one, so a half-written last
    line would make every later one unreadable. Call it only while nobody writes.
    """
    with file.open("r+b") as journal:
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            journal.truncate(whole)


class _WholeAppends(JournalFileBackend):
    """A backend whose appends Ctrl-C does not cut in two.

    An interrupt between taking and releasing the file's lock would leave the lock behind, or
    surface as an error of the lock instead of as an interrupt.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with uninterrupted():
            super().append_logs(logs)
