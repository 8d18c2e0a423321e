"""LSQ inputs: the layer before rescales its accumulators into codes; nothing is left to do.

Where several layers read one tensor, or a residual addition stands between, the integer network
rescales such inputs once more. A cost that adds up over layers cannot see that; it is not charged.
"""

from __future__ import annotations

from adq_search.hardware._table import Hardware
from adq_search.hardware.input_stages._base import SCALE_BYTES, InputWork, register_input_stage
from adq_search.tracing import LayerInfo


@register_input_stage("lsq")
def plain_input(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    """Return the storage of one step."""
    del layer, input_bits, accumulator_bits, hardware
    return InputWork(energy_pj=0.0, stored_bytes=SCALE_BYTES)
