r"""The convolution of a network's first layer, whose input needs no gradient, but whose step does.

A convolution is linear in its input, so with r the gradient of the loss at its output W * q(x; s)

    dL/ds = sum r (W * dq/ds) = <W, dL/dW where the input is dq/ds>.

Float training never takes the gradient to an image, and libraries are slow at it: images have few
channels. With a second gradient to the weights in its place, the layer takes two thirds to four
fifths of the time (`results/qat_step/first_layer.py`).
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adq_search.convolution import weight_gradient
from adq_search.quantizers import InputQuantizer, LsqInput
from adq_search.quantizers._through import (
    lsq_gradient_scale,
    signed,
    step_slopes,
    uniform_values,
)

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"


def learns_step_alone(quantizer: InputQuantizer, values: Tensor) -> TypeGuard[LsqInput]:
    """Return whether of a layer's input only LSQ's step gets a gradient, here and now."""
    return (
        not values.requires_grad
        and type(quantizer) is LsqInput
        and quantizer.step.requires_grad
        and quantizer.is_initialized
        and torch.is_grad_enabled()
        and type(values) is Tensor
        and values.ndim == 4
        and not torch.is_autocast_enabled(values.device.type)
        and not quantizer.is_watched
        and not torch.compiler.is_compiling()
    )


def convolve_first(
    values: Tensor, quantizer: LsqInput, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> Tensor:
    """Return the convolution of quantized values; gradients are those of autograd within rounding.

    Args:
        values: # shape: (N, in, height, width)
        quantizer: Of the values.
        weight: Quantized, # shape: (out, in / groups, kernel height, kernel width)
        bias: # shape: (out,)
        *geometry: Stride, padding in numbers, dilation, groups.
    """
    given = (weight, bias, quantizer.step, quantizer.qmin, quantizer.qmax)
    n = quantizer.n_features(values)
    return _First.apply(values, *given, n, geometry)  # type: ignore[no-any-return]


class _First(Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        raw: Tensor,
        qmin: Tensor,
        qmax: Tensor,
        n_features: int,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(values, weight, raw, qmin, qmax)
        ctx.n_features, ctx.geometry = n_features, geometry
        quantized = uniform_values(values, raw, qmin, qmax, n_features)
        return F.conv2d(quantized, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, raw, qmin, qmax = ctx.saved_tensors

        def to_weight(inputs: Tensor) -> Tensor:
            return weight_gradient(gradients[0], inputs, weight, *ctx.geometry)

        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = to_weight(uniform_values(values, raw, qmin, qmax, ctx.n_features))
        if ctx.needs_input_grad[2]:
            grad_bias = gradients[0].sum(dim=(0, 2, 3))
        along = (to_weight(step_slopes(values, raw, qmin, qmax)) * weight).sum()
        grad_raw = signed(raw, along) * lsq_gradient_scale(qmax, ctx.n_features)
        return None, grad_weight, grad_bias, grad_raw, None, None, None, None
