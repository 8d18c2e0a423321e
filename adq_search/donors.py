"""Whose weights each trial of a folder began from, decided once and written down.

The choice depends on what had finished when a trial first began. Written down, it is the same when
the trial is interrupted and begun again, and for replicates of it. A trial in a folder of its own,
as on another machine, is brought its donor's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from adq_search.errors import StorageError
from adq_search.files import read_json, write_atomic, write_json
from adq_search.policy import Policy
from adq_search.trial import TrialResult
from adq_search.warm_start import Donor, nearest


@dataclass(frozen=True)
class DonorFiles:
    """What a folder holds of a donor, to be written into another.

    Attributes:
        policy_hash: Names the files.
        result: Of the trial that trained the donor, as JSON text in UTF-8.
        weights: What it ended with, as a safetensors file.
    """

    policy_hash: str
    result: bytes = field(repr=False)
    weights: bytes = field(repr=False)


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
    donor = donor_result(folder, policy)
    if donor is None:
        return None
    weights = load_file(_weights_file(folder, donor.policy.hash))
    return Donor(donor.policy, weights, donor.epochs + donor.epochs_before)


def donor_result(folder: Path, policy: Policy) -> TrialResult | None:
    """Return what was measured of a policy's donor; arguments and errors as for `donor_of`."""
    if not is_donor_chosen(folder, policy):
        found = nearest(policy, [r.policy for r in _finished(folder) if r.policy != policy])
        note_donor(folder, policy, None if found is None else found.hash)
    name = read_json(_choice_file(folder, policy.hash), StorageError, what="donor")["donor"]
    if name is None:
        return None
    if not (_weights_file(folder, name).exists() and _result_file(folder, name).exists()):
        msg = (
            f"Trials of policy {policy.hash} begin from the weights of {name}, but {folder} has "
            "lost them. Restore them from a copy, or search in another folder."
        )
        raise StorageError(msg)
    return _read(_result_file(folder, name))


def donor_files(folder: Path, policy: Policy) -> DonorFiles | None:
    """Return the files of a policy's donor; arguments and errors as for `donor_of`."""
    donor = donor_result(folder, policy)
    if donor is None:
        return None
    name = donor.policy.hash
    return DonorFiles(
        name, _result_file(folder, name).read_bytes(), _weights_file(folder, name).read_bytes()
    )


def bring_donor(folder: Path, policy: Policy, files: DonorFiles | None) -> None:
    """Have the trials of a policy in a folder begin from a donor of another folder.

    Args:
        folder: Of the trials.
        policy: What is to be trained.
        files: The donor's; None where training begins from the full-precision network.
    """
    if files is not None:
        _write_bytes(_result_file(folder, files.policy_hash), files.result)
        _write_bytes(_weights_file(folder, files.policy_hash), files.weights)
    note_donor(folder, policy, None if files is None else files.policy_hash)


def is_donor_chosen(folder: Path, policy: Policy) -> bool:
    """Whether a folder says what the trials of a policy begin from."""
    return _choice_file(folder, policy.hash).exists()


def note_donor(folder: Path, policy: Policy, donor: str | None) -> None:
    """Write down which policy's weights trials of a policy begin from, None for the teacher's."""
    write_json(_choice_file(folder, policy.hash), {"donor": donor})


def donors_of(folder: Path, policy_hashes: list[str]) -> set[str]:
    """Return the hashes of the policies that trials of these policies began from."""
    files = [_choice_file(folder, name) for name in policy_hashes]
    found = [read_json(f, StorageError, what="donor")["donor"] for f in files if f.exists()]
    return {name for name in found if name is not None}


def _finished(folder: Path) -> list[TrialResult]:
    results = (_read(file) for file in (folder / "trials").glob("*.json"))
    return [r for r in results if _weights_file(folder, r.policy.hash).exists()]


def _choice_file(folder: Path, policy_hash: str) -> Path:
    return folder / "donors" / f"{policy_hash}.json"


def _result_file(folder: Path, policy_hash: str) -> Path:
    return folder / "trials" / f"{policy_hash}.json"


def _weights_file(folder: Path, policy_hash: str) -> Path:
    return folder / "weights" / f"{policy_hash}.safetensors"


def _read(file: Path) -> TrialResult:
    return TrialResult.from_json(read_json(file, StorageError, what="trial"))


def _write_bytes(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, write)
