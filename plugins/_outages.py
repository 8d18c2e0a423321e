"""Waiting until something that is out of reach answers again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from adq_search.errors import StorageError

#: How long a worker waits for a storage that does not answer.
PATIENCE_S = 600.0
#: What a full disk, a full quota and a network file system out of reach say.
_OF_DISKS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.ENOLCK,
}
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0

Answer = TypeVar("Answer")


def wait_out(
    call: Callable[[], Answer],
    is_outage: Callable[[Exception], bool],
    *,
    again: Callable[[], Answer] | None = None,
    patience_s: float = PATIENCE_S,
) -> Answer:
    """Return what `call` returns, trying again with doubling pauses while there is an outage.

    Args:
        call: Asks something that may be out of reach.
        is_outage: Whether an error says so; any other is raised at once.
        again: Called instead of `call` from the second time on.
        patience_s: Seconds after which the outage counts as lasting.

    Raises:
        StorageError: The outage lasted longer.
    """
    began, pause = time.monotonic(), _FIRST_WAIT_S
    while True:
        try:
            return call()
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() - began + pause > patience_s:
                detail = " ".join(str(error.__cause__ or error).split())[:300]
                msg = (
                    f"A storage must answer within {patience_s:g} s, but this one does not: "
                    f"{detail}. Bring it back and start again; nothing finished is lost."
                )
                raise StorageError(msg) from error
        time.sleep(pause)
        pause = min(2.0 * pause, _LONGEST_WAIT_S)
        call = again or call


def disk_is_out(error: BaseException) -> bool:
    """Whether an error says that a file system is full or out of reach."""
    return isinstance(error, OSError) and error.errno in _OF_DISKS
