"""Find a job: a YAML file, or the name of a shipped or installed search space."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from adq_search.errors import SpaceError, did_you_mean
from adq_search.job import Job, read_job

ENTRY_POINT_GROUP = "adq_search.spaces"


def find_job(reference: str) -> tuple[Job, str]:
    """Return the job and a name for it.

    Args:
        reference: Path of a YAML file, or the name of a search space.

    Raises:
        SpaceError: There is neither.
    """
    path = Path(reference)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        return read_job(path), path.stem
    named = named_spaces()
    if reference not in named:
        hint = did_you_mean(reference, named)
        msg = f"There is no search space '{reference}'. {hint} A YAML file is given by its path."
        raise SpaceError(msg)
    return read_job(named[reference]), reference


def named_spaces() -> dict[str, Path]:
    """Return the files of all shipped and installed search spaces, by name."""
    found: dict[str, Path] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        shelf = entry.load()
        found |= {name: shelf.path(name) for name in shelf.names()}
    return found
