"""POT: weights on powers of two, so that a multiplication is a shift.

References:
    [Zhou2025] arXiv 2504.17263, Eq. 3; see `_clipped` for the levels and the gradients.
"""

from __future__ import annotations

from adq_search.policy import OptionValue
from adq_search.quantizers._base import WEIGHT_QUANTIZERS, ErrorFloor
from adq_search.quantizers._clipped import ClippedPowerWeight


@WEIGHT_QUANTIZERS.register("pot")
class PotWeight(ClippedPowerWeight):
    """Weights on `alpha * {0, +-2^-k .. +-1}`, alpha learned.

    More bits add levels near zero only: the signal-to-noise ratio stops at 14.2 dB for Gaussian
    weights.
    """

    name = "pot"
    log2_base = 1.0

    @classmethod
    def error_floor(cls, **options: OptionValue) -> ErrorFloor | None:
        """Return where more bits stop helping."""
        cls.resolve_options(options)
        return ErrorFloor(useful_bits=4, snr_db=14.2)
