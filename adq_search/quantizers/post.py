"""POST: weights on powers of the square root of two.

References:
    [Zhou2025] arXiv 2504.17263, Eq. 17; see `_clipped` for the levels and the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adq_search.policy import OptionValue
from adq_search.quantizers._base import WEIGHT_QUANTIZERS, ErrorFloor
from adq_search.quantizers._clipped import ClippedPowerWeight


@WEIGHT_QUANTIZERS.register("post")
class PostWeight(ClippedPowerWeight):
    """Weights on `alpha * {0, +-sqrt2^-k .. +-1}`, alpha learned.

    Option `sqrt_half` snaps sqrt(1/2) in the levels to a fraction with few bits: then odd exponents
    are integer multiples of a power of two, and the network in integers is the same network.

    The signal-to-noise ratio stops at 20.1 dB for Gaussian weights, reached at 5 bits.
    """

    name = "post"
    log2_base = 0.5
    option_values: ClassVar[Mapping[str, tuple[OptionValue, ...]]] = {
        **ClippedPowerWeight.option_values,
        "sqrt_half": ("exact", "45/64", "181/256"),
    }

    @classmethod
    def error_floor(cls, **options: OptionValue) -> ErrorFloor | None:
        """Return where more bits stop helping."""
        cls.resolve_options(options)
        return ErrorFloor(useful_bits=4, snr_db=20.1)
