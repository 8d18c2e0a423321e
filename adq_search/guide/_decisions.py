"""What the guide decides: one choice for each group of layers, and for each further parameter.

Every choice names the features that move its loss away from the prediction. Groups share features
(how good is `lsq` at 3 bits, anywhere?) and have their own (how sensitive is this layer?), so that
what one layer teaches helps the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_search.hardware import CostTable
from adq_search.policy import LayerPrecision
from adq_search.quantizers import resolve_scheme
from adq_search.sensitivity import SensitivityTable
from adq_search.space import Group, SearchSpace

Floats = NDArray[np.float64]
#: A cost figure: for each group, # shape: (choices,)
Rows = tuple[Floats, ...]
#: Family, and name within it. Features of one family share one prior spread.
Feature = tuple[str, str]

#: Bumps that make a function of one number, and their width, in units of its range.
_N_BUMPS = 6
_BUMP_WIDTH = 0.25
#: Figures of a cost table that are no sum over layers.
_NOT_ADDITIVE = {"largest_area_ge", "utilisation"}


@dataclass(frozen=True, eq=False)
class Decision:
    """One choice of several.

    Args:
        name: A group's name, or a further parameter's.
        features: For each choice, the features that move its loss, with their weights.
        predicted: Loss increase that the prior predicts, nats, # shape: (choices,)
            None for a parameter that scales the loss of the whole policy, as a learning rate does.
        costs: Cost figures, # shape: (figures, choices)
        chains: Choices in an order along which the loss cannot rise: more bits, all else equal.
    """

    name: str
    features: tuple[Mapping[Feature, float], ...]
    predicted: Floats | None
    costs: Floats
    chains: tuple[tuple[int, ...], ...] = ()

    @property
    def n_choices(self) -> int:
        """Number of choices."""
        return len(self.features)


def decisions_of(
    space: SearchSpace, table: SensitivityTable | None = None, costs: Sequence[Rows] = ()
) -> tuple[Decision, ...]:
    """Return a decision for each group of a space, pinned ones too, in the space's order.

    Args:
        space: Which policies exist.
        table: Predicted loss increases. Without one, a group's quantization noise is taken to fall
            by a factor of four a bit, alike in all groups.
        costs: Cost figures of the groups' choices: those of objectives first, then of budgets.
    """
    return tuple(
        Decision(
            name=group.name,
            features=tuple(_features(group, precision) for precision in group.choices),
            predicted=np.array([_predicted(group, p, table) for p in group.choices]),
            costs=np.array([rows[g] for rows in costs]).reshape(len(costs), len(group.choices)),
            chains=tuple(_chains(group.choices)),
        )
        for g, group in enumerate(space.groups)
    )


def additive_costs(table: CostTable) -> dict[str, Rows]:
    """Return the cost of every choice of every group, by figure, for figures that are sums.

    The cost of a group's choices is counted from its first one; that of all first choices stands
    with the first group, so that sums over the groups are totals.
    """
    names = [name for name in table.names if name not in _NOT_ADDITIVE]
    sizes = [len(row) for row in table.choices]
    ends = np.cumsum(sizes)
    indices = np.zeros((sum(sizes), len(sizes)), dtype=np.int64)
    for g, (end, n) in enumerate(zip(ends, sizes, strict=True)):
        indices[end - n : end, g] = np.arange(n)
    found = table.totals(indices, names)
    out: dict[str, Rows] = {}
    for name in names:
        base = found[name][0]
        rows = np.split(found[name] - base, ends[:-1])
        out[name] = (rows[0] + base, *rows[1:])
    return out


def bit_products(space: SearchSpace) -> Rows:
    """Return weight bits times input bits of every choice: what a cost goes like, roughly."""
    return tuple(
        np.array([float((p.weight_bits or 32) * (p.input_bits or 32)) for p in group.choices])
        for group in space.groups
    )


def extra_decision(name: str, positions: Sequence[float] | int, n_costs: int) -> Decision:
    """Return a decision that scales the loss of the whole policy and costs nothing.

    Args:
        name: The parameter's name.
        positions: For an ordered parameter, where each choice lies, 0 to 1: the loss is a smooth
            function of that. For an unordered one, the number of its choices.
        n_costs: Cost figures of the decisions it stands beside.
    """
    family = f"extra {name}"
    features: list[Mapping[Feature, float]]
    if isinstance(positions, int):
        features = [{(family, str(i)): 1.0} for i in range(positions)]
    else:
        centres = np.linspace(0.0, 1.0, _N_BUMPS)
        features = [
            {
                (family, f"{centre:.2f}"): math.exp(-0.5 * ((x - centre) / _BUMP_WIDTH) ** 2)
                for centre in centres
            }
            for x in positions
        ]
    return Decision(name, tuple(features), None, np.zeros((n_costs, len(features))))


def _predicted(group: Group, precision: LayerPrecision, table: SensitivityTable | None) -> float:
    if precision.is_float:
        return 0.0
    if table is not None:
        return math.fsum(table.score(layer, precision) for layer in group.layers)
    assert precision.weight_bits is not None
    assert precision.input_bits is not None
    return 4.0**-precision.weight_bits + 4.0**-precision.input_bits


def _features(group: Group, precision: LayerPrecision) -> dict[Feature, float]:
    """Return the features of a precision: shared by all groups, and this group's own."""
    if precision.is_float:
        return {}
    pair = resolve_scheme(precision.scheme)
    names = [
        ("shared", f"{pair.weight} weights, {precision.weight_bits} bits"),
        ("shared", f"{pair.input} inputs, {precision.input_bits} bits"),
    ]
    if group.pinned is None:
        names += [
            ("group", group.name),
            ("group bits", f"{group.name}, weights, {precision.weight_bits} bits"),
            ("group bits", f"{group.name}, inputs, {precision.input_bits} bits"),
            ("group quantizers", f"{group.name}, weights, {pair.weight}"),
            ("group quantizers", f"{group.name}, inputs, {pair.input}"),
        ]
    if precision.ema_momentum is not None:
        names.append(("momentum", f"{precision.ema_momentum:g}"))
        names.append(("momentum", f"{group.name}, {precision.ema_momentum:g}"))
    return dict.fromkeys(names, 1.0)


def _chains(choices: Sequence[LayerPrecision]) -> list[tuple[int, ...]]:
    """Return the choices by rising weight bits, and by rising input bits, all else equal."""
    by_weight: dict[object, list[tuple[int, int]]] = {}
    by_input: dict[object, list[tuple[int, int]]] = {}
    for i, p in enumerate(choices):
        if p.weight_bits is None or p.input_bits is None:
            continue
        rest = (p.scheme, p.ema_momentum)
        by_weight.setdefault((rest, p.input_bits), []).append((p.weight_bits, i))
        by_input.setdefault((rest, p.weight_bits), []).append((p.input_bits, i))
    lines = [*by_weight.values(), *by_input.values()]
    return [tuple(i for _, i in sorted(line)) for line in lines if len(line) > 1]
