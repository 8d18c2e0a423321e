"""The quantizers' passes in C++ (`kernels.cpp`): one pass over memory each, for CPU tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from adq_search.native import NativeLibrary, laid_out_as

#: The quantizers' arithmetic, for other passes too.
BLOCKS = Path(__file__).with_name("blocks.hpp")
#: Arguments of each function; see `kernels.cpp`.
LIBRARY = NativeLibrary(
    Path(__file__).with_name("kernels.cpp"),
    headers=[BLOCKS],
    signatures={
        "uniform": "lpplfpplplll",
        "uniform_backward": "lppplfpplfpffpplll",
        "clipped": "lpplfplplll",
        "clipped_backward": "lppplfplfpplll",
        "codebook": "lpplppll",
        "thresholds": "lppplppppll",
        "thresholds_again": "lpppppll",
        "thresholds_backward": "lpppppplppffppll",
    },
)
takes = LIBRARY.takes


class Beside(NamedTuple):
    """How else a gradient reaches values that a clipping returned.

    Args:
        gradient: That gradient, shape of the values.
        low: Smallest value that the clipping lets through.
        high: Largest one.
    """

    gradient: Tensor
    low: float
    high: float


NOTHING: Final = (None, 0.0, 0.0)


def uniform(values: Tensor, raw: Tensor, smallest: float, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Return `clip(round(values / s), qmin, qmax) * s` for s = max(|raw|, smallest).

    Args:
        values: Any shape.
        raw: One step, or one for each entry of the first dimension.
        smallest: Least step in use.
        qmin: Smallest code; one, or one for each step.
        qmax: Largest code, likewise.
    """
    out = torch.empty_like(values)
    LIBRARY.call(
        "uniform",
        *(values, raw, raw.numel() > 1, smallest, qmin, qmax, qmin.numel() > 1),
        *(out, *_sizes(values, raw)),
    )
    return out


def uniform_backward(
    values: Tensor,
    upstream: Tensor,
    raw: Tensor,
    smallest: float,
    qmin: Tensor,
    qmax: Tensor,
    scale: float,
    *,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients to `values` and to `raw`, the latter times `scale`.

    With a gradient `beside`, the first is that to what was clipped into `values`.
    """
    grad_values, grad_raw = torch.empty_like(values), torch.empty_like(raw)
    LIBRARY.call(
        "uniform_backward",
        *(values, laid_out_as(upstream, values), raw, raw.numel() > 1, smallest),
        *(qmin, qmax, qmin.numel() > 1, scale, *_laid_out(beside, values)),
        *(grad_values, grad_raw, *_sizes(values, raw)),
    )
    return grad_values, grad_raw


def clipped(values: Tensor, raw: Tensor, smallest: float, unit_levels: Tensor) -> Tensor:
    """Return the nearest of `alpha * unit_levels` for alpha = max(|raw|, smallest).

    Args:
        values: Any shape.
        raw: One threshold, or one for each entry of the first dimension.
        smallest: Least threshold in use.
        unit_levels: Sorted, # shape: (levels,)
    """
    out = torch.empty_like(values)
    LIBRARY.call(
        "clipped",
        *(values, raw, raw.numel() > 1, smallest, unit_levels, unit_levels.numel()),
        *(out, *_sizes(values, raw)),
    )
    return out


def clipped_backward(
    values: Tensor,
    upstream: Tensor,
    raw: Tensor,
    smallest: float,
    unit_levels: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients to `values` and to `raw`, the latter times `scale`."""
    grad_values, grad_raw = torch.empty_like(values), torch.empty_like(raw)
    LIBRARY.call(
        "clipped_backward",
        *(values, laid_out_as(upstream, values), raw, raw.numel() > 1, smallest),
        *(unit_levels, unit_levels.numel(), scale, grad_values, grad_raw, *_sizes(values, raw)),
    )
    return grad_values, grad_raw


def codebook(weights: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest level of every weight; by level, the sum of errors and the weights' count.

    Args:
        weights: Any shape.
        levels: Sorted, # shape: (levels,)

    Returns:
        Levels; sums of weights less their level and numbers of weights, both # shape: (levels,)
    """
    out, sums = torch.empty_like(weights), levels.new_empty(2, levels.numel())
    LIBRARY.call(
        "codebook",
        *(weights, levels, levels.numel(), out, sums, weights.numel(), _threads()),
    )
    return out, sums[0], sums[1]


def thresholds(
    values: Tensor, in_scale: Tensor, cuts: Tensor, step: Tensor, qmin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (number of cuts below + qmin) * step, and that number as one byte, for each value.

    Args:
        values: Any shape; `values * in_scale` is compared with the cuts.
        in_scale: # shape: ()
        cuts: Sorted, # shape: (cuts,)
        step: Between output levels, # shape: ()
        qmin: Code of the lowest level, # shape: ()
    """
    out, index = torch.empty_like(values), torch.empty_like(values, dtype=torch.uint8)
    LIBRARY.call(
        "thresholds",
        *(values, in_scale, cuts, cuts.numel(), step, qmin, out, index, values.numel(), _threads()),
    )
    return out, index


def thresholds_again(values: Tensor, index: Tensor, step: Tensor, qmin: Tensor) -> Tensor:
    """Return the output of `thresholds` once more, from its index."""
    out = torch.empty_like(values)
    LIBRARY.call("thresholds_again", values, index, step, qmin, out, values.numel(), _threads())
    return out


def thresholds_backward(
    values: Tensor,
    upstream: Tensor,
    index: Tensor,
    in_scale: Tensor,
    knots: Tensor,
    slopes: Tensor,
    qmin: Tensor,
    *,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient to `values`, and sums over the values of each interval.

    Args:
        values: Any shape.
        upstream: Gradient of the loss at the output (R).
        index: As `thresholds` returned it.
        in_scale: # shape: ()
        knots: Where intervals begin, # shape: (knots,)
        slopes: Of the interval right of each knot, # shape: (knots,)
        qmin: Code of the lowest level, # shape: ()
        beside: As for `uniform_backward`.

    Returns:
        Gradient to the values; by interval, sums of R and of R times the distance from its left
        end, both # shape: (knots,); the sum of R times codes, # shape: ()
    """
    n = knots.numel()
    grad_values, sums = torch.empty_like(values), knots.new_empty(2 * n + 1)
    LIBRARY.call(
        "thresholds_backward",
        *(values, laid_out_as(upstream, values), index, in_scale, knots, slopes, n, qmin),
        *(*_laid_out(beside, values), grad_values, sums, values.numel(), _threads()),
    )
    return grad_values, sums[:n], sums[n:-1], sums[-1]


def _laid_out(beside: Beside | None, like: Tensor) -> tuple[Tensor | None, float, float]:
    if beside is None:
        return NOTHING
    return laid_out_as(beside.gradient, like), beside.low, beside.high


def _sizes(values: Tensor, raw: Tensor) -> tuple[int, int, int]:
    """Rows (one a parameter, or one an entry of the first dimension), columns, threads."""
    rows = values.shape[0] if raw.numel() == 1 and values.ndim > 1 else raw.numel()
    return rows, values.numel() // rows, _threads()


def _threads() -> int:
    return torch.get_num_threads()
