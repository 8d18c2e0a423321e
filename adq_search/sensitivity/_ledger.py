"""What an estimate was made of, and the pieces of it that are done, in a file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from adq_search.errors import StorageError
from adq_search.files import read_json, write_json
from adq_search.sensitivity._base import ScoreKey, Scores, SensitivityEstimator, Subject

SCHEMA = "adq_search.sensitivity/1"
_SOURCES = ("sensitivity", "quantizers")
#: Seconds between two writings of the file.
_EVERY_S = 2.0


def signature(estimator: SensitivityEstimator, subject: Subject) -> dict[str, str]:
    """Return what a score depends on, by part, each as 16 hexadecimal digits or plain text."""
    return {
        "estimator": repr(estimator),
        "network": type(subject.model).__qualname__,
        "weights": _hash_of(subject.model.state_dict()),
        "data": _hash_of({"inputs": subject.inputs, "targets": subject.targets}),
        "space": subject.space.fingerprint,
        "seed": str(subject.seed),
        "code": _code(),
    }


@dataclass(frozen=True, slots=True)
class End:
    """Where a time budget ended an estimate.

    Attributes:
        n_samples: Samples it had taken.
        budget_s: The budget, seconds.
    """

    n_samples: int
    budget_s: float


class Ledger:
    """Pieces of an estimate, where it ended, and its signature.

    Args:
        file: Where they are kept; None for nowhere.
        signature: What the estimate is made of; empty where nothing is kept.

    Raises:
        StorageError: The file belongs to another estimate, or is damaged.
    """

    def __init__(self, file: Path | None = None, signature: dict[str, str] | None = None) -> None:
        self._file = file
        self._signature = signature or {}
        self._pieces: dict[str, list[list[Any]]] = {}
        self._end: End | None = None
        self._written_at = -_EVERY_S
        self._is_dirty = False
        if file is not None and file.exists():
            self._pieces, self._end = _read(file, self._signature)

    def recall(self, index: int, part: str) -> Scores | None:
        """Return a piece that was recorded, None if it was not."""
        rows = self._pieces.get(f"{index} {part}")
        if rows is None:
            return None
        return {ScoreKey(*row[:5]): row[5] for row in rows}

    def record(self, index: int, part: str, scores: Scores) -> None:
        """Keep a piece; the file follows within seconds, or when the ledger is closed."""
        if self._file is None:
            return
        self._pieces[f"{index} {part}"] = [[*key, value] for key, value in scores.items()]
        self._is_dirty = True
        if time.monotonic() - self._written_at >= _EVERY_S:
            self.write()

    def is_end(self, n_samples: int, budget_s: float | None) -> bool:
        """Whether a budget as large as this one ended the estimate after so many samples."""
        end = self._end
        if end is None or budget_s is None:
            return False
        return end.n_samples == n_samples and budget_s <= end.budget_s

    def record_end(self, n_samples: int, budget_s: float) -> None:
        """Keep that a budget ended the estimate after so many samples."""
        if self._file is not None:
            self._end, self._is_dirty = End(n_samples, budget_s), True

    def write(self) -> None:
        """Write what was recorded since the file was written, if anything was."""
        if self._file is not None and self._is_dirty:
            content = {
                "schema": SCHEMA,
                "signature": self._signature,
                "end": None if self._end is None else asdict(self._end),
                "pieces": self._pieces,
            }
            write_json(self._file, content)
            self._written_at, self._is_dirty = time.monotonic(), False


@contextmanager
def open_ledger(
    file: Path | None, estimator: SensitivityEstimator, subject: Subject
) -> Iterator[Ledger]:
    """Yield the ledger of an estimate; whatever ends the work, what was recorded is written."""
    ledger = Ledger() if file is None else Ledger(file, signature(estimator, subject))
    try:
        yield ledger
    finally:
        ledger.write()


def _read(file: Path, ours: dict[str, str]) -> tuple[dict[str, list[list[Any]]], End | None]:
    content = read_json(file, StorageError, what="sensitivity")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        msg = f"{file} is no sensitivity file of schema {SCHEMA}. Remove it, or choose another."
        raise StorageError(msg)
    theirs = content["signature"]
    differing = [part for part in ours if theirs.get(part) != ours[part]]
    if differing:
        shown = "; ".join(f"{p} {theirs.get(p)} there, {ours[p]} here" for p in differing)
        msg = (
            f"The sensitivities in {file} were measured on something else: {shown}. Remove the "
            "file to measure again, or choose another folder with --out."
        )
        raise StorageError(msg)
    pieces: dict[str, list[list[Any]]] = content["pieces"]
    end = content.get("end")
    return pieces, None if end is None else End(**end)


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _code() -> str:
    """Return the package's version and a hash of the sources that decide a score."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for folder in _SOURCES:
        for file in sorted((root / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return f"{version('adq-search')} {digest.hexdigest()[:16]}"
