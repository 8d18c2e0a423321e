"""Which code a trial runs: workers of one study must agree on it."""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import adq_search
from adq_search.errors import StorageError

#: Rooms of the package that take no part in what a trial measures.
_APART = {"cli", "report", "export", "testing", "plugins", "search_spaces", "results.py"}


@functools.cache
def code_fingerprint(task: str) -> str:
    """Return 16 hexadecimal digits of the package's sources and of the task's own module.

    Taken once in a process: files that change later are not what it runs.

    Args:
        task: A task's name, or `package.module:factory`.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_sources(task)):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def check_code(stored: str, ours: str, *, where: str) -> None:
    """Refuse to measure with other code.

    Raises:
        StorageError: Names both fingerprints.
    """
    if stored != ours:
        msg = (
            f"The {where} is measured by other code than this worker's: {stored} there, {ours} "
            f"here (adq-search {version('adq-search')}, and the task's module). Install the same "
            "version as the run's."
        )
        raise StorageError(msg)


def _sources(task: str) -> Iterator[tuple[str, Path]]:
    root = Path(adq_search.__file__).parent
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        if relative.parts[0] not in _APART:
            yield relative.as_posix(), file
    module, colon, _ = task.partition(":")
    if colon and (own := importlib.import_module(module).__file__) is not None:
        yield module, Path(own)
