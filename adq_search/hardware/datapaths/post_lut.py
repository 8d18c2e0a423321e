"""POST with a table in every multiply-accumulate, as [Zhou2025]_ Eq. 18 writes it.

`post_lut` keeps f fraction bits and shifts left, so only the rounding of A / sqrt 2 errs.
`post_lut_literal` takes Eq. 18 word for word: integers are shifted right and the table's entries
are integers, so bits fall off (an output SQNR of 6 to 20 dB at 2 to 4 input bits).

.. [Zhou2025] Zhou et al.: Precision Neural Network Quantization via Learnable Adaptive Modules.
   arXiv 2504.17263.
"""

from __future__ import annotations

from adq_search.hardware._table import Hardware
from adq_search.hardware.datapaths._base import (
    Datapath,
    MacJob,
    Widths,
    shifter_size,
)
from adq_search.hardware.datapaths._registry import register_datapath
from adq_search.hardware.datapaths._rounded_root import RoundedRoot


@register_datapath("post_lut")
class PostLut(RoundedRoot):
    """One table column of 2^b_a entries (A / sqrt 2, b_a + f bits), then a shift."""

    name = "post_lut"

    def table_bits(self, job: MacJob) -> int:
        return int(2**job.input_bits) * (job.input_bits + self.fraction_bits)

    def extra_fj(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.table_energy * self.table_bits(job)

    def extra_ge(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.table_area * self.table_bits(job)


@register_datapath("post_lut_literal")
class PostLutLiteral(Datapath):
    """Eq. 18 literally: right shift for even exponents, a table of odd columns for odd ones.

    P = b_a      W = b_a + 1 + ceil(log2 N)
    """

    name = "post_lut_literal"

    def widths(self, job: MacJob) -> Widths:
        return Widths(job.input_bits, accumulator=job.input_bits + 1 + job.carry_bits)

    def is_exact(self, job: MacJob) -> bool:
        return False

    def array_size(self, job: MacJob) -> float:
        return shifter_size(job.input_bits, job.largest_exponent // 2)

    def table_bits(self, job: MacJob) -> int:
        """Return 2^b_a entries of b_a bits for each odd exponent."""
        n_odd = (job.largest_exponent + 1) // 2
        return int(2**job.input_bits) * n_odd * job.input_bits

    def extra_fj(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.literal_table_energy * self.table_bits(job)

    def extra_ge(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.literal_table_area * self.table_bits(job)
