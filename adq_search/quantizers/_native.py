"""The quantizers' passes in C++ (`kernels.cpp`): one pass over memory each, for CPU tensors.

The library is built with the machine's C++ compiler when it is first needed, which takes about two
seconds, and kept on disk (`$XDG_CACHE_HOME/adq_search`, by default `~/.cache/adq_search`) for every
later process. Where there is no compiler, the tensor operations of the same arithmetic are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from adq_search.errors import AdqSearchWarning, QuantizerError
from adq_search.quantizers._modes import compile_mode

SOURCE = Path(__file__).with_name("kernels.cpp")
#: Contraction of products and sums would change last bits.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Compilers take half of the registers' width otherwise.
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
#: Arguments of each function: p pointer, l long, f float; see `kernels.cpp`.
_SIGNATURES = {
    "uniform": "lpplfpplplll",
    "uniform_backward": "lppplfpplfpplll",
    "clipped": "lpplfplplll",
    "clipped_backward": "lppplfplfpplll",
    "codebook": "lpplppll",
    "thresholds": "lppplppppll",
    "thresholds_again": "lpppppll",
    "thresholds_backward": "lpppppplpppll",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}


def takes(values: Tensor, *parameters: Tensor) -> bool:
    """Return whether the C++ passes work on these tensors, here and now.

    Args:
        values: Of any shape, in rows that lie one after the other in memory.
        parameters: Steps, tables and ranges.
    """
    return (
        values.device.type == "cpu"
        # Tensors of other classes (fake, batched, distributed) have no memory to point at.
        and type(values) in (Tensor, nn.Parameter)
        and values.dtype in (torch.float32, torch.bfloat16)
        and all(_is_plain(parameter) for parameter in parameters)
        and values.numel() > 0
        and _layout(values) is not None
        and compile_mode() in ("auto", "native")
        and not torch.compiler.is_compiling()
        and _library() is not None
    )


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
    _call(
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
    grad_values, sums = torch.empty_like(values), raw.new_empty(_rows(values, raw))
    _call(
        "uniform_backward",
        *(values, _laid_out_as(upstream, values), raw, raw.numel() > 1, smallest),
        *(qmin, qmax, qmin.numel() > 1, scale if raw.numel() > 1 else 1.0),
        *(grad_values, sums, *_sizes(values, raw)),
    )
    return grad_values, _to_parameter(sums, raw, scale)


def clipped(values: Tensor, raw: Tensor, smallest: float, unit_levels: Tensor) -> Tensor:
    """Return the nearest of `alpha * unit_levels` for alpha = max(|raw|, smallest).

    Args:
        values: Any shape.
        raw: One threshold, or one for each entry of the first dimension.
        smallest: Least threshold in use.
        unit_levels: Sorted, # shape: (levels,)
    """
    out = torch.empty_like(values)
    _call(
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
    grad_values, sums = torch.empty_like(values), raw.new_empty(_rows(values, raw))
    _call(
        "clipped_backward",
        *(values, _laid_out_as(upstream, values), raw, raw.numel() > 1, smallest),
        *(unit_levels, unit_levels.numel(), scale if raw.numel() > 1 else 1.0),
        *(grad_values, sums, *_sizes(values, raw)),
    )
    return grad_values, _to_parameter(sums, raw, scale)


def codebook(weights: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest level of every weight; by level, the sum of errors and the weights' count.

    Args:
        weights: Any shape.
        levels: Sorted, # shape: (levels,)

    Returns:
        Levels; sums of weights less their level and numbers of weights, both # shape: (levels,)
    """
    out, sums = torch.empty_like(weights), levels.new_empty(2, levels.numel())
    _call(
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
    _call(
        "thresholds",
        *(values, in_scale, cuts, cuts.numel(), step, qmin, out, index, values.numel(), _threads()),
    )
    return out, index


def thresholds_again(values: Tensor, index: Tensor, step: Tensor, qmin: Tensor) -> Tensor:
    """Return the output of `thresholds` once more, from its index."""
    out = torch.empty_like(values)
    _call("thresholds_again", values, index, step, qmin, out, values.numel(), _threads())
    return out


def thresholds_backward(
    values: Tensor,
    upstream: Tensor,
    index: Tensor,
    in_scale: Tensor,
    knots: Tensor,
    slopes: Tensor,
    qmin: Tensor,
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

    Returns:
        Gradient to the values; by interval, sums of R and of R times the distance from its left
        end, both # shape: (knots,); the sum of R times codes, # shape: ()
    """
    n = knots.numel()
    grad_values, sums = torch.empty_like(values), knots.new_empty(2 * n + 1)
    _call(
        "thresholds_backward",
        *(values, _laid_out_as(upstream, values), index, in_scale, knots, slopes, n, qmin),
        *(grad_values, sums, values.numel(), _threads()),
    )
    return grad_values, sums[:n], sums[n:-1], sums[-1]


def _call(name: str, values: Tensor, *arguments: Tensor | float) -> None:
    function = getattr(_library(), name)
    half = values.dtype == torch.bfloat16
    function(half, values.data_ptr(), *[_plain(argument) for argument in arguments])


def _plain(argument: Tensor | float) -> float:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def _rows(values: Tensor, raw: Tensor) -> int:
    """How many rows: one a parameter, or one an entry of the first dimension."""
    return values.shape[0] if raw.numel() == 1 and values.ndim > 1 else raw.numel()


def _sizes(values: Tensor, raw: Tensor) -> tuple[int, int, int]:
    rows = _rows(values, raw)
    return rows, values.numel() // rows, _threads()


def _to_parameter(sums: Tensor, raw: Tensor, scale: float) -> Tensor:
    """Give the sums of rows the shape of a parameter; one in all is summed and scaled here."""
    if raw.numel() > 1:
        return sums.view(raw.shape)
    return sums.sum().mul_(-scale if float(raw.detach()) < 0 else scale).view(raw.shape)


def _threads() -> int:
    return torch.get_num_threads()


def _layout(tensor: Tensor) -> torch.memory_format | None:
    """Return a format in which the tensor lies in memory without gaps, first dimension first."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _is_plain(parameter: Tensor) -> bool:
    is_here = parameter.device.type == "cpu" and parameter.is_contiguous()
    return is_here and parameter.dtype == torch.float32


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    return tensor.to(like.dtype).contiguous(memory_format=_layout(like) or torch.contiguous_format)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """Load the library, built where that is needed; None, after a warning, where that fails.

    Raises:
        QuantizerError: It fails, and `ADQ_SEARCH_COMPILE=native` asks for it.
    """
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip().splitlines()[:1]
        msg = (
            f"The quantizers' C++ passes cannot be built ({type(error).__name__}: {detail}), so "
            "quantized training is slower. Install a C++ compiler with OpenMP (or name one in "
            "CXX), or set ADQ_SEARCH_COMPILE=off to hide this."
        )
        if compile_mode() == "native":
            raise QuantizerError(msg) from error
        warnings.warn(msg, AdqSearchWarning, stacklevel=2)
        return None
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_TYPES[letter] for letter in signature]
        function.restype = None
    return library


def _built() -> Path:
    """Return the library of this source, compiler and processor; build it where there is none."""
    compiler = os.environ.get("CXX", "c++")
    asked = [compiler, *FLAGS]
    # The macros tell the compiler's version and what -march=native stands for on this machine.
    macros = subprocess.run(
        [*asked, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    )
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *asked, macros.stdout]).encode())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    built = Path(home) / "adq_search" / f"kernels-{key.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            draft = Path(folder) / built.name
            subprocess.run(
                [*asked, "-o", str(draft), str(SOURCE)], capture_output=True, text=True, check=True
            )
            draft.replace(built)
    return built
