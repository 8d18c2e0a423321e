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

from adq_search.quantizers._calibration import computing_dtype
from adq_search.quantizers._nearest import count_below, dense, inverse, look_up

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
    return _Thresholds.apply(values, start, widths, *scales, qmin)  # type: ignore[no-any-return]


def threshold_index(values: Tensor, start: Tensor, widths: Tensor, in_scale: Tensor) -> Tensor:
    """Return how many thresholds lie below each scaled value; int32, same shape."""
    scaled = values.to(computing_dtype(values, widths)) * in_scale
    thresholds = _knots(start, widths)[:-1] + widths / 2
    return count_below(scaled, thresholds)


class _Thresholds(Function):
    """[Liu2022] Eqs. 8-10 (the generalized straight-through estimator), summed by interval."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, a: Tensor, beta_1: Tensor, beta_2: Tensor, n: Tensor
    ) -> Tensor:
        index = threshold_index(x, s, a, beta_1)
        # One byte an element spares the backward pass a second search.
        ctx.save_for_backward(x, s, a, beta_1, beta_2, n, index.to(torch.uint8))
        return look_up(equidistant_levels(a, beta_2, n), index).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, beta_1, beta_2, n, index = ctx.saved_tensors
        m, d = a.numel(), 2 / a.numel()
        index, back = dense(index)
        order = inverse(back)
        x_wide = _matrix(x.permute(order).contiguous().to(computing_dtype(x, a)))
        r = _matrix(gradients[0].permute(order).contiguous().to(x_wide.dtype))
        # S_i lies between T_i and T_(i+1): half 2i is the upper half of interval i, half 2i + 1
        # the lower half of interval i + 1. One more pair is for NaN.
        half = _matrix(index.long())
        knots = _knots(s, a).to(x_wide.dtype)
        from_knot = (x_wide * beta_1).sub_(_take(_pad(knots), half))
        half.mul_(2).add_(torch.gt(from_knot, 0, out=torch.empty_like(half)))

        slope = beta_2 * d / a
        half_slope = torch.cat([a.new_zeros(1), slope.repeat_interleave(2), a.new_zeros(3)])
        grad_x = _take((half_slope * beta_1).to(r.dtype), half).mul_(r)

        r_sum = _sum_by(half, r, 2 * m + 4).view(-1, 2)[:-1]
        moment = _sum_by(half, from_knot.mul_(r), 2 * m + 4).view(-1, 2)[:-1]
        # Sums over whole intervals 1..M of R, and of R times the distance from the left end.
        r_interval = r_sum[:-1, 1] + r_sum[1:, 0]
        r_distance = moment[:-1, 1] + moment[1:, 0] + a * r_sum[1:, 0]
        # Every interval pushes those after it: dg/ds = -D/a_i, and the same for a_j with j < i.
        push = slope * r_interval
        grad_s = -push.sum()
        grad_a = push.cumsum(0) + grad_s - slope * r_distance / a
        grad_beta_1 = (slope * (r_distance + knots[:-1] * r_interval)).sum() / beta_1
        codes = torch.arange(m + 1, dtype=r.dtype, device=r.device) + n
        grad_beta_2 = d * (codes * r_sum.sum(1)).sum()
        trained = (grad_s, grad_a, grad_beta_1, grad_beta_2)
        grad_x = grad_x.to(x.dtype).view(index.shape).permute(back)
        return grad_x, *(gradient.to(a.dtype) for gradient in trained), None


def equidistant_levels(a: Tensor, beta_2: Tensor, n: Tensor) -> Tensor:
    """Return N2UQ's output levels beta_2 D (i + n), i = 0..M, # shape: (M + 1,)."""
    codes = torch.arange(a.numel() + 1, dtype=a.dtype, device=a.device) + n
    return codes * (beta_2 * (2 / a.numel()))


def _knots(s: Tensor, a: Tensor) -> Tensor:
    """S_0 = s, S_i = s + a_1 + ... + a_i, # shape: (M + 1,)."""
    return s + torch.cat([a.new_zeros(1), a.cumsum(0)])


def _pad(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1)])


def _take(table: Tensor, indices: Tensor) -> Tensor:
    return table.index_select(0, indices.view(-1)).view(indices.shape)


def _sum_by(groups: Tensor, values: Tensor, n_groups: int) -> Tensor:
    """Sum values by group, first within rows, then over rows, # shape: (n_groups,)."""
    sums = values.new_zeros(len(values), n_groups)
    return sums.scatter_add_(1, groups, values).sum(0)


def _matrix(tensor: Tensor) -> Tensor:
    """View contiguous memory as one row a sample."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(-1)
