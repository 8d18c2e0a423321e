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
    array = np.asarray(points, dtype=np.float64).reshape(len(points), len(directions))
    return [int(i) for i in np.flatnonzero(non_dominated(array, directions))]


def non_dominated(
    points: NDArray[np.float64], directions: Sequence[Direction]
) -> NDArray[np.bool_]:
    """Return which points of each set of points no other one of it dominates.

    Args:
        points: Any number of sets, # shape: (..., n, coordinates). A point with NaN is dominated.
        directions: One direction for each coordinate.

    Returns:
        # shape: (..., n)
    """
    losses = points * _signs(directions)
    out = np.logical_not(np.isnan(losses).any(axis=-1))
    columns = [np.ascontiguousarray(losses[..., k]) for k in range(losses.shape[-1])]
    for i in range(losses.shape[-2]):  # NaN is neither less nor equal: it dominates none
        is_as_good = np.logical_and.reduce([c <= c[..., i : i + 1] for c in columns])
        is_better = np.logical_or.reduce([c < c[..., i : i + 1] for c in columns])
        out[..., i] &= np.logical_not((is_as_good & is_better).any(axis=-1))
    return np.asarray(out)


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
    return np.asarray(array * _signs(directions))


def _signs(directions: Sequence[Direction]) -> NDArray[np.float64]:
    return np.array([-1.0 if d == "maximize" else 1.0 for d in directions])
