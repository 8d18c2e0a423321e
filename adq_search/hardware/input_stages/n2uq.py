"""N2UQ inputs: accumulators are compared with learned thresholds."""

from __future__ import annotations

from adq_search.hardware._table import Hardware
from adq_search.hardware.input_stages._base import WORD_BYTES, InputWork, register_input_stage
from adq_search.tracing import LayerInfo


@register_input_stage("n2uq")
def thresholds(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    """Binary search among 2^b - 1 thresholds: b comparisons of an accumulator for each input.

    The layer's own accumulator width stands for that of the layer before it, which keeps the cost
    additive over layers.
    """
    comparisons = layer.n_input_reads * input_bits
    return InputWork(
        energy_pj=comparisons * accumulator_bits * hardware.operators.add * 1e-3,
        stored_bytes=(2**input_bits - 1) * WORD_BYTES + WORD_BYTES,  # thresholds, output scale
        n_operations=comparisons,
    )
