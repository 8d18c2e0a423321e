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

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adq_search.quantizers import _native, _native_functions
from adq_search.quantizers._again import mark_made
from adq_search.quantizers._calibration import EPS, computing_dtype
from adq_search.quantizers._compile import Kernel, compiles
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


def lsq_gradient_factor(qmax: Tensor, n_values: int) -> float:
    """Return `lsq_gradient_scale` as a number, for tensors on the CPU."""
    return 1.0 / math.sqrt(float(qmax) * max(1, n_values))


def uniform_through(
    values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor, *, n_features: int | None
) -> Tensor:
    """Quantize uniformly with LSQ's gradients to the values and to the step.

    Args:
        values: Any shape.
        step: One, or one for each entry of the first dimension (a channel of weights, a sample of
            inputs).
        qmin: Smallest code; one, or one for each step.
        qmax: Largest code, likewise.
        n_features: N in the gradient scale of a trained step, which is used as `positive_step`
            does. None takes positive steps as they are, and their gradient unscaled.

    Returns:
        `clip(round(values / step), qmin, qmax) * step`, in the dtype of `values`.
    """
    parameters = (step, qmin, qmax)
    if _native.takes(values, *parameters):
        smallest, scale = 0.0, 1.0
        if n_features is not None:
            smallest, scale = EPS, lsq_gradient_factor(qmax, n_features)
        return _native_functions.uniform_through(values, *parameters, smallest, scale)
    return _Uniform.apply(values, *parameters, n_features)  # type: ignore[no-any-return]


def uniform_inputs_through(
    inputs: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor, *, n_features: int | None
) -> Tensor:
    """Return `uniform_through` of inputs, which the layer's backward pass may make again."""
    out = uniform_through(inputs, step, qmin, qmax, n_features=n_features)
    return mark_made(out, partial(uniform_values, inputs, step, qmin, qmax, n_features))


