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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adq_search.native import NativeLibrary, is_plain
from adq_search.native_function import NativeFunction
from adq_search.norms._readers import Range
from adq_search.quantizers import AsqInput, InputQuantizer, LsqInput, N2uqInput, _native
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._native import HEADERS
from adq_search.quantizers._native_functions import (
    ADAPTED,
    ADAPTED_ROOMS,
    ADAPTER_INPUTS,
    ADAPTER_NUMBERS,
    BY_SAMPLE,
    FOUND,
    INTERVAL_GRADIENTS,
    INTERVAL_NUMBERS,
    INTERVAL_ROOMS,
    PULLED,
    TO_ADAPTER,
    TRAINED,
    USED_INTERVALS,
    interval_numbers,
)
from adq_search.quantizers._thresholds import MIN_WIDTH
from adq_search.quantizers._through import lsq_gradient_factor

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
        "adaptive": "lpppppffpfppppfpppppppplllll",
        "adaptive_backward": "lppppppffpfppfppfppppppppppppplllll",
        "thresholds_backward": "lppppppffpppplppppplll",
    },
    headers=[*HEADERS, *sorted(Path(__file__).parent.glob("*.hpp"))],
)


# A norm, forward and backward: what comes in, what it finds, and how its parts are called.
_INPUTS = "x weight bias running_mean running_variance"
_NUMBERS = "follow eps low high pixels channels threads"
_ROOMS = {"mean": "floats channels", "inverse": "floats channels", "out": "like x"}
_STATISTICS = (
    "statistics x running_mean running_variance follow eps mean inverse pixels channels threads"
)
_KNOWN = "weight bias mean inverse low high"
_GRADIENTS = "grad_x grad_weight grad_bias"
_SIZES = "pixels channels threads"

#: A norm and the clipping behind it.
CLIPPED = NativeFunction(
    LIBRARY,
    inputs=_INPUTS,
    numbers=_NUMBERS,
    rooms=_ROOMS,
    outputs="out",
    forward=[_STATISTICS, f"clipped x {_KNOWN} out {_SIZES}"],
    backward=[f"clipped_backward x upstream_out {_KNOWN} {_GRADIENTS} {_SIZES}"],
)
#: The same with LSQ behind it.
UNIFORM = NativeFunction(
    LIBRARY,
    inputs=f"{_INPUTS} raw qmin qmax",
    numbers=f"{_NUMBERS} smallest scale",
    rooms=_ROOMS,
    outputs="out",
    forward=[_STATISTICS, f"uniform x {_KNOWN} raw smallest qmin qmax out {_SIZES}"],
    backward=[
        f"uniform_backward x upstream_out {_KNOWN} raw smallest qmin qmax scale"
        f" {_GRADIENTS} grad_raw {_SIZES}"
    ],
)
#: The same with N2UQ behind it.
THRESHOLDS = NativeFunction(
    LIBRARY,
    _native.LIBRARY,
    inputs=f"{_INPUTS} qmin {TRAINED}",
    numbers=f"{_NUMBERS} {INTERVAL_NUMBERS}",
    rooms={**_ROOMS, "index": "bytes like x", **INTERVAL_ROOMS},
    outputs="out",
    forward=[
        _STATISTICS,
        USED_INTERVALS,
        f"thresholds x {_KNOWN} beta cuts n_cuts step qmin out index {_SIZES}",
    ],
    backward=[
        f"thresholds_backward x upstream_out {_KNOWN} index beta knots slopes n_knots qmin"
        f" {_GRADIENTS} sums {_SIZES}",
        INTERVAL_GRADIENTS,
    ],
)
#: The same with ASQ behind it: a step for each sample, which an adapter finds from means.
ADAPTIVE = NativeFunction(
    LIBRARY,
    inputs=f"{_INPUTS} {ADAPTER_INPUTS}",
    numbers=f"{_NUMBERS} {ADAPTER_NUMBERS}",
    rooms={**_ROOMS, **ADAPTED_ROOMS},
    outputs="out",
    forward=[
        _STATISTICS,
        f"adaptive x {_KNOWN} {ADAPTED} {FOUND} out {BY_SAMPLE}",
    ],
    backward=[
        f"adaptive_backward x upstream_out {_KNOWN} {PULLED} {FOUND}"
        f" {_GRADIENTS} {TO_ADAPTER} {BY_SAMPLE}"
    ],
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

    def inputs(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """Return `_INPUTS`."""
        return x, weight, bias, self.running_mean, self.running_variance

    def numbers(self, x: Tensor) -> tuple[float, ...]:
        """Return `_NUMBERS`."""
        pixels = x.numel() // x.shape[1]
        sizes = (pixels, x.shape[1], torch.get_num_threads())
        return self.follow, self.eps, *self.passes, *sizes


def fuses(quantizer: InputQuantizer | None, n_channels: int) -> bool:
    """Whether a quantizer behind a norm of so many channels runs in the norm's passes."""
    if isinstance(quantizer, AsqInput) and not (
        quantizer.is_adaptive
        and quantizer.n_channels == n_channels
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
    inputs, numbers = norm.inputs(x, weight, bias), norm.numbers(x)
    if quantizer is None:
        return CLIPPED(inputs, numbers)[0]
    return QUANTIZED[type(quantizer)](x, inputs, numbers, quantizer)


Given = tuple[Tensor, ...]
Numbers = tuple[float, ...]


def _uniform(x: Tensor, inputs: Given, numbers: Numbers, by: LsqInput) -> Tensor:
    scale = lsq_gradient_factor(by.qmax, by.n_features(x))
    return UNIFORM((*inputs, by.step, by.qmin, by.qmax), (*numbers, EPS, scale))[0]


def _thresholds(_: Tensor, inputs: Given, numbers: Numbers, by: N2uqInput) -> Tensor:
    trained = by.trained()
    used = interval_numbers(trained[1], MIN_WIDTH, EPS)
    return THRESHOLDS((*inputs, by.qmin, *trained), (*numbers, *used))[0]


def _adaptive(x: Tensor, inputs: Given, numbers: Numbers, by: AsqInput) -> Tensor:
    return ADAPTIVE((*inputs, *by.tensors()), (*numbers, *by.numbers(x)))[0]


#: What quantizes behind a norm, by quantizer.
QUANTIZED: Mapping[type[Any], Callable[..., Tensor]] = {
    AsqInput: _adaptive,
    LsqInput: _uniform,
    N2uqInput: _thresholds,
}
