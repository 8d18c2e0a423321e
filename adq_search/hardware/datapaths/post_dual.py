"""POST with two accumulators: exact, and no table.

    y = 2^-S (E + O / sqrt 2),  E = sum of +-A 2^(S - k/2) over even exponents k,
                                O = sum of +-A 2^(S - (k-1)/2) over odd ones

E and O are exact integers; they are joined once per output. The trick is known from logarithmic
accelerators (NVIDIA US 11,886,980; LNS-Madam [Zhao2022]_); here only weights are powers.

.. [Zhao2022] Zhao et al.: LNS-Madam. IEEE Transactions on Computers, 2022.
"""

from __future__ import annotations

from adq_search.hardware._table import Hardware
from adq_search.hardware.datapaths._base import (
    Datapath,
    MacJob,
    Widths,
    joining_fj,
    shifter_size,
)
from adq_search.hardware.datapaths._registry import register_datapath


@register_datapath("post_dual")
class PostDual(Datapath):
    """Barrel shifter, one adder, two registers of W bits and a multiplexer.

    S = floor(k_max / 2)        P = b_a + S        W = P + 1 + ceil(log2 N)
    """

    name = "post_dual"
    serves = ("post",)

    def widths(self, job: MacJob) -> Widths:
        product = job.input_bits + job.largest_exponent // 2
        return Widths(product, accumulator=product + 1 + job.carry_bits, n_accumulators=2)

    def array_size(self, job: MacJob) -> float:
        return shifter_size(self.widths(job).product, job.largest_exponent // 2)

    def output_fj(self, job: MacJob, hardware: Hardware) -> float:
        return joining_fj(job, hardware, self.widths(job).accumulator, n_accumulators=2)
