"""Costs of many policies at once: every layer's choices once, then additions over arrays.

A policy is a row of indices, one for each group of layers that share a decision. The sums run layer
by layer in the network's order, as `cost` does, so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adq_search.errors import CostError, did_you_mean
from adq_search.hardware._file import load_hardware
from adq_search.hardware._table import Hardware
from adq_search.hardware.cost import DEFAULT_HARDWARE, layer_cost
from adq_search.hardware.figures import ADDITIVE, OPTIONAL, derived
from adq_search.policy import LayerPrecision, Options
from adq_search.tracing import ModelSummary

#: Policies added up at a time: the block's sums stay in the cache.
_BLOCK = 2048
_AVERAGES = ("average_bits_inner", "average_bits_weighted", "average_bits_layers")


class DecidedGroup(Protocol):
    """Layers that share one decision, such as a `Group` of a search space."""

    @property
    def name(self) -> str:
        """Name of the group."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Its layers."""
        ...

    @property
    def choices(self) -> tuple[LayerPrecision, ...]:
        """What they can take."""
        ...


class PolicySpace(Protocol):
    """What is needed of a `SearchSpace`."""

    @property
    def groups(self) -> Sequence[DecidedGroup]:
        """Every layer in one group."""
        ...

    @property
    def options(self) -> tuple[tuple[str, Options], ...]:
        """Options of quantizers by name."""
        ...


