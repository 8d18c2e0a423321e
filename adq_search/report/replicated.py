"""Policies of the front trained again with new seeds: what each training measured, and their sum.

How the sums are made, `adq_search.replicates` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pandas as pd

from adq_search.files import write_atomic
from adq_search.pareto import Objective
from adq_search.replicates import spread_of
from adq_search.report._read import MEASURED, StrictFile, figure_of
from adq_search.report.records import TrialRecord, TrialState
from adq_search.report.units import amount


@dataclass(frozen=True, slots=True)
class Replicate:
    """One more training of a policy.

    Attributes:
        seed: Of everything random in it.
        state: As of a trial.
        accuracy: On the validation part, 0 to 1; None where it was not measured.
        loss: Validation cross-entropy, nats.
        kl: Validation KL from the teacher, nats.
        epochs: Epochs trained.
        wall_s: Seconds it took.
        reason: Why it did not complete.
    """

    seed: int
    state: TrialState
    accuracy: float | None
    loss: float | None
    kl: float | None
    epochs: int
    wall_s: float
    reason: str | None = None


@dataclass(frozen=True)
class Replicated:
    """What the trainings of one policy come to.

    Attributes:
        replicates: Each of them; the one that put the policy on the front is not among them.
        means: Mean of each measured objective over those that completed; empty where none did.
        errors: Standard error of each mean, from the spread pooled over the front; empty where
            nothing tells of it.
        probability: That no other policy of the front dominates it, 0 to 1.
    """

    replicates: tuple[Replicate, ...]
    means: dict[str, float]
    errors: dict[str, float]
    probability: float

    @property
    def n_complete(self) -> int:
        """Number of trainings that completed."""
        return sum(r.state == "complete" for r in self.replicates)

    @classmethod
    def from_file(cls, form: ReplicatedFile) -> Self:
        """Build it from its part of `front.json`."""
        content = form.model_dump()
        replicates = tuple(Replicate(**r) for r in content.pop("replicates"))
        return cls(replicates=replicates, **content)


class _ReplicateFile(StrictFile):
    seed: int
    state: TrialState
    accuracy: float | None
    loss: float | None
    kl: float | None
    epochs: int
    wall_s: float
    reason: str | None


class ReplicatedFile(StrictFile):
    """A `Replicated` as `front.json` has it."""

    replicates: list[_ReplicateFile]
    means: dict[str, float]
    errors: dict[str, float]
    probability: float


def judge_front(
    front: Sequence[TrialRecord],
    replicates: Mapping[str, Sequence[Replicate]],
    objectives: Sequence[Objective],
    *,
    seed: int,
) -> dict[str, Replicated]:
    """Return what further trainings say of each policy of a front, by policy hash.

    Args:
        front: The policies.
        replicates: Their further trainings, by policy hash.
        objectives: Of the search.
        seed: Of the draws that give the probabilities.
    """
    if not any(replicates.get(r.policy_hash) for r in front):
        return {}
    runs = {r.policy_hash: tuple(replicates.get(r.policy_hash, ())) for r in front}
    values = [
        [
            _values(run, record, objectives)
            for run in runs[record.policy_hash]
            if run.state == "complete"
        ]
        for record in front
    ]
    spread = spread_of(values, [o.direction for o in objectives], seed=seed)
    measured = [(k, o.name) for k, o in enumerate(objectives) if o.name in MEASURED]
    return {
        record.policy_hash: Replicated(
            runs[record.policy_hash],
            _finite({name: spread.means[i, k] for k, name in measured}),
            _finite({name: spread.errors[i, k] for k, name in measured}),
            float(spread.probabilities[i]),
        )
        for i, record in enumerate(front)
    }


def mean_of(again: Replicated, name: str) -> str:
    """Return a mean with its standard error, as people read it: `97.50% ± 0.21%`."""
    if name not in again.means:
        return "–"
    mean = amount(name, again.means[name])
    return f"{mean} ± {amount(name, again.errors[name])}" if name in again.errors else mean


def write_replicates_csv(points: Mapping[str, Replicated], path: Path) -> None:
    """Write every further training as a row; the file is removed where there are none."""
    rows = [
        {"policy_hash": name, **{key: getattr(run, key) for key in run.__slots__}}
        for name, of_policy in points.items()
        for run in of_policy.replicates
    ]
    if rows:
        frame = pd.DataFrame(rows)
        write_atomic(path, lambda temporary: frame.to_csv(temporary, index=False))
    else:
        path.unlink(missing_ok=True)


def _values(
    run: Replicate, record: TrialRecord, objectives: Sequence[Objective]
) -> tuple[float, ...]:
    measured = {name: getattr(run, name) for name in MEASURED}
    who = f"The replicate of trial {record.number} with seed {run.seed}"
    return tuple(figure_of(o.name, measured, record.cost, who=who) for o in objectives)


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if math.isfinite(value)}
