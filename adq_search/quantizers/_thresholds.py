r"""The forward and backward passes of N2UQ.

Notation:
    x       values; x' = \\beta_1 x
    s, a_i  start and widths of the M intervals; S_0 = s, S_i = S_(i-1) + a_i their knots
    T_i     thresholds S_(i-1) + a_i / 2
    D       output step 2 / M; output \\beta_2 D (i + n) for i thresholds below x'
    R       gradient of the loss at the output
    g       the surrogate whose gradient is used: slope D / a_i in interval i, flat outside

References:
    [Liu2022] Nonuniform-to-Uniform Quantization (N2UQ), CVPR 2022, Eqs. 8-10, and its public code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adq_search.quantizers import _native
from adq_search.quantizers._calibration import computing_dtype
from adq_search.quantizers._compile import Kernel, compiles
from adq_search.quantizers._intervals import interval_entry, interval_sums, padded, rank
from adq_search.quantizers._nearest import count_below
from adq_search.quantizers._rows import from_rows, row_order, to_rows

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"


def thresholds_through(
    values: Tensor, start: Tensor, widths: Tensor, scales: tuple[Tensor, Tensor], qmin: Tensor
) -> Tensor:
    """Quantize by learned thresholds to equidistant levels, with N2UQ's generalized gradients.

    Args:
        values: Any shape with samples along the first dimension.
        start: Where the first interval begins (s), # shape: ()
        widths: Positive interval widths (a_i), # shape: (M,)
        scales: Input scale beta_1 and output scale beta_2, each # shape: ()
        qmin: Code of the lowest level, # shape: ()

    Returns:
        Quantized values, in the dtype of `values`.
    """
    out: Tensor = _Thresholds.apply(values, start, widths, *scales, qmin)
    return out


def threshold_index(values: Tensor, start: Tensor, widths: Tensor, in_scale: Tensor) -> Tensor:
    """Return how many thresholds lie below each scaled value; int32, same shape."""
    scaled = values.to(computing_dtype(values, widths)) * in_scale
    return count_below(scaled, thresholds_of(knots_of(start, widths), widths))


class _Thresholds(Function):
    """[Liu2022] Eqs. 8-10 (the generalized straight-through estimator), summed by interval."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, a: Tensor, beta_1: Tensor, beta_2: Tensor, n: Tensor
    ) -> Tensor:
        thresholds = thresholds_of(knots_of(s, a), a).to(computing_dtype(x, a))
        step = output_step(a, beta_2)
        ctx.is_native = _native.takes(x, thresholds, beta_1, step, n)
        ctx.again = _levels_again
        if ctx.is_native:
            out, index = _native.thresholds(x, beta_1, thresholds, step, n)
        else:
            order = row_order(x)
            rows, index = _quantize(
                to_rows(x, order), padded(thresholds), beta_1, step, n, compiled=compiles(x)
            )
            out = from_rows(rows, x, order)
        # One byte an element spares the backward pass a second search.
        ctx.save_for_backward(x, s, a, beta_1, beta_2, n, index)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, beta_1, beta_2, n, index = ctx.saved_tensors
        dtype = computing_dtype(x, a)
        knots, slope = knots_of(s, a), output_step(a, beta_2) / a
        if ctx.is_native:
            slopes = F.pad(slope * beta_1, (0, 1))
            grad_x, r_interval, r_distance, r_code = _native.thresholds_backward(
                x, gradients[0], index, beta_1, knots, slopes, n
            )
        else:
            order = row_order(x)
            rows, r_interval, r_distance, r_code = _gradients(
                to_rows(x, order),
                to_rows(gradients[0], order),
                index,
                beta_1,
                padded(knots.to(dtype)),
                padded((slope * beta_1).to(dtype), 0.0, like=knots),
                n,
                compiled=compiles(x),
            )
            grad_x = from_rows(rows, x, order)
        trained = interval_gradients((r_interval, r_distance, r_code), knots, a, beta_1, slope)
        return grad_x, *trained, None