@dataclass(frozen=True, eq=False)
class CostTable:
    """Cost figures of every layer under every choice.

    Args:
        groups: Names of the groups, in the space's order.
        choices: The precisions that each group can take.
        figures: Names of the additive figures.
        by_layer: For each layer in the network's order, the index of its group and its figures,
            # shape: (choices, figures)
        areas: For each layer, area in gate equivalents, # shape: (choices,)
        weight_bits: For each layer, bits of a stored weight, # shape: (choices,)
        n_weights: Weights of each layer.
        n_units: Units of the hardware's array; None without one.
    """

    groups: tuple[str, ...]
    choices: tuple[tuple[LayerPrecision, ...], ...]
    figures: tuple[str, ...]
    by_layer: tuple[tuple[int, NDArray[np.float64]], ...]
    areas: tuple[NDArray[np.float64], ...]
    weight_bits: tuple[NDArray[np.float64], ...]
    n_weights: tuple[int, ...]
    n_units: int | None

    def totals(
        self, indices: NDArray[np.integer], names: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Return total cost figures of many policies, those of `cost` to the last bit.

        Args:
            indices: Which of its choices each group takes, # shape: (policies, groups)
            names: Figures to compute; None for all that `total_of` has.

        Returns:
            One array a figure, # shape: (policies,)

        Raises:
            CostError: The indices have another shape, lie out of range, or a figure is unknown.
        """
        wanted = self._checked(indices, names)
        n = len(indices)
        sums = np.zeros((n, len(self.figures)))
        largest = np.zeros(n)
        bits = np.zeros((n, len(_AVERAGES)))
        columns = self._columns(wanted)
        needs_area = "largest_area_ge" in wanted
        share = self._bit_shares() if any(a in wanted for a in _AVERAGES) else None
        by_group = np.ascontiguousarray(indices.T)
        rows = [(g, np.ascontiguousarray(rows[:, columns])) for g, rows in self.by_layer]
        found = np.zeros((n, len(columns)))
        for start in range(0, n, _BLOCK):
            block = slice(start, start + _BLOCK)
            at = by_group[:, block]
            total = found[block]
            for layer, (group, table) in enumerate(rows):
                total += table.take(at[group], axis=0)
                if needs_area:
                    np.maximum(
                        largest[block], self.areas[layer].take(at[group]), out=largest[block]
                    )
                if share is not None:
                    bits[block] += share[layer].take(at[group], axis=0)
        sums[:, columns] = found
        out = {self.figures[c]: sums[:, c] for c in columns}
        if {"mean_area_ge", "utilisation"} & set(wanted):
            out |= derived(out, self.n_units)
        out["largest_area_ge"] = largest
        out |= {name: bits[:, i] / self._bit_weights()[i] for i, name in enumerate(_AVERAGES)}
        return {name: out[name] for name in wanted}

    def indices_of(self, precisions: Sequence[Sequence[LayerPrecision]]) -> NDArray[np.int64]:
        """Return the rows of `totals` for policies given as one precision a group.

        Raises:
            CostError: A group cannot take the precision.
        """
        places = [{choice: i for i, choice in enumerate(row)} for row in self.choices]
        out = np.empty((len(precisions), len(self.groups)), dtype=np.int64)
        for row, policy in enumerate(precisions):
            for group, precision in enumerate(policy):
                if precision not in places[group]:
                    msg = f"Group '{self.groups[group]}' has no choice {precision} in this table."
                    raise CostError(msg + " Build the table from the space that has it.")
                out[row, group] = places[group][precision]
        return out

    @property
    def names(self) -> tuple[str, ...]:
        """Every figure that `totals` can give."""
        sums = tuple(name for name in self.figures if name != "area_macs")
        utilisation = ("utilisation",) if "cycles" in sums and self.n_units else ()
        return (*sums, *_AVERAGES, "largest_area_ge", "mean_area_ge", *utilisation)

    def _checked(
        self, indices: NDArray[np.integer], names: Sequence[str] | None
    ) -> tuple[str, ...]:
        n_choices = np.array([len(row) for row in self.choices])
        if indices.ndim != 2 or indices.shape[1] != len(self.groups):
            msg = (
                f"Policies are rows of one index for each of {len(self.groups)} groups, but the "
                f"array has shape {indices.shape}. Give (policies, {len(self.groups)})."
            )
            raise CostError(msg)
        if indices.size and (indices.min() < 0 or (indices.max(axis=0) >= n_choices).any()):
            msg = (
                "An index names a choice that its group does not have. Count from 0, see `choices`."
            )
            raise CostError(msg)
        for name in names or ():
            if name not in self.names:
                msg = f"This table has no figure '{name}'. {did_you_mean(name, self.names)}"
                raise CostError(msg)
        return tuple(names) if names is not None else self.names

    def _columns(self, wanted: Sequence[str]) -> list[int]:
        needed = set(wanted)
        if "mean_area_ge" in needed or "utilisation" in needed:
            needed |= {"area_macs", "macs", "cycles"}
        return [i for i, name in enumerate(self.figures) if name in needed]

    def _layer_weights(self) -> NDArray[np.float64]:
        """Return what each layer counts in the three averages, # shape: (layers, 3)."""
        n = np.array(self.n_weights, dtype=np.float64)
        inner = n.copy()
        if len(n) > 2:
            inner[[0, -1]] = 0.0
        return np.stack([inner, n, np.ones_like(n)], axis=1)

    def _bit_weights(self) -> NDArray[np.float64]:
        total: NDArray[np.float64] = self._layer_weights().sum(axis=0)
        return total

    def _bit_shares(self) -> list[NDArray[np.float64]]:
        """Return bits times weights by layer, # shape: (choices, 3) each; integers, so exact."""
        weights = self._layer_weights()
        return [b[:, None] * weights[i] for i, b in enumerate(self.weight_bits)]


def cost_table(
    summary: ModelSummary, space: PolicySpace, hardware: Hardware | str = DEFAULT_HARDWARE
) -> CostTable:
    """Return the cost of every choice of every layer, ready to be added up.

    Args:
        summary: The traced network.
        space: Which precisions each group of layers can take, such as a `SearchSpace`.
        hardware: A hardware model, its name, or the path of its YAML file.

    Raises:
        CostError: The hardware does not exist or cannot run a choice, with the layer's name.
    """
    model = load_hardware(hardware) if isinstance(hardware, str) else hardware
    group_of = {layer: i for i, group in enumerate(space.groups) for layer in group.layers}
    costs = [
        [
            layer_cost(info, precision, space.options, model)
            for precision in space.groups[group_of[info.name]].choices
        ]
        for info in summary.layers
    ]
    figures: tuple[str, ...] = (*ADDITIVE, "area_macs")
    figures += tuple(name for name in OPTIONAL if getattr(costs[0][0], name) is not None)
    return CostTable(
        groups=tuple(group.name for group in space.groups),
        choices=tuple(group.choices for group in space.groups),
        figures=figures,
        by_layer=tuple(
            (
                group_of[info.name],
                np.array([[getattr(c, f) for f in figures] for c in row], dtype=np.float64),
            )
            for info, row in zip(summary.layers, costs, strict=True)
        ),
        areas=tuple(np.array([c.area_ge for c in row], dtype=np.float64) for row in costs),
        weight_bits=tuple(
            np.array([c.weight_bits for c in row], dtype=np.float64) for row in costs
        ),
        n_weights=tuple(info.n_weights for info in summary.layers),
        n_units=model.array.n_units if model.array else None,
    )
