"""ASQ inputs: an adapter finds the factor of the step size anew for each sample.

The factor takes the means over the whole sample, so no input can become a code before the last one
is there: the values between layers wait in a buffer and are read once more (`moved_bits`). Widths
are those of the integer network (`adq_search.integer`).
"""

from __future__ import annotations

from adq_search.hardware._table import Hardware, carry_bits
from adq_search.hardware.input_stages._base import (
    SCALE_BYTES,
    InputWork,
    register_input_stage,
)
from adq_search.quantizers.asq import MIN_CHANNELS_FOR_HIDDEN
from adq_search.tracing import LayerInfo

#: Bits of an adapter's parameters, of the values it works on, and of a factor.
ADAPTER_BITS = 24
VALUE_BITS = 27
FACTOR_BITS = 31
#: Bits of the quotient of the one division a sample.
RECIPROCAL_BITS = 62


def adapter_shapes(n_channels: int) -> tuple[tuple[int, int], ...]:
    """Return `(fan-in, outputs)` of the adapter's linear layers: C -> C/4 -> 1, C -> 1 below 8."""
    hidden = n_channels // 4 if n_channels >= MIN_CHANNELS_FOR_HIDDEN else 0
    return ((n_channels, hidden), (hidden, 1)) if hidden else ((n_channels, 1),)


@register_input_stage("asq")
def adapter(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    """Charge pooling, the adapter, one division; a multiplication an input and an output.

    The factor divides every input of its sample and multiplies every output.
    """
    del input_bits, accumulator_bits
    n_calls = layer.n_input_reads / layer.n_inputs if layer.n_inputs else 0.0
    positions = layer.n_inputs // layer.in_channels
    carrier_bits = hardware.operators.carrier
    sum_bits = carrier_bits + carry_bits(positions)
    n_pooled = layer.n_inputs if positions > 1 else 0
    shapes = adapter_shapes(layer.in_channels)

    # A sample: means, the adapter's products and what rescales their sums, the reciprocal.
    fj = layer.in_channels * hardware.rescale_fj(sum_bits)
    n_operations = n_pooled + layer.in_channels
    for fan_in, n_outputs in shapes:
        width = VALUE_BITS + ADAPTER_BITS + carry_bits(fan_in)
        fj += fan_in * n_outputs * hardware.rescale_fj(VALUE_BITS, ADAPTER_BITS)
        fj += n_outputs * hardware.rescale_fj(width)
        n_operations += (fan_in + 1) * n_outputs
    fj += hardware.rescale_fj(RECIPROCAL_BITS, FACTOR_BITS)
    # Values: each input over the factor, each output times the factor.
    n_values = layer.n_input_reads + layer.n_output_writes
    values_fj = n_values * hardware.rescale_fj(carrier_bits, FACTOR_BITS)
    pooling_pj = n_pooled * sum_bits * hardware.operators.add * 1e-3
    n_parameters = sum((fan_in + 1) * n_outputs for fan_in, n_outputs in shapes)
    return InputWork(
        energy_pj=(fj * n_calls + values_fj) * hardware.pj_per_fj + pooling_pj * n_calls,
        stored_bytes=n_parameters * ADAPTER_BITS // 8 + SCALE_BYTES,
        n_operations=round((n_operations + 1) * n_calls) + n_values,
        moved_bits=layer.n_input_reads * int(carrier_bits),
    )
