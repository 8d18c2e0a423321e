"""Files that are whole or absent: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adq_search.errors import AdqSearchError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the same folder, then move the file into place.

    A reader sees the old file or the new one, never half of it, whatever kills the writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda temporary: _write_utf8(temporary, text))


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, error: type[AdqSearchError], *, what: str) -> Any:
    """Read a JSON file, raising `error` with the place of the damage where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"There is no {what} file at {path}. Check the path."
        raise error(msg) from None
    except (OSError, UnicodeDecodeError) as problem:
        msg = f"The {what} file {path} cannot be read: {problem}."
        raise error(msg) from problem
    except json.JSONDecodeError as problem:
        msg = (
            f"The {what} file {path} is damaged: line {problem.lineno}, column {problem.colno}: "
            f"{problem.msg}. Restore it from its source."
        )
        raise error(msg) from problem
