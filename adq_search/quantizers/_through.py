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
from adq_search.quantizers._compile import Kernel, pays
from adq_search.quantizers._nearest import nearest_level, nearest_tables
from adq_search.quantizers._rows import column, from_column, from_rows, row_order, to_rows

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


def uniform_through(
    values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor, *, n_values: int
) -> Tensor:
    """Quantize uniformly with LSQ's gradients to the values and to the step.

    Args:
        values: Any shape.
        step: Positive; one, or one for each entry of the first dimension (a channel of weights, a
            sample of inputs).
        qmin: Smallest code, # shape: ()
        qmax: Largest code, # shape: ()
        n_values: Values of the layer's input, which decide whether compiling pays.

    Returns:
        `clip(round(values / step), qmin, qmax) * step`, in the dtype of `values`.
    """
    compiled = pays(n_values)
    return _Uniform.apply(values, step, qmin, qmax, compiled)  # type: ignore[no-any-return]


def uniform_integers(values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Return clip(round(values / step), qmin, qmax) in floating point, same shape."""
    scaled = values.to(computing_dtype(values, step)) / step
    return _clip_(scaled, qmin, qmax).round_()


def clipped_through(
    values: Tensor, threshold: Tensor, unit_levels: Tensor, *, n_values: int
) -> Tensor:
    """Quantize to the nearest of `threshold * unit_levels` with a learned clipping threshold.

    Args:
        values: Any shape.
        threshold: Positive; one, or one for each entry of the first dimension.
        unit_levels: Sorted levels from -1 to 1, # shape: (levels,)
        n_values: Values of the layer's input, which decide whether compiling pays.

    Returns:
        Quantized values, in the dtype of `values`.
    """
    compiled = pays(n_values)
    return _Clipped.apply(values, threshold, unit_levels, compiled)  # type: ignore[no-any-return]


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
    @staticmethod
    def forward(ctx: Any, v: Tensor, s: Tensor, n: Tensor, p: Tensor, compiled: bool) -> Tensor:
        ctx.save_for_backward(v, s, n, p)
        ctx.compiled = compiled
        ctx.again = _uniform_again
        return _uniform_rows(v, s, n, p, compiled=ctx.compiled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, s, n, p = ctx.saved_tensors
        if not ctx.compiled:
            grad_v, parts = _uniform_slopes(v, gradients[0], s, n, p)
            return grad_v, _gathered(parts, s), None, None, None
        order = row_order(v)
        rows = to_rows(v, order)
        upstream = to_rows(gradients[0], order)
        grad_v, grad_s = _uniform_gradients(rows, upstream, column(s, rows), n, p)
        return from_rows(grad_v, v, order), from_column(grad_s, s), None, None, None


def _gathered(parts: Tensor, like: Tensor) -> Tensor:
    """Sum elements' parts of a gradient to the shape of a parameter, rows first, as kernels do."""
    by_row = parts.sum(dim=list(range(1, parts.ndim)), keepdim=True) if parts.ndim > 1 else parts
    return by_row.to(like.dtype).sum_to_size(like.shape)


def _uniform_again(ctx: Any) -> Tensor:
    return _uniform_rows(*ctx.saved_tensors, compiled=ctx.compiled)


def _uniform_rows(v: Tensor, s: Tensor, n: Tensor, p: Tensor, *, compiled: bool) -> Tensor:
    if not compiled:
        return _uniform.function(v, s, n, p)
    order = row_order(v)
    rows = to_rows(v, order)
    return from_rows(_uniform(rows, column(s, rows), n, p), v, order)


@Kernel
def _uniform(v: Tensor, s: Tensor, n: Tensor, p: Tensor) -> Tensor:
    return uniform_integers(v, s, n, p).mul_(s).to(v.dtype)


@Kernel
def _uniform_gradients(
    v: Tensor, upstream: Tensor, s: Tensor, n: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    grad_v, parts = _uniform_slopes(v, upstream, s, n, p)
    return grad_v, parts.sum(dim=1, keepdim=True).to(s.dtype)


def _uniform_slopes(
    v: Tensor, upstream: Tensor, s: Tensor, n: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """[Esser2020] Eqs. 1-3 and 5; [Zhou2025] Eqs. 5-7 with s_a in every place.

    Returns:
        Gradient to v, and each element's part of the gradient to s.
    """
    r = upstream.to(computing_dtype(v, s))
    z = _clip_(v.to(r.dtype) / s, n, p)
    # Comparisons into floating point are vectorized; boolean masks cost ten times as much.
    inside, below = torch.empty_like(z), torch.empty_like(z)
    torch.gt(z, n, out=inside)
    inside.mul_(torch.lt(z, p, out=below))
    grad_v = torch.mul(r, inside, out=below).to(v.dtype)
    # d v_hat / d s: round(z) - z inside, n below, p above.
    inside.mul_(z)
    return grad_v, z.round_().sub_(inside).mul_(r)


class _Clipped(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, alpha: Tensor, unit_levels: Tensor, compiled: bool) -> Tensor:
        ctx.save_for_backward(v, alpha, unit_levels)
        ctx.compiled = compiled
        tables = nearest_tables(unit_levels.to(computing_dtype(v, alpha)))
        if not compiled and v.is_contiguous():
            return _clipped.function(v, alpha, *tables)
        order = row_order(v)
        rows = to_rows(v, order)
        out = _clipped(rows, column(alpha, rows), *tables, compiled=compiled)
        return from_rows(out, v, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, alpha, unit_levels = ctx.saved_tensors
        tables = nearest_tables(unit_levels.to(computing_dtype(v, alpha)))
        if not ctx.compiled and v.is_contiguous():
            grad_v, parts = _clipped_slopes(v, gradients[0], alpha, *tables)
            return grad_v, _gathered(parts, alpha), None, None
        order = row_order(v)
        rows = to_rows(v, order)
        upstream = to_rows(gradients[0], order)
        grad_v, grad_alpha = _clipped_gradients(
            rows, upstream, column(alpha, rows), *tables, compiled=ctx.compiled
        )
        return from_rows(grad_v, v, order), from_column(grad_alpha, alpha), None, None


@Kernel
def _clipped(v: Tensor, alpha: Tensor, unit_levels: Tensor, midpoints: Tensor) -> Tensor:
    q, _ = nearest_level(v.to(unit_levels.dtype) / alpha, unit_levels, midpoints)
    return (q * alpha).to(v.dtype)


@Kernel
def _clipped_gradients(
    v: Tensor, upstream: Tensor, alpha: Tensor, unit_levels: Tensor, midpoints: Tensor
) -> tuple[Tensor, Tensor]:
    grad_v, parts = _clipped_slopes(v, upstream, alpha, unit_levels, midpoints)
    return grad_v, parts.sum(dim=1, keepdim=True).to(alpha.dtype)


def _clipped_slopes(
    v: Tensor, upstream: Tensor, alpha: Tensor, unit_levels: Tensor, midpoints: Tensor
) -> tuple[Tensor, Tensor]:
    """POT and POST with a learned alpha: [Zhou2025] Eqs. 3 and 17, gradients of its public code.

    Returns:
        Gradient to v, and each element's part of the gradient to alpha.
    """
    r = upstream.to(unit_levels.dtype)
    z = v.to(r.dtype) / alpha
    q, _ = nearest_level(z, unit_levels, midpoints)
    outside = z.abs() > 1
    # d v_hat / d alpha: q - z inside, sign(v) outside, where q is -1 or 1.
    slope = q - z.masked_fill(outside, 0)
    return r.masked_fill(outside, 0).to(v.dtype), slope * r


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
