"""The search spaces that come with the package: one job file each.

Example:
    >>> "digits" in names()
    True
    >>> path("digits").suffix
    '.yaml'
"""

from __future__ import annotations

from pathlib import Path

from adq_search.errors import SpaceError, did_you_mean

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the shipped search spaces, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """Return the job file of a shipped search space.

    Raises:
        SpaceError: There is no such space.
    """
    if name not in names():
        msg = f"There is no search space '{name}'. {did_you_mean(name, names())}"
        raise SpaceError(msg)
    return _FOLDER / f"{name}.yaml"


def load_text(name: str) -> str:
    """Return the YAML text of a shipped search space.

    Raises:
        SpaceError: There is no such space.
    """
    return path(name).read_text(encoding="utf-8")
