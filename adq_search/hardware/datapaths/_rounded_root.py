"""What the POST units that round A / sqrt 2 to f fraction bits have in common."""

from __future__ import annotations

from adq_search.hardware.datapaths._base import (
    Datapath,
    MacJob,
    Widths,
    dyadic_bits,
    shifter_size,
)


class RoundedRoot(Datapath):
    """A barrel shifter behind A or A / sqrt 2, one accumulator.

        S = floor(k_max / 2)      P = b_a + f + S      W = P + 1 + ceil(log2 N)

    Exact only where training snaps sqrt(1/2) to m / 2^t with t <= f.

    Args:
        fraction_bits: f, 0 to 8. From 2 on the error lies 12 dB below that of the inputs' own
            quantization, from 4 on 24 dB.
    """

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
