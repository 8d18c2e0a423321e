"""Whose weights each trial of a folder began from, decided once and written down.

The choice depends on what had finished when a trial first began. Written down, it is the same when
the trial is interrupted and begun again, and for replicates of it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from adq_search.errors import StorageError
from adq_search.files import read_json, write_json
from adq_search.policy import Policy
from adq_search.trial import TrialResult
from adq_search.warm_start import Donor, nearest


def donor_of(folder: Path, policy: Policy) -> Donor | None:
    """Return the donor of a policy's trials, choosing the nearest one on the first call.

    Args:
        folder: Of a session; `trials` and `weights` in it tell what has finished.
        policy: What is to be trained.

    Returns:
        None where training begins from the full-precision network: nothing had finished.

    Raises:
        StorageError: The donor's result or weights are gone.
    """
    chosen = folder / "donors" / f"{policy.hash}.json"
    if not chosen.exists():
        found = nearest(policy, [r.policy for r in _finished(folder) if r.policy != policy])
        write_json(chosen, {"donor": None if found is None else found.hash})
    name = read_json(chosen, StorageError, what="donor")["donor"]
    if name is None:
        return None
    weights, result = _weights_file(folder, name), folder / "trials" / f"{name}.json"
    if not (weights.exists() and result.exists()):
        msg = (
            f"Trials of policy {policy.hash} begin from the weights of {name}, but {folder} has "
            "lost them. Restore them from a copy, or search in another folder."
        )
        raise StorageError(msg)
    donor = _read(result)
    return Donor(donor.policy, load_file(weights), donor.epochs + donor.epochs_before)


def donors_of(folder: Path, policy_hashes: list[str]) -> set[str]:
    """Return the hashes of the policies that trials of these policies began from."""
    files = [folder / "donors" / f"{name}.json" for name in policy_hashes]
    found = [read_json(f, StorageError, what="donor")["donor"] for f in files if f.exists()]
    return {name for name in found if name is not None}


def _finished(folder: Path) -> list[TrialResult]:
    results = (_read(file) for file in (folder / "trials").glob("*.json"))
    return [r for r in results if _weights_file(folder, r.policy.hash).exists()]


def _weights_file(folder: Path, policy_hash: str) -> Path:
    return folder / "weights" / f"{policy_hash}.safetensors"


def _read(file: Path) -> TrialResult:
    return TrialResult.from_json(read_json(file, StorageError, what="trial"))