def uniform_integers(values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Return clip(round(values / step), qmin, qmax) in floating point, same shape."""
    scaled = values.to(computing_dtype(values, step)) / step
    return _clip_(scaled, qmin, qmax).round_()


def clipped_through(
    values: Tensor, threshold: Tensor, unit_levels: Tensor, gradient_scale: float
) -> Tensor:
    """Quantize to the nearest of `threshold * unit_levels` with a learned clipping threshold.

    Args:
        values: Any shape.
        threshold: Trained: one, or one for each entry of the first dimension; used as
            `positive_step` does.
        unit_levels: Sorted levels from -1 to 1, # shape: (levels,)
        gradient_scale: Of the gradient to the threshold.

    Returns:
        Quantized values, in the dtype of `values`.
    """
    if _native.takes(values, threshold, unit_levels):
        return _native_functions.clipped_through(
            values, threshold, EPS, unit_levels, gradient_scale
        )
    return _Clipped.apply(values, threshold, unit_levels, gradient_scale)  # type: ignore[no-any-return]


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
        return signed(raw, gradients[0]) * gradient_scale, None


class _Uniform(Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, raw: Tensor, n: Tensor, p: Tensor, n_features: int | None
    ) -> Tensor:
        ctx.save_for_backward(v, raw, n, p)
        ctx.n_features = n_features
        return uniform_values(v, raw, n, p, n_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, raw, n, p = ctx.saved_tensors
        grad_v, grad_raw = uniform_gradients(v, gradients[0], raw, n, p, ctx.n_features)
        return grad_v, grad_raw, None, None, None


def uniform_values(v: Tensor, raw: Tensor, n: Tensor, p: Tensor, n_features: int | None) -> Tensor:
    """Return the values of `uniform_through`, without a graph."""
    smallest = 0.0 if n_features is None else EPS
    if _native.takes(v, raw, n, p):
        return _native.uniform(v, raw, smallest, n, p)
    s = _used(raw, smallest)
    if not compiles(v):
        return _uniform.function(v, s, n, p)
    order = row_order(v)
    rows = to_rows(v, order)
    return from_rows(_uniform(rows, column(s, rows), n, p), v, order)


def uniform_gradients(
    v: Tensor, upstream: Tensor, raw: Tensor, n: Tensor, p: Tensor, n_features: int | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `uniform_through` to the values and to the step."""
    smallest = 0.0 if n_features is None else EPS
    if _native.takes(v, raw, n, p):
        factor = 1.0 if n_features is None else lsq_gradient_factor(p, n_features)
        return _native.uniform_backward(v, upstream, raw, smallest, n, p, factor)
    s = _used(raw, smallest)
    if not compiles(v):
        grad_v, parts = _uniform_slopes(v, upstream, s, n, p)
        grad_s = _gathered(parts, s)
    else:
        order = row_order(v)
        rows = to_rows(v, order)
        grad_v, sums = _uniform_gradients(rows, to_rows(upstream, order), column(s, rows), n, p)
        grad_v, grad_s = from_rows(grad_v, v, order), from_column(sums, s)
    if n_features is None:
        return grad_v, grad_s
    return grad_v, signed(raw, grad_s) * lsq_gradient_scale(p, n_features)


def step_slopes(v: Tensor, raw: Tensor, n: Tensor, p: Tensor) -> Tensor:
    """Return the derivative of `uniform_values` by its one trained step, at each value."""
    if _native.takes(v, raw, n, p):
        return _native.step_slopes(v, raw, EPS, n, p)
    _, slopes = _uniform_slopes(v, torch.ones_like(v), _used(raw, EPS), n, p)
    return slopes.to(v.dtype)


def _used(raw: Tensor, smallest: float) -> Tensor:
    """The step in use, for a trained one with a positive `smallest`."""
    return raw.abs().clamp(min=smallest) if smallest else raw


def signed(raw: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient to `raw` of max(|raw|, smallest); it passes below `smallest` too."""
    return torch.where(raw < 0, -gradient, gradient)


def _gathered(parts: Tensor, like: Tensor) -> Tensor:
    """Sum elements' parts of a gradient to the shape of a parameter, rows first, as kernels do."""
    by_row = parts.sum(dim=list(range(1, parts.ndim)), keepdim=True) if parts.ndim > 1 else parts
    return by_row.to(like.dtype).sum_to_size(like.shape)


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
    def forward(
        ctx: Any, v: Tensor, raw: Tensor, unit_levels: Tensor, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(v, raw, unit_levels)
        ctx.gradient_scale = gradient_scale
        alpha = _used(raw, EPS)
        tables = nearest_tables(unit_levels.to(computing_dtype(v, alpha)))
        if _as_it_lies(v):
            return _clipped.function(v, alpha, *tables)
        order = row_order(v)
        rows = to_rows(v, order)
        out = _clipped(rows, column(alpha, rows), *tables, compiled=compiles(v))
        return from_rows(out, v, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, raw, unit_levels = ctx.saved_tensors
        alpha = _used(raw, EPS)
        tables = nearest_tables(unit_levels.to(computing_dtype(v, alpha)))
        if _as_it_lies(v):
            grad_v, parts = _clipped_slopes(v, gradients[0], alpha, *tables)
            grad_alpha = _gathered(parts, alpha)
        else:
            order = row_order(v)
            rows = to_rows(v, order)
            upstream = to_rows(gradients[0], order)
            grad_v, sums = _clipped_gradients(
                rows, upstream, column(alpha, rows), *tables, compiled=compiles(v)
            )
            grad_v, grad_alpha = from_rows(grad_v, v, order), from_column(sums, alpha)
        return grad_v, signed(raw, grad_alpha) * ctx.gradient_scale, None, None


def _as_it_lies(v: Tensor) -> bool:
    """Whether tensor operations take the values in their own shape; kernels take rows."""
    return v.is_contiguous() and not compiles(v) and not torch.compiler.is_compiling()


@Kernel
def _clipped(v: Tensor, alpha: Tensor, unit_levels: Tensor, cuts: Tensor) -> Tensor:
    q, _ = nearest_level(v.to(unit_levels.dtype) / alpha, unit_levels, cuts)
    return (q * alpha).to(v.dtype)


@Kernel
def _clipped_gradients(
    v: Tensor, upstream: Tensor, alpha: Tensor, unit_levels: Tensor, cuts: Tensor
) -> tuple[Tensor, Tensor]:
    grad_v, parts = _clipped_slopes(v, upstream, alpha, unit_levels, cuts)
    return grad_v, parts.sum(dim=1, keepdim=True).to(alpha.dtype)


def _clipped_slopes(
    v: Tensor, upstream: Tensor, alpha: Tensor, unit_levels: Tensor, cuts: Tensor
) -> tuple[Tensor, Tensor]:
    """POT and POST with a learned alpha: [Zhou2025] Eqs. 3 and 17, gradients of its public code.

    Returns:
        Gradient to v, and each element's part of the gradient to alpha.
    """
    r = upstream.to(unit_levels.dtype)
    z = v.to(r.dtype) / alpha
    q, _ = nearest_level(z, unit_levels, cuts)
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
