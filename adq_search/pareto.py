"""Dominance, fronts and hypervolume: the only definitions of them in this package.

Notation: a point is a tuple of objective values; a direction is `"maximize"` or `"minimize"`.

Duplicates of a front point are on the front too: dominance needs one strict improvement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Direction = Literal["maximize", "minimize"]
Point = Sequence[float]


class Objective(NamedTuple):
    """One axis of the search."""

    name: str
    direction: Direction


def dominates(a: Point, b: Point, directions: Sequence[Direction]) -> bool:
    """Whether `a` is at least as good as `b` everywhere and better somewhere."""
    left, right = _as_losses([a, b], directions)
    return bool(np.all(left <= right) and np.any(left < right))


def front_indices(points: Sequence[Point], directions: Sequence[Direction]) -> list[int]:
    """Return the indices of the non-dominated points, in their given order.

    Args:
        points: n points. A point with NaN is never on the front.
        directions: One direction for each coordinate.
    """
    losses = _as_losses(points, directions)
    finite: NDArray[np.bool_] = np.logical_not(np.isnan(losses).any(axis=1))
    return [
        i
        for i, row in enumerate(losses)
        if finite[i]
        and not np.any(finite & np.all(losses <= row, axis=1) & np.any(losses < row, axis=1))
    ]


def hypervolume(
    points: Sequence[Point], directions: Sequence[Direction], reference: Point
) -> float:
    """Return the volume that the points dominate, up to `reference`.

    Points that do not dominate the reference point add nothing. Exact in any number of
    dimensions, by slicing along the last one (Zitzler's hypervolume by slicing objectives).
    """
    losses = _as_losses(points, directions)
    (corner,) = _as_losses([reference], directions)
    inside = losses[np.all(losses < corner, axis=1)]
    return _sliced_volume(inside, corner)


def _sliced_volume(losses: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    if len(losses) == 0:
        return 0.0
    if losses.shape[1] == 1:
        return float(corner[0] - losses.min())
    order = losses[np.argsort(losses[:, -1], kind="stable")]
    edges = np.append(order[:, -1], corner[-1])
    volume = 0.0
    for i in range(len(order)):
        depth = edges[i + 1] - edges[i]
        if depth > 0.0:
            volume += depth * _sliced_volume(order[: i + 1, :-1], corner[:-1])
    return volume


def _as_losses(points: Sequence[Point], directions: Sequence[Direction]) -> NDArray[np.float64]:
    array = np.asarray(points, dtype=np.float64).reshape(len(points), len(directions))
    signs = np.array([-1.0 if d == "maximize" else 1.0 for d in directions])
    return np.asarray(array * signs)
