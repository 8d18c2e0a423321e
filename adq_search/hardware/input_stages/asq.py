"""ASQ inputs: an adapter finds the factor of the step size anew for each sample."""

from __future__ import annotations

from adq_search.hardware._table import Hardware, carry_bits
from adq_search.hardware.input_stages._base import WORD_BYTES, InputWork, register_input_stage
from adq_search.quantizers.asq import MIN_CHANNELS_FOR_HIDDEN
from adq_search.tracing import LayerInfo

#: Bits of an adapter's parameters and values, as the paper's Table 1 counts them.
ADAPTER_BITS = 8


def adapter_shapes(n_channels: int) -> tuple[tuple[int, int], ...]:
    """Return `(fan-in, outputs)` of the adapter's linear layers: C -> C/4 -> 1, C -> 1 below 8."""
    hidden = n_channels // 4 if n_channels >= MIN_CHANNELS_FOR_HIDDEN else 0
    return ((n_channels, hidden), (hidden, 1)) if hidden else ((n_channels, 1),)


@register_input_stage("asq")
def adapter(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    """Channel means, then the adapter's linear layers, then beta times the step, per sample."""
    del input_bits, accumulator_bits
    shapes = adapter_shapes(layer.in_channels)
    fj = hardware.operators.multiply * ADAPTER_BITS**2  # beta times the step
    n_macs = 1
    for fan_in, n_outputs in shapes:
        width = 2 * ADAPTER_BITS + carry_bits(fan_in)
        fj += fan_in * n_outputs * hardware.uniform_fj(ADAPTER_BITS, ADAPTER_BITS, width)
        n_macs += fan_in * n_outputs
    positions = layer.n_inputs // layer.in_channels
    is_pooled = positions > 1
    sum_bits = ADAPTER_BITS + carry_bits(positions) if is_pooled else 0
    pooling_pj = layer.n_inputs * sum_bits * hardware.operators.add * 1e-3
    n_calls = layer.n_input_reads / layer.n_inputs if layer.n_inputs else 0.0
    n_parameters = sum((fan_in + 1) * n_outputs for fan_in, n_outputs in shapes)
    return InputWork(
        energy_pj=(fj * hardware.pj_per_fj + pooling_pj) * n_calls,
        stored_bytes=n_parameters * ADAPTER_BITS // 8 + WORD_BYTES,
        n_operations=round((n_macs + layer.n_inputs * is_pooled) * n_calls),
    )
