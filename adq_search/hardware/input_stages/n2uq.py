"""N2UQ inputs: values are compared with learned thresholds."""

from __future__ import annotations

from adq_search.hardware._table import Hardware
from adq_search.hardware.input_stages._base import (
    SCALE_BYTES,
    InputWork,
    register_input_stage,
)
from adq_search.tracing import LayerInfo


@register_input_stage("n2uq")
def thresholds(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    """Binary search among 2^b - 1 thresholds: b comparisons of a value for each input.

    What is compared is the rescaled value between layers, as in the integer network: accumulators
    have a scale for each channel, thresholds one for all.
    """
    del accumulator_bits
    comparisons = layer.n_input_reads * input_bits
    return InputWork(
        energy_pj=comparisons * hardware.operators.carrier * hardware.operators.add * 1e-3,
        stored_bytes=2**input_bits * SCALE_BYTES,  # thresholds and the output scale
        n_operations=comparisons,
    )
