r"""Batch norm, clipping and quantization in one: forward values and gradients.

Notation:
    m, v    mean and biased variance of a channel over the batch, n values
    y = clip(a x + b, low, high), a = w / sqrt(v + eps), b = bias - a m
    r       gradient at y where low < a x + b < high, else 0
    dx = a (r - mean r - (x - m) / (v + eps) mean((x - m) r))   [Ioffe2015]

References:
    [Ioffe2015] Ioffe, Szegedy: Batch normalization, ICML 2015, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adq_search.native import NativeLibrary, laid_out_as
from adq_search.norms._readers import Range
from adq_search.quantizers import LsqInput, N2uqInput
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._native import BLOCKS
from adq_search.quantizers._thresholds import (
    interval_gradients,
    knots_of,
    output_step,
    thresholds_of,
)
from adq_search.quantizers._through import lsq_gradient_scale, signed

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"

#: Arguments of each function; see `norms.cpp`.
LIBRARY = NativeLibrary(
    Path(__file__).with_name("norms.cpp"),
    {
        "statistics": "lpppffpplll",
        "clipped": "lpppppffplll",
        "clipped_backward": "lppppppffppplll",
        "uniform": "lpppppffpfppplll",
        "uniform_backward": "lppppppffpfpppppplll",
        "thresholds": "lpppppffpplpppplll",
        "thresholds_backward": "lppppppffpppplppppplll",
    },
    headers=[BLOCKS],
)


@dataclass(frozen=True, slots=True)
class Norm:
    """One call of a batch norm in training.

    Args:
        running_mean: Moved in place, # shape: (C,)
        running_variance: Moved in place, # shape: (C,)
        follow: Share of this batch in them.
        eps: Added to the variance.
        passes: What the clipping behind lets through.
    """

    running_mean: Tensor
    running_variance: Tensor
    follow: float
    eps: float
    passes: Range

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and 1 / sqrt(v + eps) of each channel, and move the running statistics."""
        mean, inverse = self.running_mean.new_empty(2, x.shape[1])
        moved = (self.running_mean, self.running_variance, self.follow, self.eps)
        LIBRARY.call("statistics", x, *moved, mean, inverse, *_sizes(x))
        return mean, inverse


def clipped(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm) -> Tensor:
    """Normalize and clip. # shape: (N, C, height, width), channels last."""
    return _Clipped.apply(x, weight, bias, norm)  # type: ignore[no-any-return]


def uniform(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, quantizer: LsqInput) -> Tensor:
    """Normalize, clip and quantize as LSQ does; shape as `clipped`."""
    return _Uniform.apply(x, weight, bias, quantizer.step, norm, quantizer)  # type: ignore[no-any-return]


def thresholds(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, quantizer: N2uqInput) -> Tensor:
    """Normalize, clip and quantize as N2UQ does; shape as `clipped`."""
    start, widths, scales = quantizer.used()
    out: Tensor = _Thresholds.apply(x, weight, bias, start, widths, *scales, quantizer.qmin, norm)
    return out


class _Clipped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Norm) -> Tensor:
        out, known = torch.empty_like(x), (weight, bias, *norm.statistics(x))
        LIBRARY.call("clipped", x, *known, *norm.passes, out, *_sizes(x))
        ctx.save_for_backward(x, *known)
        ctx.passes = norm.passes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *known = ctx.saved_tensors
        found = tuple(map(torch.empty_like, (x, *known[:2])))
        upstream = laid_out_as(gradients[0], x)
        LIBRARY.call("clipped_backward", x, upstream, *known, *ctx.passes, *found, *_sizes(x))
        return *found, None


class _Uniform(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        raw: Tensor,
        norm: Norm,
        quantizer: LsqInput,
    ) -> Tensor:
        out, known = torch.empty_like(x), (weight, bias, *norm.statistics(x))
        grid = (raw, quantizer.qmin, quantizer.qmax)
        ctx.passes, ctx.n_features = norm.passes, quantizer.n_features(x)
        LIBRARY.call("uniform", x, *known, *norm.passes, *_used(*grid), out, *_sizes(x))
        ctx.save_for_backward(x, *known, *grid)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *known, raw, qmin, qmax = ctx.saved_tensors
        found = tuple(map(torch.empty_like, (x, *known[:2], raw)))
        LIBRARY.call(
            "uniform_backward",
            *(x, laid_out_as(gradients[0], x), *known, *ctx.passes, *_used(raw, qmin, qmax)),
            *(*found, *_sizes(x)),
        )
        *others, grad_step = found
        scale = lsq_gradient_scale(qmax, ctx.n_features)
        return *others, signed(raw, grad_step) * scale, None, None


class _Thresholds(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        s: Tensor,
        a: Tensor,
        beta_1: Tensor,
        beta_2: Tensor,
        n: Tensor,
        norm: Norm,
    ) -> Tensor:
        out, index = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
        known, cuts = (weight, bias, *norm.statistics(x)), thresholds_of(knots_of(s, a), a)
        levels = (beta_1, cuts, cuts.numel(), output_step(a, beta_2), n)
        LIBRARY.call("thresholds", x, *known, *norm.passes, *levels, out, index, *_sizes(x))
        ctx.save_for_backward(x, *known, index, s, a, beta_1, beta_2, n)
        ctx.passes = norm.passes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *known, index, s, a, beta_1, beta_2, n = ctx.saved_tensors
        knots, slope = knots_of(s, a), output_step(a, beta_2) / a
        n_knots = knots.numel()
        table = (index, beta_1, knots, F.pad(slope * beta_1, (0, 1)), n_knots, n)
        sums = knots.new_empty(2 * n_knots + 1)
        found = tuple(map(torch.empty_like, (x, *known[:2])))
        LIBRARY.call(
            "thresholds_backward",
            *(x, laid_out_as(gradients[0], x), *known, *ctx.passes, *table),
            *(*found, sums, *_sizes(x)),
        )
        by_interval = (sums[:n_knots], sums[n_knots:-1], sums[-1])
        return *found, *interval_gradients(by_interval, knots, a, beta_1, slope), None, None


def _used(raw: Tensor, qmin: Tensor, qmax: Tensor) -> tuple[Tensor | float, ...]:
    return raw, EPS, qmin, qmax


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Pixels, channels, threads."""
    return x.numel() // x.shape[1], x.shape[1], torch.get_num_threads()
