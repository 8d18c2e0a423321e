"""From sensitivities and costs to policies, before anything is trained.

Notation:
    g: a group of layers; c: a precision it can take.
    S_gc: predicted loss increase, summed over the group's layers; K_gc: cost, likewise.
    lambda: price of the cost in loss.

Both sums are separable, so min_c sum_g (S_gc + lambda K_gc) is solved group by group, and as lambda
falls from infinity to zero each group walks along the lower convex hull of its own points. The
walks merged by slope give every Lagrangian solution, exactly, in one sort. What lies between two
of them only an integer programme finds: a multiple-choice knapsack [Kellerer2004]_, chapter 11,
solved by HiGHS through SciPy, as HAWQ-V3 [Yao2021]_ does for its bits.

.. [Kellerer2004] Kellerer, Pferschy, Pisinger. Knapsack Problems. Springer, 2004.
.. [Yao2021] Yao et al. HAWQ-V3: Dyadic Neural Network Quantization. ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.stats import spearmanr

from adq_search.errors import BudgetError, CostError, did_you_mean
from adq_search.hardware import COST_NAMES, Hardware, layer_cost, load_hardware
from adq_search.policy import LayerPrecision, Policy
from adq_search.sensitivity import SensitivityTable
from adq_search.space import Group, SearchSpace
from adq_search.tracing import ModelSummary

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A policy that a prior holds for good.

    Attributes:
        policy: What to try.
        predicted: Predicted increase of the loss over full precision, nats.
        cost: The cost figure it was chosen by.
    """

    policy: Policy
    predicted: float
    cost: float


def cost_range(
    space: SearchSpace, summary: ModelSummary, cost_name: str, hardware: Hardware | str
) -> tuple[float, float]:
    """Return the smallest and the largest value of a cost figure over all policies, exactly."""
    by_group = _costs(space, summary, cost_name, hardware)
    return math.fsum(min(c) for c in by_group), math.fsum(max(c) for c in by_group)


def lagrangian_sweep(
    space: SearchSpace,
    summary: ModelSummary,
    table: SensitivityTable,
    cost_name: str,
    hardware: Hardware | str,
) -> tuple[Proposal, ...]:
    """Return every policy on the lower convex hull of predicted loss over cost.

    From the cheapest policy to the one of least predicted loss; cost rises and predicted loss
    falls with each. Layers with a codebook take the middle momentum of the space.

    Args:
        space: Which policies exist.
        summary: The traced network.
        table: Predicted loss increases.
        cost_name: A cost figure that adds up over layers.
        hardware: Cost model.
    """
    costs = _costs(space, summary, cost_name, hardware)
    losses = _losses(space, table)
    walks = [_lower_hull(k, s) for k, s in zip(costs, losses, strict=True)]
    at = [walk[0] for walk in walks]
    steps = []
    for g, walk in enumerate(walks):
        for a, b in pairwise(walk):
            slope = (losses[g][b] - losses[g][a]) / (costs[g][b] - costs[g][a])
            steps.append((slope, g, b))
    found = [_proposal(space, table, costs, at)]
    for _, g, b in sorted(steps):
        at[g] = b
        found.append(_proposal(space, table, costs, at))
    return tuple(found)


