"""Clipping and quantization in one, where others read what was clipped as well.

Behind a residual addition a ReLU is read by the next layer, which quantizes it, and by the next
shortcut. Apart, the backward pass goes over memory nine times: through the quantizer, for the sum
with what comes by the shortcut, through the ReLU. Here it does so four times, seven for ASQ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adq_search.native import laid_out_as
from adq_search.norms import _passes
from adq_search.norms._passes import NO_LAYER, by_sample, split
from adq_search.norms._readers import Range
from adq_search.quantizers import AsqInput, InputQuantizer, LsqInput, N2uqInput, _native
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._native import Beside
from adq_search.quantizers._thresholds import Intervals, used_intervals
from adq_search.quantizers._through import lsq_gradient_factor
from adq_search.quantizers.asq import SMALLEST_FACTOR

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"


def rectified(values: Tensor, passes: Range, quantizer: InputQuantizer) -> tuple[Tensor, Tensor]:
    """Clip values; return them, and them quantized.

    Args:
        values: # shape: (N, C, height, width), channels last
        passes: Range of the clipping.
        quantizer: One that `_passes.fuses`.
    """
    if isinstance(quantizer, LsqInput):
        return _Uniform.apply(values, passes, quantizer, quantizer.step)  # type: ignore[no-any-return]
    if isinstance(quantizer, N2uqInput):
        return _Thresholds.apply(values, passes, quantizer, *quantizer.trained())  # type: ignore[no-any-return]
    assert isinstance(quantizer, AsqInput)
    trained = (quantizer.step, *quantizer.adapter.parameters())
    return _Adaptive.apply(values, passes, quantizer, *trained)  # type: ignore[no-any-return]


class _Uniform(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, passes: Range, quantizer: LsqInput, raw: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = F.hardtanh(values, *passes)
        ctx.save_for_backward(y, raw, quantizer.qmin, quantizer.qmax)
        ctx.passes, ctx.n_features = passes, quantizer.n_features(y)
        ctx.again = _uniform_again
        return y, _native.uniform(y, raw, EPS, quantizer.qmin, quantizer.qmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        beside, upstream = gradients
        y, raw, qmin, qmax = ctx.saved_tensors
        factor = lsq_gradient_factor(qmax, ctx.n_features)
        grad, grad_raw = _native.uniform_backward(
            y, upstream, raw, EPS, qmin, qmax, factor, beside=Beside(beside, *ctx.passes)
        )
        return grad, None, None, grad_raw


def _uniform_again(ctx: Any) -> Tensor:
    y, raw, qmin, qmax = ctx.saved_tensors
    return _native.uniform(y, raw, EPS, qmin, qmax)


class _Thresholds(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, passes: Range, quantizer: N2uqInput, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, used, n = F.hardtanh(values, *passes), used_intervals(*trained), quantizer.qmin
        q, index = _native.thresholds(y, used.beta_1, used.thresholds, used.step, n)
        ctx.save_for_backward(y, n, index, *trained, *used)
        ctx.passes = passes
        ctx.again = _thresholds_again
        return y, q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        beside, upstream = gradients
        y, n, index, *rest = ctx.saved_tensors
        trained, used = rest[:4], Intervals(*rest[4:])
        grad, sums = _native.thresholds_backward(
            *(y, upstream, index, used.beta_1, used.knots, used.slopes, n),
            beside=Beside(beside, *ctx.passes),
        )
        return grad, None, None, *used.gradients(sums, trained)


def _thresholds_again(ctx: Any) -> Tensor:
    y, n, index, *rest = ctx.saved_tensors
    return _native.thresholds_again(y, index, Intervals(*rest[4:]).step, n)


class _Adaptive(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, passes: Range, quantizer: AsqInput, raw: Tensor, *adapter: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, q, n = torch.empty_like(values), torch.empty_like(values), len(values)
        means = raw.new_empty(n, values.shape[1])
        steps, beta, outputs = raw.new_empty(3, n)
        *hidden, output, output_bias = adapter
        inner = raw.new_empty(n, output.shape[-1]) if hidden else None
        grid = (quantizer.qmin, quantizer.qmax)
        _passes.LIBRARY.call(
            "rectified",
            *(values, *passes, raw, EPS, *(hidden or NO_LAYER), output, output_bias),
            *(SMALLEST_FACTOR, *grid, y, means, steps, beta, inner, outputs, q),
            *(output.shape[-1], *by_sample(values)),
        )
        saved = (means, steps, beta, inner, outputs)
        ctx.save_for_backward(y, *grid, *saved, raw, *adapter)
        ctx.passes = passes
        ctx.again = _adaptive_again
        return y, q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y, *grid), known, (raw,), adapter = split(ctx.saved_tensors, 3, 5, 1)
        beside, upstream = (laid_out_as(gradient, y) for gradient in gradients)
        found = [torch.empty_like(tensor) for tensor in (y, raw, *adapter)]
        *hidden, output, _ = adapter
        given: list[Tensor | float | None] = [
            *(upstream, beside, *ctx.passes, raw, EPS),
            *(hidden[:1] or NO_LAYER[:1]),
            output,
            SMALLEST_FACTOR,
            *grid,
            y[0].numel(),
            *known,
        ]
        wanted: list[Tensor | None] = [*found[:2], *(() if hidden else NO_LAYER), *found[2:]]
        sizes = (output.shape[-1], *by_sample(y))
        _passes.LIBRARY.call("rectified_backward", y, *given, *wanted, *sizes)
        return found[0], None, None, *found[1:]


def _adaptive_again(ctx: Any) -> Tensor:
    y, qmin, qmax, _, steps, *_ = ctx.saved_tensors
    return _native.uniform(y, steps, 0.0, qmin, qmax)
