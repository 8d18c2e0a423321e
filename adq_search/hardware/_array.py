"""How many cycles a layer takes on an array of multiply-accumulate units.

Output-stationary: each unit keeps one output's accumulator, a row of units works on one output
position and a column on one output channel, so the fan-in passes through time. Inputs are shared
along the columns, and only within a group: a depthwise layer fills one column.

    compute cycles = groups * ceil(positions / rows) * ceil(channels of a group / columns) * N

Weights and activations arrive meanwhile (double buffers); the slowest of the three counts.
"""

from __future__ import annotations

import math

from adq_search.hardware._table import Array
from adq_search.tracing import LayerInfo


def array_cycles(
    layer: LayerInfo, stored_bits: float, activation_bits: float, array: Array
) -> float:
    """Return the cycles of one inference.

    Args:
        layer: The layer.
        stored_bits: Bits of the weights and what is stored beside them, read once.
        activation_bits: Bits of the activations moved.
        array: The array.
    """
    positions = layer.n_output_writes // layer.out_channels
    in_group = layer.out_channels // layer.groups
    tiles = math.ceil(positions / array.rows) * math.ceil(in_group / array.columns) * layer.groups
    return float(
        max(
            tiles * layer.fan_in,
            math.ceil(stored_bits / array.weight_bits_per_cycle),
            math.ceil(activation_bits / array.activation_bits_per_cycle),
        )
    )
