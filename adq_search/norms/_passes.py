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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adq_search.native import NativeLibrary, is_plain, laid_out_as
from adq_search.norms._readers import Range
from adq_search.quantizers import AsqInput, InputQuantizer, LsqInput, N2uqInput
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._native import ADAPTER, BLOCKS
from adq_search.quantizers._thresholds import Intervals, used_intervals
from adq_search.quantizers._through import lsq_gradient_factor
from adq_search.quantizers.asq import SMALLEST_FACTOR

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
        "uniform_backward": "lppppppffpfppfpppplll",
        "thresholds": "lpppppffpplpppplll",
        "rectified": "lpffpfppppfppppppppplllll",
        "rectified_backward": "lpppffpfppfppfppppppppppplllll",
        "adaptive": "lpppppffpfppppfppppppppplllll",
        "adaptive_backward": "lppppppffpfppfppfpppppppppppppplllll",
        "thresholds_backward": "lppppppffpppplppppplll",
    },
    headers=[BLOCKS, ADAPTER, *sorted(Path(__file__).parent.glob("*.hpp"))],
)


#: In the place of a hidden layer's weights and biases.
NO_LAYER = (None, None)


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


def fuses(quantizer: InputQuantizer | None) -> bool:
    """Whether a quantizer behind a norm runs in the norm's passes."""
    if isinstance(quantizer, AsqInput) and not (
        quantizer.is_adaptive
        and quantizer.channel_dim == -3
        and all(is_plain(parameter) for parameter in quantizer.parameters())
    ):
        return False
    return type(quantizer) in QUANTIZED and quantizer is not None and quantizer.is_initialized


def normalized(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, quantizer: InputQuantizer | None = None
) -> Tensor:
    """Normalize, clip, and quantize where that is asked for.

    Args:
        x: # shape: (N, C, height, width), channels last
        weight: # shape: (C,)
        bias: # shape: (C,)
        norm: The rest of the norm.
        quantizer: One that `fuses`.
    """
    if quantizer is None:
        return _Clipped.apply(x, weight, bias, norm)  # type: ignore[no-any-return]
    return QUANTIZED[type(quantizer)](x, weight, bias, norm, quantizer)


def _uniform(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, quantizer: LsqInput) -> Tensor:
    return _Uniform.apply(x, weight, bias, quantizer.step, norm, quantizer)  # type: ignore[no-any-return]


def _adaptive(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, quantizer: AsqInput) -> Tensor:
    trained = (quantizer.step, *quantizer.adapter.parameters())
    return _Adaptive.apply(x, weight, bias, norm, quantizer, *trained)  # type: ignore[no-any-return]


def _thresholds(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, by: N2uqInput) -> Tensor:
    return _Thresholds.apply(x, weight, bias, norm, by.qmin, *by.trained())  # type: ignore[no-any-return]


#: What quantizes behind a norm, by quantizer.
QUANTIZED: Mapping[type[Any], Callable[..., Tensor]] = {
    AsqInput: _adaptive,
    LsqInput: _uniform,
    N2uqInput: _thresholds,
}


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
        found = [torch.empty_like(values) for values in (x, *known[:2])]
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
        found = [torch.empty_like(values) for values in (x, *known[:2], raw)]
        LIBRARY.call(
            "uniform_backward",
            x,
            laid_out_as(gradients[0], x),
            *known,
            *ctx.passes,
            *_used(raw, qmin, qmax),
            lsq_gradient_factor(qmax, ctx.n_features),
            *found,
            *_sizes(x),
        )
        return *found, None, None


class _Thresholds(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: Norm,
        n: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        out, index = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
        known = (weight, bias, *norm.statistics(x))
        used = used_intervals(*trained)
        levels = (used.beta_1, used.thresholds, used.a.numel(), used.step, n)
        LIBRARY.call("thresholds", x, *known, *norm.passes, *levels, out, index, *_sizes(x))
        ctx.save_for_backward(x, *known, n, index, *trained, *used)
        ctx.passes = norm.passes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, *known), (n, index), trained, rest = split(ctx.saved_tensors, 5, 2, 4)
        used = Intervals(*rest)
        n_knots = used.knots.numel()
        sums = used.knots.new_empty(2 * n_knots + 1)
        found = [torch.empty_like(values) for values in (x, *known[:2])]
        LIBRARY.call(
            "thresholds_backward",
            x,
            laid_out_as(gradients[0], x),
            *known,
            *ctx.passes,
            *(index, used.beta_1, used.knots, used.slopes, n_knots, n),
            *found,
            sums,
            *_sizes(x),
        )
        return *found, None, None, *used.gradients(sums, trained)


class _Adaptive(Function):
    """As `_Uniform`, with a step s_a for each sample that an adapter finds from means of y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: Norm,
        quantizer: AsqInput,
        raw: Tensor,
        *adapter: Tensor,
    ) -> Tensor:
        out, known, sizes = torch.empty_like(x), (weight, bias, *norm.statistics(x)), by_sample(x)
        n, n_channels = x.shape[:2]
        sums, (steps, beta, outputs) = weight.new_empty(4, n, n_channels), weight.new_empty(3, n)
        *hidden, output, output_bias = adapter
        width = output.shape[-1]
        inner = weight.new_empty(n, width) if hidden else None
        LIBRARY.call(
            "adaptive",
            *(x, *known, *norm.passes, raw, EPS, *(hidden or NO_LAYER), output, output_bias),
            *(SMALLEST_FACTOR, quantizer.qmin, quantizer.qmax),
            *(sums, sums[3], steps, beta, inner, outputs, out, width, *sizes),
        )
        saved = (quantizer.qmin, quantizer.qmax, sums, steps, beta, inner, outputs)
        ctx.save_for_backward(x, *known, *saved, raw, *adapter)
        ctx.passes = norm.passes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, *known), (*grid, sums, steps, beta, inner, outputs), (raw,), adapter = split(
            ctx.saved_tensors, 5, 7, 1
        )
        found = [torch.empty_like(values) for values in (x, *known[:2], raw, *adapter)]
        *hidden, output, _ = adapter
        given: list[Tensor | float | None] = [
            *(laid_out_as(gradients[0], x), *known, *ctx.passes, raw, EPS),
            *(hidden[:1] or NO_LAYER[:1]),
            output,
            SMALLEST_FACTOR,
            *grid,
            x[0].numel(),
            *(sums, sums[3], steps, beta, inner, outputs),
        ]
        wanted: list[Tensor | None] = [*found[:4], *(() if hidden else NO_LAYER), *found[4:]]
        LIBRARY.call("adaptive_backward", x, *given, *wanted, output.shape[-1], *by_sample(x))
        return *found[:3], None, None, *found[3:]


def split(saved: tuple[Tensor, ...], *sizes: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield as many tensors as each size says, then the rest."""
    rest = iter(saved)
    for size in sizes:
        yield tuple(islice(rest, size))
    yield tuple(rest)


def by_sample(x: Tensor) -> tuple[int, int, int, int]:
    """Samples, pixels of one, channels, threads."""
    return x.shape[0], x[0, 0].numel(), x.shape[1], torch.get_num_threads()


def _used(raw: Tensor, qmin: Tensor, qmax: Tensor) -> tuple[Tensor | float, ...]:
    return raw, EPS, qmin, qmax


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Pixels, channels, threads."""
    return x.numel() // x.shape[1], x.shape[1], torch.get_num_threads()
