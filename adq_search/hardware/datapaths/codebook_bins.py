"""The codebook by bins: inputs are summed per level, levels multiply once per output.

After PASM (Garland and Gregg, TACO 2018): no multiplier in the inner loop, but a register for every
level, and a pass over the levels at the end. The cycle model takes that pass as done beside the
array, while it works on the next outputs.
"""

from __future__ import annotations

from adq_search.hardware._table import Hardware
from adq_search.hardware.datapaths._base import Datapath, MacJob, Widths
from adq_search.hardware.datapaths._registry import register_datapath


@register_datapath("codebook_bins")
class CodebookBins(Datapath):
    """One adder and 2^b_w registers of W bits, of which one is clocked.

        X = b_w b_a for the energy (another bin is read), 2^b_w W for the area
        W = b_a + ceil(log2 N)

    Args:
        level_bits: Bits of a level word, 8 or fewer.
    """

    name = "codebook_bins"

    def __init__(self, level_bits: int = 8) -> None:
        self.level_bits = level_bits

    def widths(self, job: MacJob) -> Widths:
        accumulator = job.input_bits + job.carry_bits
        return Widths(job.input_bits, accumulator, n_accumulators=job.n_words)

    def array_size(self, job: MacJob) -> float:
        return job.code_bits * job.input_bits

    def area_size(self, job: MacJob) -> float:
        widths = self.widths(job)
        return widths.n_accumulators * widths.accumulator

    def extra_fj(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.bin_energy * job.n_words

    def table_bits(self, job: MacJob) -> int:
        return job.n_levels * self.level_bits

    def output_fj(self, job: MacJob, hardware: Hardware) -> float:
        # One multiply-accumulate of a bin by its level word, for each level; their sum is as many
        # bits wider than a bin, when it is rescaled, as a level word has.
        width = self.widths(job).accumulator
        one = hardware.uniform_fj(width, self.level_bits, width + self.level_bits)
        return job.n_levels * one + hardware.rescale_fj(self.level_bits)

    def effective_bits(self, job: MacJob) -> int:
        return self.level_bits
