"""A session as bytes in Ray's object store, for workers that see no file of the driver's."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adq_search.plugins._code import check_code, code_fingerprint
from adq_search.plugins._ray_installed import cloudpickle
from adq_search.session import Session


@dataclass(frozen=True)
class Parcel:
    """A packed session: plan, data and teacher.

    As an array the bytes stay in shared memory, where every process of a machine opens them.

    Attributes:
        name: SHA-256 of the content.
        task: The task's name, or `package.module:factory`.
        code: Fingerprint of the code that packed it.
        home: The session's folder on the machine that packed it; absolute.
        content: The session, # shape: (bytes,)
    """

    name: str
    task: str
    code: str
    home: str
    content: NDArray[np.uint8] = field(compare=False, repr=False)

    @classmethod
    def of(cls, session: Session) -> Parcel:
        """Pack a session."""
        content = cloudpickle.dumps(session)  # type: ignore[no-untyped-call]
        task = session.plan.job.task
        name = hashlib.sha256(content).hexdigest()
        home = str(session.folder.resolve())
        return cls(name, task, code_fingerprint(task), home, np.frombuffer(content, dtype=np.uint8))


@functools.lru_cache(maxsize=1)
def opened(parcel: Parcel) -> Session:
    """Unpack a parcel, once in a process for all its trials. Its folder is the driver's.

    Raises:
        StorageError: This process has other code than the one that packed it.
    """
    check_code(parcel.code, code_fingerprint(parcel.task), where="search")
    session: Session = cloudpickle.loads(parcel.content.data)
    return session
