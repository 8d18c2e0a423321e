"""The quantizers' passes in C++ (`kernels.cpp`): one pass over memory each, for CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adq_search.native import NativeLibrary, laid_out_as

#: The quantizers' arithmetic, for other passes too.
HEADERS = sorted(Path(__file__).parent.glob("*.hpp"))
#: Arguments of each function; see `kernels.cpp`.
LIBRARY = NativeLibrary(
    Path(__file__).with_name("kernels.cpp"),
    headers=HEADERS,
    signatures={
        "uniform": "lpplfpplplll",
        "uniform_backward": "lppplfpplfpffpplll",
        "step_slopes": "lppfpppll",
        "clipped": "lpplfplplll",
        "clipped_backward": "lppplfplfpplll",
        "codebook": "lpplppll",
        "thresholds": "lppplppppll",
        "rectified_uniform": "lpffpfpppplll",
        "rectified_thresholds": "lpffpplpppppll",
        "adaptive": "lpffpfppppfppppppppplllll",
        "adaptive_backward": "lpppffpfppfppfppppppppppplllll",
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
        *(out, *sizes(values, raw)),
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
        *(grad_values, grad_raw, *sizes(values, raw)),
    )
    return grad_values, grad_raw


def step_slopes(values: Tensor, raw: Tensor, smallest: float, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Return the derivative of `uniform` by its one step, at each value."""
    out = torch.empty_like(values)
    given = (raw, smallest, qmin, qmax, out, values.numel(), threads())
    LIBRARY.call("step_slopes", values, *given)
    return out


def thresholds_again(values: Tensor, index: Tensor, step: Tensor, qmin: Tensor) -> Tensor:
    """Return the output of `thresholds` once more, from its index."""
    out = torch.empty_like(values)
    LIBRARY.call("thresholds_again", values, index, step, qmin, out, values.numel(), threads())
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
        *(raw.numel(), steps.numel() // raw.numel(), n_channels, width, threads()),
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
        *(raw.numel(), beta.numel() // raw.numel(), means.shape[-1], output.shape[-1], threads()),
    )
    return to_means, grad_raw, found


def sizes(values: Tensor, raw: Tensor) -> tuple[int, int, int]:
    """Rows (one a parameter, or one an entry of the first dimension), columns, threads."""
    rows = values.shape[0] if raw.numel() == 1 and values.ndim > 1 else raw.numel()
    return rows, values.numel() // rows, threads()


def threads() -> int:
    return torch.get_num_threads()
