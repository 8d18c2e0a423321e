"""The integer multiplier, for uniform weights and for levels that happen to be integers."""

from __future__ import annotations

from adq_search.hardware.datapaths._base import Datapath, MacJob, Widths
from adq_search.hardware.datapaths._registry import register_datapath

#: A ternary weight selects +A, 0 or -A: no array at all, so it was fitted by itself.
TERNARY_BITS = 2
WIDEST = 8


@register_datapath("uniform")
class Uniform(Datapath):
    """Array multiplier of b_a x b_w bits, one accumulator.

    Levels of `pot` are integers 2^S .. 1 too, and so is the one magnitude of 2-bit `post`: such
    weights run here as (S + 2)-bit integers where that is legal.

        X = b_a b_w        W = b_a + b_w + ceil(log2 N)
    """

    name = "uniform"
    serves = ("lsq",)

    def multiplier_bits(self, job: MacJob) -> int:
        """Return the bits of the weight operand."""
        if job.quantizer in {"pot", "post"}:
            return job.largest_exponent + 2
        return job.weight_bits

    def misfit(self, job: MacJob) -> str | None:
        if job.quantizer == "post" and job.largest_exponent > 0:
            return "its levels are no integers (odd powers of sqrt 2). Use a POST datapath."
        if self.multiplier_bits(job) > WIDEST:
            return (
                f"its levels span {self.multiplier_bits(job)}-bit integers, more than {WIDEST}. "
                "Use a shifter."
            )
        return None

    def constants(self, job: MacJob) -> str:
        return "uniform_2bit" if self.multiplier_bits(job) == TERNARY_BITS else "uniform"

    def widths(self, job: MacJob) -> Widths:
        product = job.input_bits + self.multiplier_bits(job)
        return Widths(product=product, accumulator=product + job.carry_bits)

    def array_size(self, job: MacJob) -> float:
        return job.input_bits * self.multiplier_bits(job)

    def effective_bits(self, job: MacJob) -> int:
        return 1 if job.quantizer in {"pot", "post"} else job.weight_bits
