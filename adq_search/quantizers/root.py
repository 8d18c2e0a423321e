r"""Root-r: weights on powers of the r-th root of two, the family of which POT and POST are members.

Notation:
    Q = alpha {0, +-2^(-k/r), k = 0..K}; r = 1 is POT, r = 2 is POST, bit for bit
    K: 2^(b-1) - 2 (`levels="b_bit"`) or 2^(b-1) - 1 (`levels="eq17"`), as in `_clipped`

A multiplication by 2^(-k/r) is a shift by floor(k / r) into one of r accumulators, chosen by
k mod r; accumulator j is multiplied by the constant 2^(-j/r) once for each output, which is exact.

References:
    [Zhou2025] arXiv 2504.17263, Eqs. 3 and 17, for r = 1 and 2; see `_clipped` for the gradients.
    [Zhao2022] LNS-Madam, arXiv 2106.13914: base 2^(1/gamma) for weights and activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adq_search.policy import OptionValue
from adq_search.quantizers._base import WEIGHT_QUANTIZERS, ErrorFloor
from adq_search.quantizers._clipped import ClippedPowerWeight

#: Signal-to-noise ratio of Gaussian weights that more levels near zero cannot pass, by root.
_FLOORS: Mapping[OptionValue, ErrorFloor] = {
    1: ErrorFloor(useful_bits=4, snr_db=14.2),
    2: ErrorFloor(useful_bits=4, snr_db=20.1),
    3: ErrorFloor(useful_bits=5, snr_db=23.6),
    4: ErrorFloor(useful_bits=6, snr_db=26.1),
}


@WEIGHT_QUANTIZERS.register("root")
class RootWeight(ClippedPowerWeight):
    """Weights on `alpha * {0, +-2^(-k/r) .. +-1}`, alpha learned; meant for 5 bits and up.

    A larger root has finer levels and a smaller range: with the same bits the smallest magnitude
    is 2^(-K/r). The default is 3, the root for 5 bits; 1 and 2 are there for comparison.
    """

    name = "root"
    option_values: ClassVar[Mapping[str, tuple[OptionValue, ...]]] = {
        "root": (3, 1, 2, 4),
        **ClippedPowerWeight.option_values,
    }

    @classmethod
    def error_floor(cls, **options: OptionValue) -> ErrorFloor | None:
        """Return where the levels of this root stop helping."""
        return _FLOORS[cls.resolve_options(options)["root"]]

    def unit_levels(self, dtype: torch.dtype) -> Tensor:
        """Return the levels for alpha = 1, # shape: (n_levels,)."""
        # A division, so that whole powers of two are exact for r = 3 too.
        return self.signs.to(dtype) * torch.exp2(self.exponents.to(dtype) / -self.root)

    @property
    def root(self) -> int:
        """The root r: how many accumulators a multiply-accumulate has."""
        return int(self.options["root"])
