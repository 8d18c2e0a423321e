"""How a result was made: command, versions, commit, machine, time."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("adq-search", "torch", "torchvision", "optuna", "ray", "numpy", "pandas", "scipy")


def provenance(*, seed: int, command: str | None = None) -> dict[str, Any]:
    """Return what a results file must say of its making.

    Args:
        seed: The seed that everything random followed.
        command: The command line; by default this process's.
    """
    return {
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processors": os.cpu_count(),
            "instructions": instructions(),
        },
        "written_at": now(),
    }


def instructions() -> str:
    """Return the vector instructions that torch uses on this processor: `avx2`, `avx512`."""
    return torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")


def now() -> str:
    """Return the time as ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit this package's source stands at, `-dirty` appended; None if not in git."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() if tracked.returncode == 0 else None