def propose_seeds(
    space: SearchSpace,
    summary: ModelSummary,
    table: SensitivityTable,
    cost_name: str,
    hardware: Hardware | str,
    *,
    n: int,
    budgets: Mapping[str, float] | None = None,
) -> tuple[Proposal, ...]:
    """Return up to n different policies of the sweep, spread evenly over the logarithm of cost.

    Args:
        space: Which policies exist.
        summary: The traced network.
        table: Predicted loss increases.
        cost_name: The cost figure to spread over.
        hardware: Cost model.
        n: How many; fewer come where the sweep has fewer.
        budgets: Upper limits that every proposal meets. Where no policy of the sweep does, the one
            policy of `allocate` is returned.

    Raises:
        BudgetError: No policy of the space meets the budgets.
    """
    sweep: Sequence[Proposal] = lagrangian_sweep(space, summary, table, cost_name, hardware)
    if budgets:
        for name, limit in budgets.items():
            figure = _layer_figure(space, summary, name, hardware)
            sweep = [
                p
                for p in sweep
                if _is_within(math.fsum(figure(layer, c) for layer, c in p.policy), limit)
            ]
        if not sweep:
            return (allocate(space, summary, table, budgets, hardware, cost_name=cost_name),)
    if n < 1:
        return ()
    if len(sweep) <= n:
        return tuple(sweep)
    position = np.log([max(p.cost, 1e-300) for p in sweep])
    chosen: set[int] = set()
    for target in np.linspace(position[0], position[-1], n):
        nearest = np.argsort(np.abs(position - target), kind="stable")
        chosen.add(next(int(i) for i in nearest if int(i) not in chosen))
    return tuple(sweep[i] for i in sorted(chosen))


def allocate(
    space: SearchSpace,
    summary: ModelSummary,
    table: SensitivityTable,
    budgets: Mapping[str, float],
    hardware: Hardware | str,
    *,
    cost_name: str | None = None,
) -> Proposal:
    """Return the policy of least predicted loss that meets all budgets, exactly.

    Args:
        space: Which policies exist.
        summary: The traced network.
        table: Predicted loss increases.
        budgets: Upper limits on cost figures that add up over layers, such as
            `{"average_bits_weighted": 2.81}`; at least one.
        hardware: Cost model.
        cost_name: The cost figure to report; None for the first budget's.

    Raises:
        BudgetError: No policy meets the budgets; `reachable` is the interval of the budget at
            fault.
    """
    if not budgets:
        msg = "An allocation needs a budget, but has none. Give one, such as average bits of 4."
        raise CostError(msg)
    losses = _losses(space, table)
    costs = {name: _costs(space, summary, name, hardware) for name in budgets}
    for name, limit in budgets.items():
        low, high = cost_range(space, summary, name, hardware)
        if not _is_within(low, limit):
            msg = (
                f"No policy of the space meets the budget {name} <= {limit:.6g}: the space reaches "
                f"from {low:.6g} to {high:.6g}. Raise the budget, or allow fewer bits."
            )
            raise BudgetError(msg, (low, high))
    limits = [(costs[name], limit) for name, limit in budgets.items()]
    chosen = _choose(losses, limits)
    if chosen is None:
        name, limit = next(iter(budgets.items()))
        cheapest = _choose(costs[name], limits[1:])
        low = _sum_at(costs[name], cheapest) if cheapest is not None else math.inf
        _, high = cost_range(space, summary, name, hardware)
        others = ", ".join(f"{n} <= {x:.6g}" for n, x in list(budgets.items())[1:])
        msg = (
            f"No policy of the space meets {name} <= {limit:.6g} together with {others}: within "
            f"those, {name} reaches from {low:.6g} to {high:.6g}. Raise one of the budgets."
        )
        raise BudgetError(msg, (low, high))
    reported = cost_name or next(iter(budgets))
    return _proposal(space, table, _costs(space, summary, reported, hardware), chosen)


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN below three pairs, or where one side is constant."""
    if len(predicted) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return math.nan
    return float(spearmanr(predicted, measured).statistic)


def _precisions(group: Group) -> tuple[LayerPrecision, ...]:
    """Return the group's precisions, with one momentum: no prior tells momenta apart."""
    return tuple(dict.fromkeys(group.with_median_momentum(p) for p in group.choices))


def _losses(space: SearchSpace, table: SensitivityTable) -> list[list[float]]:
    """Return S_gc."""
    return [
        [math.fsum(table.score(layer, p) for layer in group.layers) for p in _precisions(group)]
        for group in space.groups
    ]


