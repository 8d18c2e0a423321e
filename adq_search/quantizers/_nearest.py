"""Searching sorted levels and looking them up, in the memory layout the tensor has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adq_search.quantizers._intervals import padded, rank


def nearest_index(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest level; a tie takes the lower one; NaN has index `levels`.

    Args:
        values: Any shape.
        levels: Sorted, in the dtype of `values`, # shape: (levels,)

    Returns:
        int32 indices, same shape.
    """
    return count_below(values, midpoints(levels))


def midpoints(levels: Tensor) -> Tensor:
    """Return the midpoints between sorted levels, # shape: (levels - 1,)."""
    return (levels[1:] + levels[:-1]) / 2


def nearest_tables(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return levels and the midpoints between them as `nearest_level` takes them, both padded."""
    return padded(levels, math.nan), padded(midpoints(levels), like=levels)


def nearest_level(values: Tensor, levels: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest level and its index; a tie takes the lower one. For use in kernels.

    Args:
        values: # shape: (rows, n)
        levels: Sorted, in the dtype of `values`, padded, # shape: (entries,)
        cuts: Midpoints between them, padded, # shape: (entries,)

    Returns:
        Levels, NaN for NaN; int64 indices, the last one of the table for NaN.
    """
    index = rank(values, cuts).long()
    index = torch.where(values.isnan(), len(levels) - 1, index)
    found = levels.index_select(0, index.flatten()).view(values.shape)
    return torch.where(values.isnan(), values, found), index


def count_below(values: Tensor, thresholds: Tensor) -> Tensor:
    """Count thresholds below each value; NaN counts one more than there are, so it stays known."""
    # Contiguous memory without a copy where channels lie last, and the way back.
    order = sorted(range(values.ndim), key=values.stride, reverse=True)
    back = sorted(range(values.ndim), key=order.__getitem__)
    packed = values.permute(order).contiguous()
    thresholds = torch.cat([thresholds, thresholds.new_full((1,), torch.inf)])
    return torch.bucketize(packed, thresholds.to(packed.dtype), out_int32=True).permute(back)
