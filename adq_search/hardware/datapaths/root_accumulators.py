"""The root-r family: one accumulator for each remainder of the exponent, exact, and no table.

    y = 2^-S sum_j 2^(-j/r) E_j,  E_j = sum of +-A 2^(S - floor(k / r)) over exponents k = j mod r

Root 1 is the POT shifter, root 2 the POST dual accumulator (see `post_dual` for the prior art).
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

_CONSTANTS = {1: "pot", 2: "post_dual", 3: "root3", 4: "root4"}


@register_datapath("root_accumulators")
class RootAccumulators(Datapath):
    """Barrel shifter, one adder, r registers of W bits and a multiplexer.

    S = floor(k_max / r)        P = b_a + S        W = P + 1 + ceil(log2 N)
    """

    name = "root_accumulators"
    serves = ("root",)

    def _root(self, job: MacJob) -> int:
        return int(job.resolved["root"])

    def _shift(self, job: MacJob) -> int:
        return job.largest_exponent // self._root(job)

    def constants(self, job: MacJob) -> str:
        return _CONSTANTS[self._root(job)]

    def widths(self, job: MacJob) -> Widths:
        product = job.input_bits + self._shift(job)
        return Widths(product, product + 1 + job.carry_bits, n_accumulators=self._root(job))

    def array_size(self, job: MacJob) -> float:
        return shifter_size(self.widths(job).product, self._shift(job))

    def output_fj(self, job: MacJob, hardware: Hardware) -> float:
        return joining_fj(job, hardware, self.widths(job).accumulator, self._root(job))
