"""Quantized inputs are made again in the backward pass instead of being kept until then.

A convolution needs its input once more for the gradient of its weights. A float network has that
input anyhow, as the output of the layer before. The quantized input would be one more tensor of
that size for every layer; making it again from the float input costs one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

#: Smaller tensors are kept: making them again takes more time than memory is worth.
KEPT_BELOW = 2**19
#: The same where a byte a value is kept besides.
KEPT_WITH_INDEX_BELOW = 2**17

Maker = Callable[[], Tensor]
_AS_USUAL: Final = nullcontext()


def mark_made(values: Tensor, make: Maker, *, has_index: bool = False) -> Tensor:
    """Say how what a quantizer returned is made again, if it is large; return it.

    Args:
        values: What the quantizer returned.
        make: Returns it once more.
        has_index: It is made from bytes that are kept for that.
    """
    least = KEPT_WITH_INDEX_BELOW if has_index else KEPT_BELOW
    if values.requires_grad and values.numel() >= least and not torch.compiler.is_compiling():
        # Tensors take attributes, of which torch's annotations know nothing.
        values.made_by = make  # type: ignore[attr-defined]
    return values


def made_again(values: Tensor) -> AbstractContextManager[object]:
    """While this lasts, operations on `values` save the way to make it instead of the tensor.

    Args:
        values: What a quantizer returned. Without a mark (`mark_made`) everything is saved as
            usual; `torch.compile` decides for itself.
    """
    make: Maker | None = getattr(values, "made_by", None)
    if make is None or torch.compiler.is_compiling():
        return _AS_USUAL
    place, n_values = values.data_ptr(), values.numel()

    def pack(saved: Tensor) -> Tensor | tuple[Maker, torch.Size]:
        is_whole = saved.data_ptr() == place and saved.numel() == n_values
        return (make, saved.shape) if is_whole else saved

    def unpack(packed: Tensor | tuple[Maker, torch.Size]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        maker, shape = packed
        with torch.no_grad():
            return maker().reshape(shape)

    return saved_tensors_hooks(pack, unpack)
