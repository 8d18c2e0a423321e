"""The codebook multiplier (ADQ): a code looks up a level word for an integer multiplier."""

from __future__ import annotations

import math

from adq_search.hardware._table import Hardware
from adq_search.hardware.datapaths._base import Datapath, MacJob, Widths
from adq_search.hardware.datapaths._registry import register_datapath


@register_datapath("codebook")
class Codebook(Datapath):
    """Table of 2^b_w level words, then a multiplier as wide as the word, whatever b_w is.

        X = b_a level_bits        W = b_a + level_bits + ceil(log2 N)

    The words are wired in and a new weight is decoded every cycle; a weight-stationary array
    decodes once a weight and saves the look-up. Words that can be loaded belong to the edge of the
    array: a decoder for each row costs its units about what the wired table costs each.

    Args:
        level_bits: Bits of a level word, 8 or fewer.
    """

    name = "codebook"
    serves = ("adq",)

    def __init__(self, level_bits: int = 8) -> None:
        self.level_bits = level_bits

    def widths(self, job: MacJob) -> Widths:
        product = job.input_bits + self.level_bits
        return Widths(product, accumulator=product + job.carry_bits)

    def array_size(self, job: MacJob) -> float:
        return job.input_bits * self.level_bits

    def table_bits(self, job: MacJob) -> int:
        return job.n_levels * self.level_bits

    def _rom_size(self, job: MacJob) -> float:
        """What the logic of the table grows with: sorted words share gates, so not with 2^b_w."""
        return math.sqrt(job.n_words) * self.level_bits

    def extra_fj(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.rom_energy * self._rom_size(job)

    def extra_ge(self, job: MacJob, hardware: Hardware) -> float:
        return hardware.operators.rom_area * self._rom_size(job)

    def effective_bits(self, job: MacJob) -> int:
        return self.level_bits
