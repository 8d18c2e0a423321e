"""Convolutions in two dimensions whose gradients are right, and fast in bfloat16 too.

oneDNN takes reference code for some gradients of depthwise convolutions in bfloat16, up to fifty
times as slow as in float32 (`results/qat_step/README.md`): those to the inputs of strided ones, and
those to the weights of kernels above 3. They are taken in float32 here.

Of 1x1 convolutions with a stride it writes beyond its memory where a pixel has fewer channels than
a register and they lie side by side (its issue 6035; torch 2.14 on AVX2): the process dies or
hangs, or the gradient to the weights is wrong. Here such a layer reads its pixels first and has no
stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"

#: Of a gradient on its way to another type: so many are still in the cache when they are read.
_NEAR_BYTES: Final = 2**22
_CHANNELS_A_REGISTER: Final = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


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
    if is_unsound(weight, *geometry):
        stride, *rest = geometry
        return F.conv2d(pixels_read(values, stride), weight, bias, 1, *rest)
    return F.conv2d(values, weight, bias, *geometry)


def is_unsound(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    _dilation: Sequence[int],
    groups: int,
) -> bool:
    """Return whether oneDNN may write beyond its memory in a gradient, channels side by side.

    Args:
        weight: # shape: (out, in / groups, kernel height, kernel width)
        stride: Of the convolution, like the rest.
        padding: In numbers or by name.
        groups: As above.
    """
    return (
        weight.shape[1] < _CHANNELS_A_REGISTER
        and max(stride) > 1
        and groups == 1
        and weight.shape[2:] == (1, 1)
        and (padding == "valid" or not any(padding))
    )


def pixels_read(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the pixels that a 1x1 kernel reads, laid out as all: means of one pixel each.

    Args:
        values: # shape: (N, channels, height, width)
        stride: Of the convolution.
    """
    return F.avg_pool2d(values, 1, stride)


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


def _values_gradient(
    upstream: Tensor, values: Tensor, weight: Tensor, dtype: torch.dtype, *geometry: Any
) -> Tensor:
    """The gradient to the values, found in `dtype` for as many samples at a time as stay near."""
    stride, padding, dilation, groups = geometry
    rest = (None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))
    some = max(1, _NEAR_BYTES // (dtype.itemsize * values[0].numel()))
    # Of the values, only the shape counts.
    like, weight = torch.empty_like(values[:some], dtype=dtype), weight.to(dtype)
    found = torch.empty_like(values)
    for own, out in zip(upstream.split(some), found.split(some), strict=True):
        out.copy_(_gradients(own.to(dtype), like[: len(own)], weight, *rest)[0])
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
        stride = ctx.geometry[0]
        upstream = gradients[0]
        to_values = to_weight = None
        if ctx.needs_input_grad[0]:
            dtype = torch.float32 if max(stride) > 1 else torch.bfloat16
            to_values = _values_gradient(upstream, values, weight, dtype, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dtype = torch.float32 if max(weight.shape[2:]) > 3 else torch.bfloat16
            given = (upstream.to(dtype), values.to(dtype), weight.to(dtype))
            to_weight = weight_gradient(*given, *ctx.geometry).to(weight.dtype)
        to_bias = None
        if ctx.bias_dtype is not None:
            to_bias = upstream.float().sum(dim=(0, 2, 3)).to(ctx.bias_dtype)
        return to_values, to_weight, to_bias, None


_gradients = torch.ops.aten.convolution_backward
