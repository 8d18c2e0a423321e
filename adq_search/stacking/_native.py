"""Passes in C++ (`slots.cpp`) over the values of some slots: networks that share a tensor."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adq_search.native import NativeLibrary
from adq_search.quantizers._native import HEADERS

#: Arguments of each function; see `slots.cpp`.
LIBRARY = NativeLibrary(
    Path(__file__).with_name("slots.cpp"),
    headers=HEADERS,
    signatures={
        "copy": "lpppl",
        "uniform": "lpppllfpppl",
        "uniform_backward": "lppppllfppfppl",
        "clipped": "lpppfpplpl",
        "clipped_backward": "lppppfpplfppl",
        "codebook": "lpppplppl",
        "thresholds": "lpppppppplffppl",
        "thresholds_backward": "lpppppppppplffpppppl",
        "means": "lpplpl",
        "means_backward": "lpplpl",
    },
)


class Places(NamedTuple):
    """Where some slots lie in a tensor.

    Args:
        rows: Of one slot: samples of inputs, output channels of weights.
        columns: Values of a row, which lie together.
        numbers: All that `slots.cpp` wants to know.
    """

    rows: int
    columns: int
    numbers: Tensor


@lru_cache(maxsize=4096)
def places_of_inputs(shape: tuple[int, ...], n_slots: int, slots: tuple[int, ...]) -> Places:
    """Return the places of slots in the inputs of a layer, # shape: (N, K * C, ...)."""
    columns = torch.Size(shape[1:]).numel() // n_slots
    return _places(shape[0], columns, n_slots * columns, columns, slots)


@lru_cache(maxsize=4096)
def places_of_weights(shape: tuple[int, ...], n_slots: int, slots: tuple[int, ...]) -> Places:
    """Return the places of slots in the weights of a layer, # shape: (K * out, ...)."""
    rows, columns = shape[0] // n_slots, torch.Size(shape[1:]).numel()
    return _places(rows, columns, columns, rows * columns, slots)


def _places(
    rows: int, columns: int, row_stride: int, slot_stride: int, slots: tuple[int, ...]
) -> Places:
    numbers = [rows, columns, row_stride, slot_stride, len(slots), *slots]
    return Places(rows, columns, torch.tensor(numbers))


def run(name: str, values: Tensor, at: Places, *arguments: Tensor | float) -> None:
    """Call a function of `slots.cpp` on some slots of a tensor, with torch's number of threads."""
    LIBRARY.call(name, values, at.numbers, *arguments, torch.get_num_threads())
