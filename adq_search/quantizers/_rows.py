"""Tensors of any shape and memory layout as rows, one for each entry of the first dimension."""

from __future__ import annotations

from torch import Tensor


def row_order(tensor: Tensor) -> list[int]:
    """Return the dimensions as they lie in memory, the first one first."""
    rest = range(1, tensor.ndim)
    if tensor.is_contiguous():
        return list(range(tensor.ndim))
    return [*range(min(1, tensor.ndim)), *sorted(rest, key=tensor.stride, reverse=True)]


def to_rows(tensor: Tensor, order: list[int]) -> Tensor:
    """View (copy where the layout is another one) as contiguous rows, # shape: (rows, n)."""
    packed = tensor if _is_plain(order) else tensor.permute(order)
    packed = packed.contiguous()
    return packed.flatten(1) if packed.ndim > 1 else packed.view(1, -1)


def from_rows(rows: Tensor, like: Tensor, order: list[int]) -> Tensor:
    """Undo `to_rows`: the shape and the memory layout of `like`."""
    if _is_plain(order):
        return rows.view(like.shape)
    packed = rows.view([like.shape[dim] for dim in order])
    return packed.permute(sorted(range(len(order)), key=order.__getitem__))


def column(parameter: Tensor, rows: Tensor) -> Tensor:
    """Give every row its entry of a parameter with one entry, or one a row, # shape: (rows, 1)."""
    return parameter.reshape(-1, 1).expand(len(rows), 1).contiguous()


def from_column(sums: Tensor, like: Tensor) -> Tensor:
    """Undo `column` for gradients: they are summed where rows share an entry."""
    return (sums.sum() if like.numel() == 1 else sums).view(like.shape)


def _is_plain(order: list[int]) -> bool:
    return order == list(range(len(order)))
