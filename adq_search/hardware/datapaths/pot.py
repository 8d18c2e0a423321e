"""The shifter, for weights on powers of two."""

from __future__ import annotations

from adq_search.hardware.datapaths._base import (
    Datapath,
    MacJob,
    Widths,
    shifter_size,
)
from adq_search.hardware.datapaths._registry import register_datapath


@register_datapath("pot")
class PotShift(Datapath):
    """Barrel shifter and sign, one accumulator.

    S = k_max        P = b_a + S        W = P + 1 + ceil(log2 N)
    """

    name = "pot"
    serves = ("pot",)

    def widths(self, job: MacJob) -> Widths:
        product = job.input_bits + job.largest_exponent
        return Widths(product=product, accumulator=product + 1 + job.carry_bits)

    def array_size(self, job: MacJob) -> float:
        return shifter_size(self.widths(job).product, job.largest_exponent)
