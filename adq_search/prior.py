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
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pandas as pd

from adq_search.errors import BudgetError, CostError, did_you_mean
from adq_search.hardware import COST_NAMES, Hardware, layer_cost, load_hardware
from adq_search.knapsack import choose, is_within, lower_hull, sum_at
from adq_search.policy import LayerPrecision, Policy
from adq_search.sensitivity import SensitivityTable
from adq_search.space import Group, SearchSpace
from adq_search.tracing import ModelSummary


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
    walks = [lower_hull(k, s) for k, s in zip(costs, losses, strict=True)]
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
    """Return up to n different policies: a front for training to start from.

    Without budgets, policies of the sweep, spread evenly over the logarithm of cost. With budgets,
    the best policy that meets them comes first, then the best ones for budgets that shrink
    together, slowly at first: many near the limits, the last at the bottom.

    Args:
        space: Which policies exist.
        summary: The traced network.
        table: Predicted loss increases.
        cost_name: The cost figure to spread over, and to report.
        hardware: Cost model.
        n: How many; fewer come where fewer are different.
        budgets: Upper limits that every proposal meets.

    Raises:
        BudgetError: No policy of the space meets the budgets.
    """
    if budgets:
        return _seeds_within(space, summary, table, budgets, hardware, cost_name, n)
    if n < 1:
        return ()
    sweep = lagrangian_sweep(space, summary, table, cost_name, hardware)
    if len(sweep) <= n:
        return sweep
    position = np.log([max(p.cost, 1e-300) for p in sweep])
    chosen: set[int] = set()
    for target in np.linspace(position[0], position[-1], n):
        nearest = np.argsort(np.abs(position - target), kind="stable")
        chosen.add(next(int(i) for i in nearest if int(i) not in chosen))
    return tuple(sweep[i] for i in sorted(chosen))


def _seeds_within(
    space: SearchSpace,
    summary: ModelSummary,
    table: SensitivityTable,
    budgets: Mapping[str, float],
    hardware: Hardware | str,
    cost_name: str,
    n: int,
) -> tuple[Proposal, ...]:
    """Return the best policies for the budgets and for less of each.

    A budget of share t lies at low (limit / low)^t, from its least reachable value to its limit.
    """
    check_budgets(space, summary, budgets, hardware)
    losses = _losses(space, table)
    reported = _costs(space, summary, cost_name, hardware)
    costs = {name: _costs(space, summary, name, hardware) for name in budgets}
    found: dict[Policy, Proposal] = {}
    places = [i / max(n - 1, 1) for i in range(n)]
    between = [(a + b) / 2 for a, b in pairwise(places)]  # asked where shares found the same
    for place in (*places, *between):
        if len(found) == n:
            break
        share = 1.0 - place**2
        limits = []
        for name, limit in budgets.items():
            low = math.fsum(min(row) for row in costs[name])
            limits.append((costs[name], low * (limit / low) ** share if low else limit * share))
        chosen = choose(losses, limits)
        if chosen is not None:  # less of each may be out of reach where all is not
            proposal = _proposal(space, table, reported, chosen)
            found.setdefault(proposal.policy, proposal)
    return tuple(sorted(found.values(), key=lambda proposal: proposal.predicted))


def check_budgets(
    space: SearchSpace,
    summary: ModelSummary,
    budgets: Mapping[str, float],
    hardware: Hardware | str,
) -> None:
    """Check that the hardware can run the space, and that some policy of it meets all budgets.

    Args:
        space: Which policies exist.
        summary: The traced network.
        budgets: Upper limits on cost figures that add up over layers.
        hardware: Cost model.

    Raises:
        CostError: The hardware cannot run a precision of the space, with the layer and the remedy.
        BudgetError: No policy does; `reachable` is the interval of the budget at fault.
    """
    _costs(space, summary, "energy_pj", hardware)
    for name, limit in budgets.items():
        low, high = cost_range(space, summary, name, hardware)
        if not is_within(low, limit):
            msg = (
                f"No policy of the space meets the budget {name} <= {limit:.6g}: the space reaches "
                f"from {low:.6g} to {high:.6g}. Raise the budget, or allow fewer bits."
            )
            raise BudgetError(msg, (low, high))
    costs = {name: _costs(space, summary, name, hardware) for name in budgets}
    within: list[tuple[list[list[float]], float]] = []
    for name, limit in budgets.items():
        cheapest = choose(costs[name], within)
        assert cheapest is not None, "the budgets before this one can be met together"
        low = sum_at(costs[name], cheapest)
        if not is_within(low, limit):
            dearest = choose([[-cost for cost in row] for row in costs[name]], within)
            assert dearest is not None, "the cheapest meets them too"
            high = sum_at(costs[name], dearest)
            others = ", ".join(f"{n} <= {budgets[n]:.6g}" for n in list(budgets)[: len(within)])
            msg = (
                f"No policy of the space meets {name} <= {limit:.6g} together with {others}: "
                f"within those, {name} reaches from {low:.6g} to {high:.6g}. Raise one of the "
                "budgets."
            )
            raise BudgetError(msg, (low, high))
        within.append((costs[name], limit))


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
    check_budgets(space, summary, budgets, hardware)
    limits = [(_costs(space, summary, n, hardware), limit) for n, limit in budgets.items()]
    chosen = choose(_losses(space, table), limits)
    assert chosen is not None, "budgets that can be met together have a best policy"
    reported = cost_name or next(iter(budgets))
    return _proposal(space, table, _costs(space, summary, reported, hardware), chosen)


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN below three pairs, or where one side is constant."""
    if len(predicted) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return math.nan
    first, second = (pd.Series(side).rank().to_numpy() for side in (predicted, measured))
    return float(np.corrcoef(first, second)[0, 1])


@lru_cache(maxsize=4096)
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
    return Proposal(policy, table.predict(policy), sum_at(costs, at))


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
    all_macs = math.fsum(info.macs for info in summary.layers)

    def figure(layer: str, precision: LayerPrecision) -> float:
        found = layer_cost(infos[layer], precision, space.options, model)
        if shares is not None:
            return shares[layer] * found.weight_bits
        if name == "mean_area_ge":
            return found.area_macs / all_macs
        value = getattr(found, name)
        if value is None:
            msg = (
                f"Hardware '{model.name}' has no figure '{name}': it needs an `array` or a "
                "`latency_table` in its file. Add one, or choose another figure."
            )
            raise CostError(msg)
        return float(value)

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
