"""Convolutions in two dimensions whose gradients are fast in bfloat16 too.

oneDNN takes reference code for some gradients of depthwise convolutions in bfloat16, up to fifty
times as slow as in float32 (`results/qat_step/README.md`): those to the inputs of strided ones, and
those to the weights of kernels above 3. They are taken in float32 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"


def convolve(values: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Return `torch.nn.functional.conv2d` of the arguments; gradients are its own within rounding.

    Args:
        values: # shape: (N, in, height, width)
        weight: # shape: (out, in / groups, kernel height, kernel width)
        bias: # shape: (out,)
        *geometry: Stride, padding, dilation, groups.
    """
    if _has_slow_gradients(values, weight, *geometry):
        return _Depthwise.apply(values, weight, bias, geometry)  # type: ignore[no-any-return]
    return F.conv2d(values, weight, bias, *geometry)


def _has_slow_gradients(
    values: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    _dilation: Sequence[int],
    groups: int,
) -> bool:
    return (
        groups > 1
        and weight.shape[1] == 1
        and (max(stride) > 1 or max(weight.shape[2:]) > 3)
        and values.device.type == "cpu"
        and values.ndim == 4
        and not isinstance(padding, str)
        and _dtype_of(values) == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


def _dtype_of(values: Tensor) -> torch.dtype:
    """What the convolution computes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else values.dtype


def weight_gradient(
    upstream: Tensor,
    values: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of a convolution to its weights, shape of these.

    Args:
        upstream: Gradient to the output, # shape: (N, out, height, width)
        values: The input, # shape: (N, in, height, width)
        weight: Only its shape and type count.
        stride: Of the convolution, like the rest.
        padding: In numbers.
        dilation: As above.
        groups: As above.
    """
    rest = (None, stride, padding, dilation, False, (0, 0), groups, (False, True, False))
    found: Tensor = _gradients(upstream, values, weight, *rest)[1]
    return found


class _Depthwise(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.geometry, ctx.bias_dtype = geometry, None if bias is None else bias.dtype
        half = torch.bfloat16
        offset = None if bias is None else bias.to(half)
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(values.to(half), weight.to(half), offset, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        rest = (None, stride, padding, dilation, False, (0, 0), groups)
        upstream = gradients[0]
        to_values = to_weight = None
        if ctx.needs_input_grad[0]:
            dtype = torch.float32 if max(stride) > 1 else torch.bfloat16
            # Of the values, only the shape counts.
            like = torch.empty_like(values, dtype=dtype)
            given = (upstream.to(dtype), like, weight.to(dtype))
            to_values = _gradients(*given, *rest, (True, False, False))[0].to(values.dtype)
        if ctx.needs_input_grad[1]:
            dtype = torch.float32 if max(weight.shape[2:]) > 3 else torch.bfloat16
            given = (upstream.to(dtype), values.to(dtype), weight.to(dtype))
            to_weight = weight_gradient(*given, *ctx.geometry).to(weight.dtype)
        to_bias = None
        if ctx.bias_dtype is not None:
            to_bias = upstream.float().sum(dim=(0, 2, 3)).to(ctx.bias_dtype)
        return to_values, to_weight, to_bias, None


_gradients = torch.ops.aten.convolution_backward
