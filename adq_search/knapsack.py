"""The multiple-choice knapsack: one choice for each group, least loss, limited cost.

Notation:
    rows[g][c]: what choice c of group g costs, or loses; sums over the groups are what counts.

Exactly solved by HiGHS through SciPy; see [Kellerer2004]_, chapter 11.

.. [Kellerer2004] Kellerer, Pferschy, Pisinger. Knapsack Problems. Springer, 2004.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
#: Values by group and choice.
Rows = Sequence[Sequence[float]]

#: Largest coefficient of the solver's objective; its absolute gap is 1e-6.
_GOAL_SCALE = 1e4


def sum_at(values: Rows, at: Sequence[int]) -> float:
    """Return the sum over groups, group g at choice `at[g]`."""
    return math.fsum(row[i] for row, i in zip(values, at, strict=True))


def is_within(cost: float, limit: float) -> bool:
    """Whether a sum of floats meets a limit that it would meet in exact arithmetic."""
    return cost <= limit + _slack(limit)


def _slack(limit: float) -> float:
    """A sum of floats may miss a limit that it meets in exact arithmetic."""
    return 1e-9 * abs(limit)


def lower_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the indices of the lower convex hull, by rising cost and falling loss."""
    hull: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if hull and losses[i] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], i, costs, losses):
            hull.pop()
        hull.append(i)
    return hull


def _is_above(a: int, b: int, c: int, costs: Sequence[float], losses: Sequence[float]) -> bool:
    """Whether point b lies on or above the line from a to c."""
    by_b = (losses[b] - losses[a]) * (costs[c] - costs[a])
    by_c = (losses[c] - losses[a]) * (costs[b] - costs[a])
    return by_b >= by_c


def choose(objective: Rows, limits: Sequence[tuple[Rows, float]]) -> list[int] | None:
    """Return the choice of each group that minimises the objective within limits; None if none.

    Choices that another of their group beats in everything are left out first. The solver's
    tolerances are absolute, so objective and limits are scaled. A solution that uses a tolerance
    to overstep a limit is cut off by itself, and the solver asked again.
    """
    kept = [
        _undominated([objective[g], *(rows[g] for rows, _ in limits)])
        for g in range(len(objective))
    ]
    chosen = _solve(
        [[row[i] for i in at] for row, at in zip(objective, kept, strict=True)],
        [
            ([[row[i] for i in at] for row, at in zip(rows, kept, strict=True)], limit)
            for rows, limit in limits
        ],
    )
    return None if chosen is None else [at[i] for at, i in zip(kept, chosen, strict=True)]


def _undominated(criteria: Rows) -> list[int]:
    """Return the choices that no other matches in every criterion; the first of equal ones."""
    values = np.array(criteria, dtype=np.float64)  # shape: (criteria, choices)
    no_more = (values[:, :, None] <= values[:, None, :]).all(axis=0)  # i against j
    less = (values[:, :, None] < values[:, None, :]).any(axis=0)
    is_first = np.triu(np.ones_like(less), k=1)
    return [int(j) for j in np.flatnonzero(~(no_more & (less | is_first)).any(axis=0))]


def _solve(objective: Rows, limits: Sequence[tuple[Rows, float]]) -> list[int] | None:
    """Return what `choose` returns, by branch and bound."""
    sizes = [len(row) for row in objective]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    columns = np.arange(len(owner))
    goal = _above_least(objective)
    goal *= _GOAL_SCALE / max(goal.max(), 1e-300)
    allowed = np.ones(len(owner))
    one_each = csr_array((allowed.copy(), (owner, columns)))
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    for rows, limit in limits:
        extra = _above_least(rows)
        room = limit + _slack(limit) - math.fsum(min(row) for row in rows)
        allowed[extra > room] = 0.0
        if room > 0.0:
            constraints.append(LinearConstraint(extra[None, :] / room, -np.inf, 1.0))
    while True:
        solution = milp(
            goal,
            integrality=np.ones(len(goal)),
            bounds=Bounds(0.0, allowed),
            constraints=constraints,
            # HiGHS's presolve prints where it mends a solution, whatever `disp` says.
            options={"disp": False, "mip_rel_gap": 0.0, "presolve": False},
        )
        if solution.x is None:
            return None
        chosen = [int(x.argmax()) for x in np.split(solution.x, np.cumsum(sizes)[:-1])]
        if all(is_within(sum_at(rows, chosen), limit) for rows, limit in limits):
            return chosen
        cut = np.zeros(len(owner))
        cut[np.cumsum([0, *sizes[:-1]]) + np.array(chosen)] = 1.0
        constraints.append(LinearConstraint(cut[None, :], -np.inf, len(sizes) - 1.0))


def _above_least(rows: Rows) -> Floats:
    """Return how far each entry lies above the least of its row, all rows in a line."""
    return np.concatenate([np.array(row, dtype=np.float64) - min(row) for row in rows])
