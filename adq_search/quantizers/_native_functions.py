"""The quantizers as differentiable functions in C++ (`kernels.cpp`), for CPU tensors.

They work on what `_native.takes`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adq_search.native_function import NativeFunction
from adq_search.quantizers._native import LIBRARY, sizes, threads

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


def _codebook(*then: str) -> NativeFunction:
    return NativeFunction(
        LIBRARY,
        inputs="weights codebook momentum",
        numbers="n_levels n_sums n_weights threads",
        rooms={"out": "like weights", "sums": "floats n_sums"},
        outputs="out",
        forward=["codebook weights codebook n_levels out sums n_weights threads", *then],
        passed={"weights": "out"},
    )


#: `codebook`, whose gradient passes to the weights unchanged.
CODEBOOK = _codebook()
#: The same; then the codebook follows the weights.
FOLLOWING_CODEBOOK = _codebook("follow codebook sums momentum n_levels")

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

#: Nothing like the values themselves: they would be kept for the backward pass.
RECTIFIED_ROOMS = {"y": "like values", "out": "like y", "grad_values": "like y"}
#: A clipping and `uniform` behind it; what was clipped is returned too.
RECTIFIED_UNIFORM = NativeFunction(
    LIBRARY,
    inputs="values raw qmin qmax",
    numbers="low high smallest scale rows columns threads",
    rooms=RECTIFIED_ROOMS,
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
    rooms={**RECTIFIED_ROOMS, "index": "bytes like values", **INTERVAL_ROOMS},
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
#: ASQ's tensors and sizes, and what its passes take, find and give back. For norms too.
ADAPTER_INPUTS = "qmin qmax raw hidden hidden_bias output output_bias"
BY_SAMPLE = "width samples sample_pixels channels threads"
ADAPTER_NUMBERS = f"smallest least features {BY_SAMPLE}"
ADAPTED = "raw smallest hidden hidden_bias output output_bias least qmin qmax"
PULLED = "raw smallest hidden output least qmin qmax features"
TO_ADAPTER = "grad_raw grad_hidden grad_hidden_bias grad_output grad_output_bias"
FOUND = "means steps beta inner outputs"
ADAPTED_ROOMS = {
    **dict.fromkeys(("steps", "beta", "outputs"), "floats samples"),
    "means": "floats samples channels",
    "inner": "floats samples width",
}
#: `uniform` by a step a sample, which an adapter finds from channel means; the steps too.
ADAPTIVE = NativeFunction(
    LIBRARY,
    inputs=f"values {ADAPTER_INPUTS}",
    numbers=ADAPTER_NUMBERS,
    rooms={"out": "like values", **ADAPTED_ROOMS},
    outputs="out steps",
    forward=[f"adaptive values none none {ADAPTED} none {FOUND} out {BY_SAMPLE}"],
    backward=[
        f"adaptive_backward values upstream_out none none none {PULLED} {FOUND}"
        f" grad_values {TO_ADAPTER} {BY_SAMPLE}"
    ],
)
#: A clipping and that behind it; what was clipped is returned too.
RECTIFIED_ADAPTIVE = NativeFunction(
    LIBRARY,
    inputs=f"values {ADAPTER_INPUTS}",
    numbers=f"low high {ADAPTER_NUMBERS}",
    rooms={**RECTIFIED_ROOMS, **ADAPTED_ROOMS},
    outputs="y out steps",
    forward=[f"adaptive values low high {ADAPTED} y {FOUND} out {BY_SAMPLE}"],
    backward=[
        f"adaptive_backward y upstream_out upstream_y low high {PULLED} {FOUND}"
        f" grad_values {TO_ADAPTER} {BY_SAMPLE}"
    ],
)


def uniform_through(
    values: Tensor, raw: Tensor, qmin: Tensor, qmax: Tensor, smallest: float, scale: float
) -> Tensor:
    """Return `uniform` with its gradients, that to `raw` times `scale`."""
    numbers = (raw.numel() > 1, smallest, qmin.numel() > 1, scale, *sizes(values, raw))
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
    numbers = (low, high, smallest, scale, *sizes(values, raw))
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
    numbers = (raw.numel() > 1, smallest, unit_levels.numel(), scale, *sizes(values, raw))
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
    numbers = (n, 2 * n, weights.numel(), threads())
    return function((weights, codebook, momentum), numbers)[0]


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
    out, index = THRESHOLDS((values, qmin, *trained), (*numbers, values.numel(), threads()))
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
    rest = (values.numel(), threads())
    return RECTIFIED_THRESHOLDS((values, qmin, *trained), (*numbers, *rest))


def interval_numbers(widths: Tensor, narrowest: float, smallest: float) -> tuple[float, ...]:
    """Return `INTERVAL_NUMBERS`."""
    m = widths.numel()
    return m, m + 1, 2 * m + 3, narrowest, smallest
