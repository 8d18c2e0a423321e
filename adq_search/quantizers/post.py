"""POST: weights on powers of the square root of two.

References:
    [Zhou2025] arXiv 2504.17263, Eq. 17; see `_clipped` for the levels and the gradients.
"""

from __future__ import annotations

from adq_search.quantizers._base import WEIGHT_QUANTIZERS
from adq_search.quantizers._clipped import ClippedPowerWeight


@WEIGHT_QUANTIZERS.register("post")
class PostWeight(ClippedPowerWeight):
    """Weights on `alpha * {0, +-sqrt2^-k .. +-1}`, alpha learned.

    The signal-to-noise ratio stops at 20.1 dB for Gaussian weights, reached at 5 bits.
    """

    name = "post"
    log2_base = 0.5
