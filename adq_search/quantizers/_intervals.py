"""Which interval holds a value, and sums by interval: by search, or by counting when compiled.

A search branches at every step and takes a loop of its own. Comparing each value with every knot
is more arithmetic, but without branches and part of the surrounding loop: on CPU it takes a tenth
of the time with 16 knots and a third with 256.

Tables are sorted and padded by `padded`, so that numbers of bits are sizes that code is not
specialised to. NaN lies below every knot when compiled, and above them all otherwise: callers put
it right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

#: Knots that one turn of a compiled loop looks at.
_AT_ONCE = 8


def padded(table: Tensor, value: float = math.inf, *, like: Tensor | None = None) -> Tensor:
    """Append `value` up to the next multiple of eight entries, 16 at least.

    Args:
        table: # shape: (entries,)
        value: What to append; infinity is a knot that no value passes.
        like: Pad to the length of this table instead.
    """
    n_entries = max(2, math.ceil(len(table if like is None else like) / _AT_ONCE)) * _AT_ONCE
    return F.pad(table, (0, n_entries - len(table)), value=value)


def rank(values: Tensor, knots: Tensor) -> Tensor:
    """Return how many knots lie below each value, in floating point.

    Args:
        values: # shape: (rows, n)
        knots: Padded, # shape: (knots,)
    """
    if not torch.compiler.is_compiling():
        return torch.bucketize(values, knots, out_int32=True).to(values.dtype)
    counts = [torch.where(values > knot, 1.0, 0.0) for knot in _columns(knots)]
    return _total(counts).sum(dim=0, dtype=values.dtype)


def interval_entry(values: Tensor, knots: Tensor, entries: Tensor, at_least: Tensor) -> Tensor:
    """Return the entry that belongs to the last knot below each value; 0 below the first.

    Args:
        values: # shape: (rows, n)
        knots: Padded, # shape: (knots,)
        entries: # shape: (knots,)
        at_least: Knots below each value, or one less, # shape: (rows, n)
    """
    if not torch.compiler.is_compiling():
        table = F.pad(entries, (1, 0))
        index = _knots_below(values, knots, at_least)
        return table.index_select(0, index.view(-1)).view(values.shape)
    ends = F.pad(knots[1:], (0, 1), value=math.inf)
    chosen = [
        torch.where((values > knot) & (values <= end), entry, 0.0)
        for knot, end, entry in zip(_columns(knots), _columns(ends), _columns(entries), strict=True)
    ]
    return _total(chosen).sum(dim=0)


def interval_sums(
    values: Tensor, weights: Tensor, knots: Tensor, at_least: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum, over the values between each knot and the next, weights and weighted distances.

    Args:
        values: # shape: (rows, n)
        weights: # shape: (rows, n)
        knots: Padded, # shape: (knots,)
        at_least: Knots below each value, or one less, # shape: (rows, n)

    Returns:
        Sums of weights, and of weights times the distance from the left knot; the distances of
        the values beyond the last finite knot are of no meaning. Each # shape: (knots,)
    """
    if not torch.compiler.is_compiling():
        index = _knots_below(values, knots, at_least)
        left = F.pad(knots, (1, 0)).index_select(0, index.view(-1)).view(values.shape)
        sums = weights.new_zeros(2, len(values), len(knots) + 1)
        sums[0].scatter_add_(1, index, weights)
        sums[1].scatter_add_(1, index, (values - left).mul_(weights))
        within, distance = sums.sum(dim=1)[:, 1:]
        return within, distance
    # Each interval takes the share of every value that reaches into it; the values beyond it,
    # which fill it, are taken out again.
    gap = torch.where(knots[1:].isfinite(), knots.diff(), 0.0)
    gap = F.pad(gap, (0, 1))
    weight = weights.unsqueeze(1)
    value = torch.where(values > knots[0], values, knots[0]).unsqueeze(1)
    above, reach = [], []
    for knot, width in zip(_strided(knots), _strided(gap), strict=True):
        beyond = value - knot
        above.append(torch.where(beyond > 0, weight, 0.0).sum(dim=2))
        reach.append((weight * torch.minimum(beyond.relu(), width)).sum(dim=2))
    above_knot = torch.stack(above, 1).flatten(1).sum(dim=0)
    above_next = F.pad(above_knot[1:], (0, 1))
    distance = torch.stack(reach, 1).flatten(1).sum(dim=0) - gap * above_next
    return above_knot - above_next, distance


def _knots_below(values: Tensor, knots: Tensor, at_least: Tensor) -> Tensor:
    """Return how many knots lie below each value: one comparison instead of a search."""
    index = at_least.long().clamp_(max=len(knots) - 1)
    next_knot = knots.index_select(0, index.view(-1)).view(values.shape)
    return index.add_(torch.gt(values, next_knot, out=torch.empty_like(index)))


def _strided(table: Tensor) -> list[Tensor]:
    """Eight parts that broadcast against (rows, parts, n), each # shape: (1, knots / 8, 1)."""
    return [part.view(1, -1, 1) for part in table.view(_AT_ONCE, -1).unbind(0)]


def _columns(table: Tensor) -> list[Tensor]:
    """Eight columns that broadcast against (rows, n), each # shape: (knots / 8, 1, 1)."""
    return [column.view(-1, 1, 1) for column in table.view(-1, _AT_ONCE).unbind(1)]


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
