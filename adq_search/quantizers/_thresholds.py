r"""The forward and backward passes of N2UQ.

Notation:
    x       values; x' = \\beta_1 x
    s, a_i  start and widths of the M intervals; S_0 = s, S_i = S_(i-1) + a_i their knots
    T_i     thresholds S_(i-1) + a_i / 2
    D       output step 2 / M; output \\beta_2 D (i + n) for i thresholds below x'
    g       the surrogate whose gradient is used: slope D / a_i in interval i, flat outside

References:
    [Liu2022] Nonuniform-to-Uniform Quantization (N2UQ), CVPR 2022, Eqs. 8-10, and its public code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

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
    """Return how many thresholds lie below each scaled value; int64, same shape."""
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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, beta_1, beta_2, n, index = ctx.saved_tensors
        d = 2 / a.numel()
        index, back = dense(index)
        order = inverse(back)
        x_wide = _matrix(x.permute(order).contiguous().to(computing_dtype(x, a)))
        r = _matrix(gradients[0].permute(order).contiguous().to(x_wide.dtype))
        code = _matrix(index.long())

        knots = _knots(s, a)
        scaled = x_wide * beta_1
        # S_i lies between T_i and T_(i+1), so code i is interval i or i + 1; 0 and M + 1 are out.
        interval = code + (scaled > _take(knots, code))
        zero = a.new_zeros(1)
        slope = torch.cat([zero, d / a, zero])
        left = torch.cat([zero, knots[:-1], zero])

        grad_g = r * beta_2
        grad_scaled = grad_g * _take(slope, interval)
        grad_sum = _sum_by(interval, grad_g, a.numel() + 2)[1:-1]
        moment = _sum_by(interval, grad_g * (scaled - _take(left, interval)), a.numel() + 2)[1:-1]
        # Every interval pushes those after it: dg/ds = -D/a_i, and the same for a_j with j < i.
        push = d * grad_sum / a
        grad_s = -push.sum()
        grad_a = push.cumsum(0) + grad_s - d * moment / a.square()
        grad_beta_1 = (grad_scaled * x_wide).sum()
        grad_beta_2 = d * (r * (code + n)).sum()
        grad_x = (grad_scaled * beta_1).to(x.dtype).view(index.shape).permute(back)
        trained = (grad_s, grad_a, grad_beta_1, grad_beta_2)
        return grad_x, *(gradient.to(a.dtype) for gradient in trained), None


def equidistant_levels(a: Tensor, beta_2: Tensor, n: Tensor) -> Tensor:
    """Return N2UQ's output levels beta_2 D (i + n), i = 0..M, # shape: (M + 1,)."""
    codes = torch.arange(a.numel() + 1, dtype=a.dtype, device=a.device) + n
    return codes * (beta_2 * (2 / a.numel()))


def _knots(s: Tensor, a: Tensor) -> Tensor:
    """S_0 = s, S_i = s + a_1 + ... + a_i, # shape: (M + 1,)."""
    return s + torch.cat([a.new_zeros(1), a.cumsum(0)])


def _take(table: Tensor, indices: Tensor) -> Tensor:
    return table.index_select(0, indices.view(-1)).view(indices.shape)


def _sum_by(groups: Tensor, values: Tensor, n_groups: int) -> Tensor:
    """Sum values by group, first within rows, then over rows, # shape: (n_groups,)."""
    sums = values.new_zeros(len(values), n_groups)
    return sums.scatter_add_(1, groups, values).sum(0)


def _matrix(tensor: Tensor) -> Tensor:
    """View contiguous memory as one row a sample."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(-1)
