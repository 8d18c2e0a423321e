"""Clipping and quantization in one, where others read what was clipped as well.

Behind a residual addition a ReLU is read by the next layer, which quantizes it, and by the next
shortcut. Apart, the backward pass goes over memory nine times: through the quantizer, for the sum
with what comes by the shortcut, through the ReLU. Here it does so four times, six for ASQ.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from adq_search.norms._readers import Range
from adq_search.quantizers import AsqInput, InputQuantizer, LsqInput, N2uqInput
from adq_search.quantizers._again import mark_made
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._native_functions import (
    RECTIFIED_ADAPTIVE,
    rectified_thresholds,
    rectified_uniform,
)
from adq_search.quantizers._thresholds import MIN_WIDTH, levels_again
from adq_search.quantizers._through import lsq_gradient_factor, uniform_values


def rectified(values: Tensor, passes: Range, quantizer: InputQuantizer) -> tuple[Tensor, Tensor]:
    """Clip values; return them, and them quantized.

    Args:
        values: # shape: (N, C, height, width), channels last
        passes: Range of the clipping.
        quantizer: One that `_passes.fuses`.
    """
    qmin, qmax = quantizer.qmin, quantizer.qmax
    if isinstance(quantizer, LsqInput):
        n = quantizer.n_features(values)
        grid, scale = (quantizer.step, qmin, qmax), lsq_gradient_factor(qmax, n)
        y, out = rectified_uniform(values, *passes, *grid, EPS, scale)
        return y, mark_made(out, partial(uniform_values, y, *grid, n))
    if isinstance(quantizer, N2uqInput):
        trained = quantizer.trained()
        given = (*passes, qmin, trained, MIN_WIDTH, EPS)
        y, out, index = rectified_thresholds(values, *given)
        return y, mark_made(out, partial(levels_again, y, index, qmin, trained), has_index=True)
    assert isinstance(quantizer, AsqInput)
    numbers = (*passes, *quantizer.numbers(values))
    y, out, steps = RECTIFIED_ADAPTIVE((values, *quantizer.tensors()), numbers)
    return y, mark_made(out, partial(uniform_values, y, steps, qmin, qmax, None))
