"""A front in one number: hypervolume, its history over the trials, and the knee."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adq_search.pareto import Direction, Objective, Point, front_indices, hypervolume
from adq_search.report.records import TrialRecord, is_within, select_front, uniform_records

_MARGIN = 1.1


@dataclass(frozen=True)
class Hypervolume:
    """How much of the space of objectives the front dominates.

    The reference point is accuracy 0 and 1.1 times the largest value among the uniform baselines
    for every minimised objective (among all complete trials where there is no baseline). A cost
    is known before training, so a baseline that diverged counts for costs too.

    Attributes:
        value: Volume between the front and the reference point, in the objectives' units.
        share: The same over the whole box from the reference point to accuracy 1, cost 0; 0 to 1.
        reference: The reference point, by objective.
        seeds_share: The share that seeds and baselines reach without the sampler; None where
            there were none.
        retrained_share: The share that the front reaches by the means of its replicates; None
            where there were none.
    """

    value: float
    share: float
    reference: dict[str, float]
    seeds_share: float | None = None
    retrained_share: float | None = None


def hypervolume_of(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    budgets: Mapping[str, float],
    *,
    retrained: Sequence[Mapping[str, float]] = (),
) -> Hypervolume | None:
    """Return the hypervolume of the front of `records`; None where there is no reference point.

    Args:
        records: All trials.
        objectives: Of the search.
        budgets: Upper limits on cost figures.
        retrained: Figures of the policies of the front by name, as replicates measured them; one
            that lacks an objective counts for nothing.
    """
    reference = reference_point(records, objectives)
    if reference is None:
        return None

    def volume(points: list[list[float]]) -> float:
        corner = [reference[o.name] for o in objectives]
        return hypervolume(points, [o.direction for o in objectives], corner)

    def dominated_by(some: Sequence[TrialRecord]) -> float:
        front = select_front(some, objectives, budgets)
        return volume([[r.value(o.name) for o in objectives] for r in front])

    value, box = dominated_by(records), _box(objectives, reference)
    seeds = [r for r in records if r.is_seed]
    seeds_share = dominated_by(seeds) / box if seeds else None
    names = [o.name for o in objectives]
    again = [[point[n] for n in names] for point in retrained if set(names) <= set(point)]
    retrained_share = volume(again) / box if retrained else None
    return Hypervolume(value, value / box, reference, seeds_share, retrained_share)


def reference_point(
    records: Sequence[TrialRecord], objectives: Sequence[Objective]
) -> dict[str, float] | None:
    """Return the hypervolume's reference point, by the rule that `Hypervolume` states.

    None where a minimised objective has no value to refer to.
    """
    reference = {}
    for name, direction in objectives:
        if direction == "maximize":
            reference[name] = 0.0
            continue
        counted = [r for r in records if r.is_complete or name in r.cost]
        known = [r.value(name) for r in uniform_records(counted)] or [
            r.value(name) for r in records if r.is_complete
        ]
        if not known or max(known) <= 0.0:
            return None
        reference[name] = _MARGIN * max(known)
    return reference


def hypervolume_history(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    budgets: Mapping[str, float],
    reference: Mapping[str, float],
) -> list[tuple[int, float]]:
    """Return `(trial number, share)` of the front of all trials up to each one, in their order."""
    directions = [o.direction for o in objectives]
    corner = [reference[o.name] for o in objectives]
    box = _box(objectives, reference)
    front: list[list[float]] = []
    history = []
    for record in sorted(records, key=lambda r: r.number):
        if record.is_complete and is_within(record, budgets):
            front.append([record.value(o.name) for o in objectives])
            front = [front[i] for i in front_indices(front, directions)]
        history.append((record.number, hypervolume(front, directions, corner) / box))
    return history


def knee_index(points: Sequence[Point], directions: Sequence[Direction]) -> int | None:
    """Return the index of a front's knee, None for fewer than three points.

    Each objective is scaled to 0 (best on the front) to 1 (worst); the knee has the smallest sum.
    With two objectives that is the point farthest below the line through the two ends (Das 1999).
    """
    if len(points) < 3:
        return None
    sums = [0.0] * len(points)
    for axis, direction in enumerate(directions):
        sign = -1.0 if direction == "maximize" else 1.0
        losses = [sign * p[axis] for p in points]
        low, span = min(losses), max(losses) - min(losses)
        sums = [s + ((x - low) / span if span else 0.0) for s, x in zip(sums, losses, strict=True)]
    return sums.index(min(sums))


def _box(objectives: Sequence[Objective], reference: Mapping[str, float]) -> float:
    """The volume from the reference point to the ideal: 1 where maximised, 0 where minimised."""
    return math.prod(
        1.0 - reference[o.name] if o.direction == "maximize" else reference[o.name]
        for o in objectives
    )
