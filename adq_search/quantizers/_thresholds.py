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

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adq_search.quantizers import _native, _native_functions
from adq_search.quantizers._again import mark_made
from adq_search.quantizers._calibration import EPS, computing_dtype
from adq_search.quantizers._compile import Kernel, compiles
from adq_search.quantizers._intervals import interval_entry, interval_sums, padded, rank
from adq_search.quantizers._nearest import count_below
from adq_search.quantizers._rows import from_rows, row_order, to_rows
from adq_search.quantizers._through import signed

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"

#: Narrowest interval, as in the public code.
MIN_WIDTH = 1e-3


def thresholds_through(
    values: Tensor,
    start: Tensor,
    widths: Tensor,
    in_scale: Tensor,
    out_scale: Tensor,
    qmin: Tensor,
) -> Tensor:
    """Quantize by learned thresholds to equidistant levels, with N2UQ's generalized gradients.

    Args:
        values: Any shape with samples along the first dimension.
        start: Where the first interval begins (s), # shape: ()
        widths: Interval widths a_i, used as max(a_i, MIN_WIDTH), # shape: (M,)
        in_scale: beta_1, used as max(|beta_1|, EPS), # shape: ()
        out_scale: beta_2, likewise, # shape: ()
        qmin: Code of the lowest level, # shape: ()

    Returns:
        Quantized values, in the dtype of `values`.
    """
    trained = (start, widths, in_scale, out_scale)
    if _native.takes(values, qmin, *trained):
        out, index = _native_functions.thresholds_through(values, qmin, trained, MIN_WIDTH, EPS)
    else:
        out, index = _Thresholds.apply(values, qmin, *trained)
    return mark_made(out, partial(levels_again, values, index, qmin, trained), has_index=True)


def threshold_index(values: Tensor, start: Tensor, widths: Tensor, in_scale: Tensor) -> Tensor:
    """Return how many thresholds lie below each scaled value; int32, same shape."""
    used = used_intervals(start, widths, in_scale, in_scale)
    scaled = values.to(computing_dtype(values, widths)) * used.beta_1
    return count_below(scaled, used.thresholds)


class Intervals(NamedTuple):
    """N2UQ's parameters as they are used.

    Args:
        a: Widths, # shape: (M,)
        beta_1: Input scale, # shape: ()
        step: Distance beta_2 D of two output levels, # shape: ()
        knots: S_0 .. S_M, # shape: (M + 1,)
        thresholds: T_1 .. T_M, # shape: (M,)
        slopes: beta_1 beta_2 D / a_i of the interval right of each knot; 0 of the last one,
            # shape: (M + 1,)
    """

    a: Tensor
    beta_1: Tensor
    step: Tensor
    knots: Tensor
    thresholds: Tensor
    slopes: Tensor

    def gradients(self, sums: Tensor, trained: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients to start, widths and scales as they are trained.

        Args:
            sums: Over the values of each interval 1..M and of what lies beyond, of R, then of R
                times the distance from its left end; last, the sum of R times codes,
                # shape: (2 M + 3,)
            trained: Start, widths and scales, as `thresholds_through` takes them.
        """
        if _native.takes(sums, *trained):
            return tuple(_native.interval_gradients(sums, trained, MIN_WIDTH, EPS))
        _, widths, in_scale, out_scale = trained
        m, slope = self.a.numel(), self.step / self.a
        r_interval, r_distance, r_code = sums[:m], sums[m + 1 : 2 * m + 1], sums[-1]
        # Every interval pushes those after it: dg/ds = -D/a_i, and the same for a_j with j < i.
        push = slope * r_interval
        grad_s = -push.sum()
        grad_a = (push.cumsum(0) + grad_s - slope * r_distance / self.a) * (widths >= MIN_WIDTH)
        grad_beta_1 = (slope * (r_distance + self.knots[:-1] * r_interval)).sum() / self.beta_1
        scales = (signed(in_scale, grad_beta_1), signed(out_scale, r_code * (2 / m)))
        return tuple(gradient.to(widths.dtype) for gradient in (grad_s, grad_a, *scales))


def used_intervals(start: Tensor, widths: Tensor, in_scale: Tensor, out_scale: Tensor) -> Intervals:
    """Return trained parameters as they are used; arguments as of `thresholds_through`."""
    trained = (start, widths, in_scale, out_scale)
    if _native.takes(widths, *trained):
        return Intervals(*_native.used_intervals(trained, MIN_WIDTH, EPS))
    a, beta_1 = widths.clamp(min=MIN_WIDTH), in_scale.abs().clamp(min=EPS)
    step = out_scale.abs().clamp(min=EPS) * (2 / a.numel())
    knots = start + F.pad(a.cumsum(0), (1, 0))
    slopes = F.pad(step / a * beta_1, (0, 1))
    return Intervals(a, beta_1, step, knots, knots[:-1] + a / 2, slopes)


class _Thresholds(Function):
    """[Liu2022] Eqs. 8-10 (the generalized straight-through estimator), summed by interval."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor]:
        used = used_intervals(*trained)
        thresholds = used.thresholds.to(computing_dtype(x, used.a))
        order = row_order(x)
        rows, index = _quantize(
            to_rows(x, order),
            padded(thresholds),
            used.beta_1,
            used.step,
            n,
            compiled=compiles(x),
        )
        # One byte an element spares the backward pass a second search.
        ctx.save_for_backward(x, n, index, *trained, *used)
        ctx.mark_non_differentiable(index)
        return from_rows(rows, x, order), index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, n, index, *rest = ctx.saved_tensors
        trained, used = rest[:4], Intervals(*rest[4:])
        order, dtype, n_knots = row_order(x), computing_dtype(x, used.a), len(used.knots)
        rows, within, distance, r_code = _gradients(
            to_rows(x, order),
            to_rows(gradients[0], order),
            index,
            used.beta_1,
            padded(used.knots.to(dtype)),
            padded(used.slopes.to(dtype), 0.0, like=used.knots),
            n,
            compiled=compiles(x),
        )
        sums = torch.cat([within[:n_knots], distance[:n_knots], r_code.view(1)])
        return from_rows(rows, x, order), None, *used.gradients(sums, trained)


def levels_again(x: Tensor, index: Tensor, n: Tensor, trained: Sequence[Tensor]) -> Tensor:
    """Return the output of `thresholds_through` once more, from its index; without a graph."""
    step = used_intervals(*trained).step
    if _native.takes(x, step, n):
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


def equidistant_levels(a: Tensor, beta_2: Tensor, n: Tensor) -> Tensor:
    """Return N2UQ's output levels beta_2 D (i + n), i = 0..M, # shape: (M + 1,)."""
    codes = torch.arange(a.numel() + 1, dtype=a.dtype, device=a.device) + n
    return codes * (beta_2 * (2 / a.numel()))