def interval_gradients(
    sums: tuple[Tensor, Tensor, Tensor], knots: Tensor, a: Tensor, beta_1: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to s, a, beta_1 and beta_2.

    Args:
        sums: Over the values of each interval 1..M, of R, and of R times the distance from its
            left end, # shape: (M or more,); the sum of R times codes.
        knots: S_0 .. S_M, # shape: (M + 1,)
        a: Interval widths, # shape: (M,)
        beta_1: # shape: ()
        slope: beta_2 D / a_i, # shape: (M,)
    """
    m = a.numel()
    r_interval, r_distance, r_code = sums[0][:m], sums[1][:m], sums[2]
    # Every interval pushes those after it: dg/ds = -D/a_i, and the same for a_j with j < i.
    push = slope * r_interval
    grad_s = -push.sum()
    grad_a = push.cumsum(0) + grad_s - slope * r_distance / a
    grad_beta_1 = (slope * (r_distance + knots[:-1] * r_interval)).sum() / beta_1
    found = (grad_s, grad_a, grad_beta_1, r_code * (2 / m))
    return tuple(gradient.to(a.dtype) for gradient in found)  # type: ignore[return-value]


def _levels_again(ctx: Any) -> Tensor:
    x, _, a, _, beta_2, n, index = ctx.saved_tensors
    step = output_step(a, beta_2)
    if ctx.is_native:
        return _native.thresholds_again(x, index, step, n)
    order = row_order(x)
    rows = _levels(to_rows(x, order), index, step, n, compiled=compiles(x))
    return from_rows(rows, x, order)


@Kernel
def _quantize(
    x: Tensor, thresholds: Tensor, beta_1: Tensor, step: Tensor, n: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantized values, and how many thresholds lie below each as one byte."""
    below = rank(x.to(thresholds.dtype) * beta_1, thresholds)
    return torch.where(x.isnan(), x, ((below + n) * step).to(x.dtype)), below.to(torch.uint8)


@Kernel
def _levels(x: Tensor, index: Tensor, step: Tensor, n: Tensor) -> Tensor:
    levels = (index.to(computing_dtype(x, step)) + n) * step
    return torch.where(x.isnan(), x, levels.to(x.dtype))


@Kernel
def _gradients(
    x: Tensor,
    upstream: Tensor,
    index: Tensor,
    beta_1: Tensor,
    knots: Tensor,
    slopes: Tensor,
    n: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient to x; by interval, sums of R and of R times the distance from its left end; R code.

    Slopes are those of g at x, of the interval right of each knot.
    """
    r = upstream.to(knots.dtype)
    scaled = x.to(knots.dtype) * beta_1
    # Threshold i lies within interval i, so `index` is the number of knots below, or one less.
    grad_x = r * interval_entry(scaled, knots, slopes, index)
    r_code = (r * (index.to(r.dtype) + n)).sum(dim=1).sum()
    r_interval, r_distance = interval_sums(scaled, r, knots, index)
    return grad_x.to(x.dtype), r_interval, r_distance, r_code


def output_step(a: Tensor, beta_2: Tensor) -> Tensor:
    """Return the distance beta_2 D of two output levels, # shape: ()."""
    return beta_2 * (2 / a.numel())


def equidistant_levels(a: Tensor, beta_2: Tensor, n: Tensor) -> Tensor:
    """Return N2UQ's output levels beta_2 D (i + n), i = 0..M, # shape: (M + 1,)."""
    codes = torch.arange(a.numel() + 1, dtype=a.dtype, device=a.device) + n
    return codes * output_step(a, beta_2)


def knots_of(s: Tensor, a: Tensor) -> Tensor:
    """Return S_0 = s, S_i = s + a_1 + ... + a_i, # shape: (M + 1,)."""
    return s + torch.cat([a.new_zeros(1), a.cumsum(0)])


def thresholds_of(knots: Tensor, a: Tensor) -> Tensor:
    """Return T_i = S_(i-1) + a_i / 2, # shape: (M,)."""
    return knots[:-1] + a / 2