def _costs(
    space: SearchSpace, summary: ModelSummary, cost_name: str, hardware: Hardware | str
) -> list[list[float]]:
    """Return K_gc."""
    figure = _layer_figure(space, summary, cost_name, hardware)
    return [
        [math.fsum(figure(layer, p) for layer in group.layers) for p in _precisions(group)]
        for group in space.groups
    ]


def _proposal(
    space: SearchSpace, table: SensitivityTable, costs: list[list[float]], at: Sequence[int]
) -> Proposal:
    chosen = {g.name: _precisions(g)[i] for g, i in zip(space.groups, at, strict=True)}
    policy = space.policy_from(chosen)
    return Proposal(policy, table.predict(policy), _sum_at(costs, at))


def _sum_at(values: list[list[float]], at: Sequence[int]) -> float:
    return math.fsum(row[i] for row, i in zip(values, at, strict=True))


def _is_within(cost: float, limit: float) -> bool:
    return cost <= limit + _slack(limit)


def _slack(limit: float) -> float:
    """A sum of floats may miss a limit that it meets in exact arithmetic."""
    return 1e-9 * abs(limit)


def _lower_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
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


def _choose(
    objective: list[list[float]], limits: Sequence[tuple[list[list[float]], float]]
) -> list[int] | None:
    """Return the choice of each group that minimises the objective within limits; None if none.

    The solver's tolerances are absolute, so objective and limits are scaled. A solution that uses
    a tolerance to overstep a limit is cut off by itself, and the solver asked again.
    """
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
            options={"disp": False, "mip_rel_gap": 0.0},
        )
        if solution.x is None:
            return None
        chosen = [int(x.argmax()) for x in np.split(solution.x, np.cumsum(sizes)[:-1])]
        if all(_is_within(_sum_at(rows, chosen), limit) for rows, limit in limits):
            return chosen
        cut = np.zeros(len(owner))
        cut[np.cumsum([0, *sizes[:-1]]) + np.array(chosen)] = 1.0
        constraints.append(LinearConstraint(cut[None, :], -np.inf, len(sizes) - 1.0))


def _above_least(rows: list[list[float]]) -> Floats:
    """Return how far each entry lies above the least of its row, all rows in a line."""
    return np.concatenate([np.array(row, dtype=np.float64) - min(row) for row in rows])


#: Largest coefficient of the solver's objective; its absolute gap is 1e-6.
_GOAL_SCALE = 1e4


def _layer_figure(
    space: SearchSpace, summary: ModelSummary, name: str, hardware: Hardware | str
) -> Callable[[str, LayerPrecision], float]:
    """Return the share of one layer in a total cost figure.

    Raises:
        CostError: There is no such figure.
    """
    if name not in COST_NAMES:
        msg = f"There is no cost figure '{name}'. {did_you_mean(name, COST_NAMES)}"
        raise CostError(msg)
    model = load_hardware(hardware) if isinstance(hardware, str) else hardware
    infos = {info.name: info for info in summary.layers}
    shares = _average_shares(summary, name) if name.startswith("average_bits") else None

    def figure(layer: str, precision: LayerPrecision) -> float:
        found = layer_cost(infos[layer], precision, space.options, model)
        if shares is not None:
            return shares[layer] * found.weight_bits
        return float(getattr(found, name))

    return figure


def _average_shares(summary: ModelSummary, name: str) -> dict[str, float]:
    """Return each layer's share in one of the averages of weight bits that `cost` defines."""
    layers = summary.layers
    if name == "average_bits_layers":
        weighed = {info.name: 1.0 for info in layers}
    else:
        weighed = {info.name: float(info.n_weights) for info in layers}
    if name == "average_bits_inner" and len(layers) > 2:
        weighed[layers[0].name] = weighed[layers[-1].name] = 0.0
    total = math.fsum(weighed.values())
    return {layer: weight / total for layer, weight in weighed.items()}
