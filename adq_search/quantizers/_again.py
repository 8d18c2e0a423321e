"""Quantized inputs are made again in the backward pass instead of being kept until then.

A convolution needs its input once more for the gradient of its weights. A float network has that
input anyhow, as the output of the layer before. The quantized input would be one more tensor of
that size for every layer; making it again from the float input costs one pass over memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

#: Smaller tensors are kept: making them again takes more time than memory is worth.
KEPT_BELOW = 2**17


def made_again(values: Tensor) -> AbstractContextManager[object]:
    """While this lasts, operations on `values` save the way to make it instead of the tensor.

    Args:
        values: What a quantizer returned. Its graph node says how it is made again (`again`);
            without that everything is saved as usual, and `torch.compile` decides for itself.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    node = values.grad_fn
    if values.numel() < KEPT_BELOW or not hasattr(node, "again"):
        return nullcontext()
    place, n_values = values.data_ptr(), values.numel()

    def pack(saved: Tensor) -> Tensor | tuple[Node, torch.Size]:
        is_whole = saved.data_ptr() == place and saved.numel() == n_values
        return (node, saved.shape) if is_whole and node is not None else saved

    def unpack(packed: Tensor | tuple[Node, torch.Size]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        maker, shape = packed
        with torch.no_grad():
            return maker.again(maker).reshape(shape)  # type: ignore[attr-defined, no-any-return]

    return saved_tensors_hooks(pack, unpack)
