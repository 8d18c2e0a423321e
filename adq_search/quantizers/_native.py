"""The quantizers' passes in C++ (`kernels.cpp`): one pass over memory each, for CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adq_search.native import NativeLibrary, laid_out_as
from adq_search.native_function import NativeFunction

#: The quantizers' arithmetic, for other passes too.
BLOCKS, INTERVALS, ADAPTER = (
    Path(__file__).with_name(f"{name}.hpp") for name in ("blocks", "intervals", "adapter")
)
#: Arguments of each function; see `kernels.cpp`.
LIBRARY = NativeLibrary(
    Path(__file__).with_name("kernels.cpp"),
    headers=[BLOCKS, INTERVALS, ADAPTER],
    signatures={
        "uniform": "lpplfpplplll",
        "uniform_backward": "lppplfpplfpffpplll",
        "clipped": "lpplfplplll",
        "clipped_backward": "lppplfplfpplll",
        "codebook": "lpplppll",
        "thresholds": "lppplppppll",
        "rectified_uniform": "lpffpfpppplll",
        "rectified_thresholds": "lpffpplpppppll",
        "thresholds_again": "lpppppll",
        "thresholds_backward": "lpppppplppffppll",
        "follow": "lpppl",
        "used_intervals": "lpppplffpppppp",
        "interval_gradients": "lpppplffppppp",
        "adapted_steps": "lppfppppfpppplllll",
        "adapted_steps_backward": "lpppfpfppfppppppppplllll",
    },
)
takes = LIBRARY.takes

# Functions with all their gradients.
#: `uniform` with the gradients to the values and to the raw steps.
UNIFORM = NativeFunction(
    LIBRARY,
    inputs="values raw qmin qmax",
    numbers="by_row smallest ranged scale rows columns threads",
    rooms={"out": "like values"},
    outputs="out",
    forward=["uniform values raw by_row smallest qmin qmax ranged out rows columns threads"],
    backward=[
        "uniform_backward values upstream_out raw by_row smallest qmin qmax ranged scale"
        " none none none grad_values grad_raw rows columns threads"
    ],
)
#: `clipped` with the gradients to the values and to the raw thresholds.
CLIPPED = NativeFunction(
    LIBRARY,
    inputs="values raw levels",
    numbers="by_row smallest n_levels scale rows columns threads",
    rooms={"out": "like values"},
    outputs="out",
    forward=["clipped values raw by_row smallest levels n_levels out rows columns threads"],
    backward=[
        "clipped_backward values upstream_out raw by_row smallest levels n_levels scale"
        " grad_values grad_raw rows columns threads"
    ],
)

_FOLLOWED = "weights codebook momentum", "n_levels twice n_weights threads"
#: `codebook`, whose gradient passes to the weights unchanged.
CODEBOOK = NativeFunction(
    LIBRARY,
    inputs=_FOLLOWED[0],
    numbers=_FOLLOWED[1],
    rooms={"out": "like weights", "sums": "floats twice"},
    outputs="out",
    forward=["codebook weights codebook n_levels out sums n_weights threads"],
    passed={"weights": "out"},
)
#: The same; then the codebook follows the weights.
FOLLOWING_CODEBOOK = NativeFunction(
    LIBRARY,
    inputs=_FOLLOWED[0],
    numbers=_FOLLOWED[1],
    rooms={"out": "like weights", "sums": "floats twice"},
    outputs="out",
    forward=[
        "codebook weights codebook n_levels out sums n_weights threads",
        "follow codebook sums momentum n_levels",
    ],
    passed={"weights": "out"},
)
#: N2UQ's trained parameters; as they are used; their gradients. For norms too.
TRAINED = "start widths in_scale out_scale"
USED_INTERVALS = f"used_intervals {TRAINED} n_cuts narrowest smallest a knots cuts slopes beta step"
INTERVAL_ROOMS = {
    **{"a": "floats n_cuts", "knots": "floats n_knots", "cuts": "floats n_cuts"},
    **{"slopes": "floats n_knots", "beta": "floats", "step": "floats"},
    "sums": "floats n_sums",
}
INTERVAL_NUMBERS = "n_cuts n_knots n_sums narrowest smallest"
INTERVAL_GRADIENTS = (
    f"interval_gradients {TRAINED} n_cuts narrowest smallest sums"
    " grad_start grad_widths grad_in_scale grad_out_scale"
)
#: `thresholds` with all gradients, from the trained parameters.
THRESHOLDS = NativeFunction(
    LIBRARY,
    inputs=f"values qmin {TRAINED}",
    numbers=f"{INTERVAL_NUMBERS} n_values threads",
    rooms={"out": "like values", "index": "bytes like values", **INTERVAL_ROOMS},
    outputs="out index",
    forward=[
        USED_INTERVALS,
        "thresholds values beta cuts n_cuts step qmin out index n_values threads",
    ],
    backward=[
        "thresholds_backward values upstream_out index beta knots slopes n_knots qmin"
        " none none none grad_values sums n_values threads",
        INTERVAL_GRADIENTS,
    ],
)

#: A clipping and `uniform` behind it; what was clipped is returned too.
RECTIFIED_UNIFORM = NativeFunction(
    LIBRARY,
    inputs="values raw qmin qmax",
    numbers="low high smallest scale rows columns threads",
    rooms={"y": "like values", "out": "like values"},
    outputs="y out",
    forward=["rectified_uniform values low high raw smallest qmin qmax y out rows columns threads"],
    backward=[
        "uniform_backward y upstream_out raw none smallest qmin qmax none scale"
        " upstream_y low high grad_values grad_raw rows columns threads"
    ],
)
#: A clipping and `thresholds` behind it, likewise.
RECTIFIED_THRESHOLDS = NativeFunction(
    LIBRARY,
    inputs=f"values qmin {TRAINED}",
    numbers=f"low high {INTERVAL_NUMBERS} n_values threads",
    rooms={
        **{"y": "like values", "out": "like values", "index": "bytes like values"},
        **INTERVAL_ROOMS,
    },
    outputs="y out index",
    forward=[
        USED_INTERVALS,
        "rectified_thresholds values low high beta cuts n_cuts step qmin y out index"
        " n_values threads",
    ],
    backward=[
        "thresholds_backward y upstream_out index beta knots slopes n_knots qmin"
        " upstream_y low high grad_values sums n_values threads",
        INTERVAL_GRADIENTS,
    ],
)


#: No other way for gradients to reach the values, and no clipping.
NOTHING_BESIDE: Final = (None, 0.0, 0.0)


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
) -> tuple[Tensor, Tensor]:
    """Return the gradients to `values` and to `raw`, the latter times `scale`."""
    grad_values, grad_raw = torch.empty_like(values), torch.empty_like(raw)
    LIBRARY.call(
        "uniform_backward",
        *(values, laid_out_as(upstream, values), raw, raw.numel() > 1, smallest),
        *(qmin, qmax, qmin.numel() > 1, scale, *NOTHING_BESIDE),
        *(grad_values, grad_raw, *_sizes(values, raw)),
    )
    return grad_values, grad_raw


def uniform_through(
    values: Tensor, raw: Tensor, qmin: Tensor, qmax: Tensor, smallest: float, scale: float
) -> Tensor:
    """Return `uniform` with its gradients, that to `raw` times `scale`."""
    numbers = (raw.numel() > 1, smallest, qmin.numel() > 1, scale, *_sizes(values, raw))
    return UNIFORM((values, raw, qmin, qmax), numbers)[0]


def rectified_uniform(
    values: Tensor,
    low: float,
    high: float,
    raw: Tensor,
    qmin: Tensor,
    qmax: Tensor,
    smallest: float,
    scale: float,
) -> list[Tensor]:
    """Return the values clipped to [low, high], and `uniform_through` of that by one step."""
    numbers = (low, high, smallest, scale, *_sizes(values, raw))
    return RECTIFIED_UNIFORM((values, raw, qmin, qmax), numbers)


def clipped_through(
    values: Tensor, raw: Tensor, smallest: float, unit_levels: Tensor, scale: float
) -> Tensor:
    """Return the nearest of `alpha * unit_levels` for alpha = max(|raw|, smallest).

    Args:
        values: Any shape.
        raw: One threshold, or one for each entry of the first dimension.
        smallest: Least threshold in use.
        unit_levels: Sorted, # shape: (levels,)
        scale: Of the gradient to `raw`.
    """
    numbers = (raw.numel() > 1, smallest, unit_levels.numel(), scale, *_sizes(values, raw))
    return CLIPPED((values, raw, unit_levels), numbers)[0]


def codebook_through(
    weights: Tensor, codebook: Tensor, momentum: Tensor, *, follows: bool
) -> Tensor:
    """Return the nearest level of every weight; the gradient passes unchanged.

    Args:
        weights: Any shape.
        codebook: Sorted levels, # shape: (levels,)
        momentum: m, # shape: ()
        follows: Move the codebook afterwards, as `moved_codebook` says.
    """
    n = codebook.numel()
    function = FOLLOWING_CODEBOOK if follows else CODEBOOK
    numbers = (n, 2 * n, weights.numel(), _threads())
    return function((weights, codebook, momentum), numbers)[0]


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


def thresholds_through(
    values: Tensor, qmin: Tensor, trained: Sequence[Tensor], narrowest: float, smallest: float
) -> tuple[Tensor, Tensor]:
    """Return N2UQ's levels, with all gradients, and how many thresholds lie below, as one byte.

    Args:
        values: Any shape.
        qmin: Code of the lowest level, # shape: ()
        trained: Start, widths and scales, as `used_intervals` takes them.
        narrowest: Least width in use.
        smallest: Least scale in use.
    """
    numbers = interval_numbers(trained[1], narrowest, smallest)
    out, index = THRESHOLDS((values, qmin, *trained), (*numbers, values.numel(), _threads()))
    return out, index


def rectified_thresholds(
    values: Tensor,
    low: float,
    high: float,
    qmin: Tensor,
    trained: Sequence[Tensor],
    narrowest: float,
    smallest: float,
) -> list[Tensor]:
    """Return the values clipped to [low, high], and `thresholds_through` of that."""
    numbers = (low, high, *interval_numbers(trained[1], narrowest, smallest))
    sizes = (values.numel(), _threads())
    return RECTIFIED_THRESHOLDS((values, qmin, *trained), (*numbers, *sizes))


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


def used_intervals(trained: Sequence[Tensor], narrowest: float, smallest: float) -> list[Tensor]:
    """Return N2UQ's parameters as they are used: a, beta_1, step, knots, thresholds and slopes.

    Args:
        trained: Start, widths and scales, as `thresholds_through` takes them.
        narrowest: Least width in use.
        smallest: Least scale in use.
    """
    start, widths, *scales = trained
    m = widths.numel()
    a, knots, cuts, slopes = (widths.new_empty(n) for n in (m, m + 1, m, m + 1))
    beta, step = widths.new_empty(2)
    used = (a, knots, cuts, slopes, beta, step)
    LIBRARY.call("used_intervals", start, widths, *scales, m, narrowest, smallest, *used)
    return [a, beta, step, knots, cuts, slopes]


def interval_numbers(widths: Tensor, narrowest: float, smallest: float) -> tuple[float, ...]:
    """Return `INTERVAL_NUMBERS`."""
    m = widths.numel()
    return m, m + 1, 2 * m + 3, narrowest, smallest


def interval_gradients(
    sums: Tensor, trained: Sequence[Tensor], narrowest: float, smallest: float
) -> list[Tensor]:
    """Return the gradients to start, widths and scales.

    Args:
        sums: As `thresholds_backward` returned them.
        trained: As for `used_intervals`, like the rest.
        narrowest: Least width in use.
        smallest: Least scale in use.
    """
    found = [torch.empty_like(parameter) for parameter in trained]
    start, widths, *scales = trained
    constants = (widths.numel(), narrowest, smallest)
    LIBRARY.call("interval_gradients", start, widths, *scales, *constants, sums, *found)
    return found


def adapted_steps(
    means: Tensor, raw: Tensor, smallest: float, adapter: Sequence[Tensor], least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ASQ's steps of samples, their factors, and the adapters' activations.

    Args:
        means: Channel means, # shape: (N, C), or (S, N, C) for S quantizers.
        raw: Trained steps, # shape: (), or (S,)
        smallest: Least step in use.
        adapter: Weights and biases of the hidden layer, where there is one, and of the output.
        least: Least factor.

    Returns:
        Steps s_a and factors beta, # shape: (N,); hidden activations, # shape: (N, width), the
        means where there is no hidden layer; output activations, # shape: (N, 1). Each with S
        before that where the means have it.
    """
    *samples, n_channels = means.shape
    *hidden, output, output_bias = adapter
    first: tuple[Tensor | None, ...] = tuple(hidden) if hidden else (None, None)
    steps, beta, outputs = means.new_empty(3, *samples)
    width = output.shape[-1]
    inner = means.new_empty(*samples, width) if hidden else means
    LIBRARY.call(
        "adapted_steps",
        means,
        *(raw, smallest, *first, output, output_bias, least),
        *(steps, beta, inner if hidden else None, outputs),
        *(raw.numel(), steps.numel() // raw.numel(), n_channels, width, _threads()),
    )
    return steps, beta, inner, outputs.unsqueeze(-1)


def adapted_steps_backward(
    upstream: Tensor,
    raw: Tensor,
    smallest: float,
    qmax: Tensor,
    n_features: int,
    adapter: Sequence[Tensor],
    least: float,
    beta: Tensor,
    means: Tensor,
    inner: Tensor,
    outputs: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the gradients to the means, to the raw steps and to the adapters' parameters.

    Args:
        upstream: Gradient to the steps of samples, shape of these.
        raw: As for `adapted_steps`, like the other arguments that are not told here.
        smallest: Least step in use.
        qmax: Q_P of LSQ's gradient scale, shape of `raw`.
        n_features: N of that scale.
        adapter: As above.
        least: Least factor.
        beta: As `adapted_steps` returned it, like the activations.
        means: As above.
        inner: Hidden activations.
        outputs: Output activations.
    """
    *hidden, output, _ = adapter
    no_layer: list[None] = [] if hidden else [None, None]
    to_means, grad_raw = torch.empty_like(means), torch.empty_like(raw)
    found = [torch.empty_like(parameter) for parameter in adapter]
    LIBRARY.call(
        "adapted_steps_backward",
        means,
        *(upstream, raw, smallest, qmax, float(n_features), hidden[0] if hidden else None),
        *(output, least, beta, inner if hidden else None, outputs, to_means, grad_raw),
        *no_layer,
        *found,
        *(raw.numel(), beta.numel() // raw.numel(), means.shape[-1], output.shape[-1], _threads()),
    )
    return to_means, grad_raw, found


def _sizes(values: Tensor, raw: Tensor) -> tuple[int, int, int]:
    """Rows (one a parameter, or one an entry of the first dimension), columns, threads."""
    rows = values.shape[0] if raw.numel() == 1 and values.ndim > 1 else raw.numel()
    return rows, values.numel() // rows, _threads()


def _threads() -> int:
    return torch.get_num_threads()
