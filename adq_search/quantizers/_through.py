r"""Forward values and straight-through gradients, with explicit backward passes.

Each function keeps its input and its steps only, and computes the rest again in the backward pass.
Mathematics is done in at least float32, whatever the dtype of the values; sums over elements stay
in that dtype.

Notation:
    v, x    values, \\hat v quantized values
    s       step size; s_a = s \\beta step of one sample
    n, p    smallest and largest code (Q_N = -n, Q_P = p)
    alpha   clipping threshold
    r       gradient of the loss at the output, element by element

References:
    [Esser2020] Learned Step Size Quantization, ICLR 2020.
    [Zhou2025] ASQ and POST, arXiv 2504.17263.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adq_search.quantizers._calibration import EPS, computing_dtype
from adq_search.quantizers._nearest import look_up, nearest_index

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"


def positive_step(raw: Tensor, gradient_scale: Tensor) -> Tensor:
    """Return max(|raw|, EPS), whose gradient is scaled and keeps the sign of `raw`.

    Args:
        raw: Trained steps, any shape.
        gradient_scale: LSQ's g [Esser2020, section 2.2], # shape: ()

    Returns:
        Steps to use, same shape.
    """
    return _PositiveStep.apply(raw, gradient_scale)  # type: ignore[no-any-return]


def lsq_gradient_scale(qmax: Tensor, n_values: int) -> Tensor:
    """Return g = 1 / sqrt(N Q_P) [Esser2020, section 2.2], # shape: ()."""
    return torch.rsqrt(qmax * max(1, n_values))


def uniform_through(values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Quantize uniformly with LSQ's gradients to the values and to the step.

    Args:
        values: Any shape.
        step: Positive, broadcastable to `values`: one, one a channel, or one a sample.
        qmin: Smallest code, # shape: ()
        qmax: Largest code, # shape: ()

    Returns:
        `clip(round(values / step), qmin, qmax) * step`, in the dtype of `values`.
    """
    return _Uniform.apply(values, step, qmin, qmax)  # type: ignore[no-any-return]


def uniform_integers(values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Return clip(round(values / step), qmin, qmax) in floating point, same shape."""
    scaled = values.to(computing_dtype(values, step)) / step
    return _clip_(scaled, qmin, qmax).round_()


def clipped_through(values: Tensor, threshold: Tensor, unit_levels: Tensor) -> Tensor:
    """Quantize to the nearest of `threshold * unit_levels` with a learned clipping threshold.

    Args:
        values: Any shape.
        threshold: Positive, broadcastable to `values`.
        unit_levels: Sorted levels from -1 to 1, # shape: (levels,)

    Returns:
        Quantized values, in the dtype of `values`.
    """
    return _Clipped.apply(values, threshold, unit_levels)  # type: ignore[no-any-return]


def straight_through(values: Tensor, quantized: Tensor) -> Tensor:
    """Return exactly `quantized`; the gradient goes to `values` unchanged."""
    return _Identity.apply(values, quantized)  # type: ignore[no-any-return]


class _PositiveStep(Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, gradient_scale: Tensor) -> Tensor:
        ctx.save_for_backward(raw, gradient_scale)
        return raw.abs().clamp(min=EPS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raw, gradient_scale = ctx.saved_tensors
        return torch.where(raw < 0, -gradients[0], gradients[0]) * gradient_scale, None


class _Uniform(Function):
    """[Esser2020] Eqs. 1-3 and 5; [Zhou2025] Eqs. 5-7 with s_a in every place."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, s: Tensor, n: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(v, s, n, p)
        return uniform_integers(v, s, n, p).mul_(s).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, s, n, p = ctx.saved_tensors
        r = gradients[0].to(computing_dtype(v, s))
        z = _clip_(v.to(r.dtype) / s, n, p)
        # Comparisons into floating point are vectorized; boolean masks cost ten times as much.
        inside, below = torch.empty_like(z), torch.empty_like(z)
        torch.gt(z, n, out=inside)
        inside.mul_(torch.lt(z, p, out=below))
        grad_v = torch.mul(r, inside, out=below)
        # d v_hat / d s: round(z) - z inside, n below, p above.
        inside.mul_(z)
        grad_s = z.round_().sub_(inside).mul_(r).sum_to_size(s.shape)
        return grad_v.to(v.dtype), grad_s.to(s.dtype), None, None


class _Clipped(Function):
    """POT and POST with a learned alpha: [Zhou2025] Eqs. 3 and 17, gradients of its public code."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, alpha: Tensor, unit_levels: Tensor) -> Tensor:
        ctx.save_for_backward(v, alpha, unit_levels)
        z = v.to(computing_dtype(v, alpha)) / alpha
        unit_levels = unit_levels.to(z.dtype)
        return look_up(unit_levels, nearest_index(z, unit_levels)).mul(alpha).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, alpha, unit_levels = ctx.saved_tensors
        r = gradients[0].to(computing_dtype(v, alpha))
        z = v.to(r.dtype) / alpha
        unit_levels = unit_levels.to(z.dtype)
        q = look_up(unit_levels, nearest_index(z, unit_levels))
        outside = z.abs() > 1
        # d v_hat / d alpha: q - z inside, sign(v) outside, where q is -1 or 1.
        slope = q - z.masked_fill(outside, 0)
        grad_alpha = (slope * r).sum_to_size(alpha.shape)
        return r.masked_fill(outside, 0).to(v.dtype), grad_alpha.to(alpha.dtype), None


class _Identity(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, quantized: Tensor) -> Tensor:  # noqa: ARG004
        return quantized.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return gradients[0], None


def _clip_(scaled: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Clip in place; `clamp` with tensor bounds is three times as slow on CPU."""
    torch.maximum(scaled, qmin, out=scaled)
    return torch.minimum(scaled, qmax, out=scaled)
