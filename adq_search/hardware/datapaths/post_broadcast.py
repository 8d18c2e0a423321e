"""POST with A and A / sqrt 2 prepared once per activation and shared by all output channels.

Every multiply-accumulate only picks one of the two by the parity of the exponent and shifts it.
The rounding of A / sqrt 2 to f fraction bits is the one error: the SQNR is about
6.1 (b_a + f) + 2 dB. Where training snaps sqrt(1/2) to m / 2^t and f >= t, there is none.
"""

from __future__ import annotations

from adq_search.hardware._table import Hardware
from adq_search.hardware.datapaths._base import (
    Datapath,
    MacJob,
    Widths,
    constant_rows,
    dyadic_bits,
    shifter_size,
)
from adq_search.hardware.datapaths._registry import register_datapath


@register_datapath("post_broadcast")
class PostBroadcast(Datapath):
    """Multiplexer and barrel shifter, one accumulator.

        S = floor(k_max / 2)      P = b_a + f + S      W = P + 1 + ceil(log2 N)

    Args:
        fraction_bits: f, 0 to 8. From 2 on the error lies 12 dB below that of the inputs' own
            quantization, from 4 on 24 dB.
    """

    name = "post_broadcast"

    def __init__(self, fraction_bits: int = 2) -> None:
        self.fraction_bits = fraction_bits

    def widths(self, job: MacJob) -> Widths:
        product = job.input_bits + self.fraction_bits + job.largest_exponent // 2
        return Widths(product, accumulator=product + 1 + job.carry_bits)

    def is_exact(self, job: MacJob) -> bool:
        needed = dyadic_bits(job)
        return needed is not None and self.fraction_bits >= needed

    def array_size(self, job: MacJob) -> float:
        return shifter_size(self.widths(job).product, job.largest_exponent // 2)

    def _scaler_bits(self, job: MacJob, hardware: Hardware) -> float:
        """Partial-product bits of the constant multiplier: r rows of b_a + r - 1."""
        rows = constant_rows(job, hardware)
        return rows * (job.input_bits + rows - 1)

    def input_fj(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.multiply * self._scaler_bits(job, hardware)

    def extra_ge(self, job: MacJob, hardware: Hardware) -> float:
        scaler_ge = hardware.operators.multiply_area * self._scaler_bits(job, hardware)
        return scaler_ge / max(job.n_sharing, 1)
