"""Compile small functions of tensors where that pays; run them as they stand where it does not.

A quantizer's arithmetic is cheap, but as separate tensor operations it reads and writes memory a
dozen times. `torch.compile` makes one loop of it. Everything that a policy decides (code ranges,
steps, levels) comes in as a tensor and sizes are symbolic, so a new policy compiles nothing.

This is for GPUs; on CPUs it takes twice the time of `_native`, and more by call. Compiled code is
kept on disk (`TORCHINDUCTOR_CACHE_DIR`). `_modes` says how to choose.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from adq_search.errors import AdqSearchWarning
from adq_search.native import compile_mode

#: Sizes that code is generated for. All others run the same code: speed and the order of sums
#: must not depend on which layer came first.
_ROWS, _ENTRIES = 64, 256
#: Columns, for rows up to 4096 and for longer ones, which inductor sums in another way.
_COLUMNS = {False: 2053, True: 8209}
_LONG = 4096

Out = TypeVar("Out")


class Kernel(Generic[Out]):
    """A function of tensors without side effects, compiled when it is first worth it.

    Args:
        function: Takes values as rows first, # shape: (rows, n); then rows, columns
            # shape: (rows, 1), tables # shape: (entries,) and scalars # shape: ().
    """

    def __init__(self, function: Callable[..., Out]) -> None:
        self.function = function
        self._ready: dict[tuple[Any, ...], bool] = {}

    @cached_property
    def _compiled(self) -> Callable[..., Out]:
        # Late, since it imports the compiler.
        return torch.compile(self.function, dynamic=True, fullgraph=True)

    def __call__(self, rows: Tensor, *others: Tensor, compiled: bool = True) -> Out:
        """Return `function(rows, *others)`, the same whether compiled or not; no gradient."""
        # Within somebody else's compilation the plain function joins that graph.
        if not compiled or torch.compiler.is_compiling():
            return self.function(rows, *others)
        device = rows.device.type
        # Gradient mode, autocast and parameters would each make another graph of the same code.
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(rows, *others)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self(rows, *others)
        tensors = [t.detach() for t in (rows, *others)]
        if not self._is_ready(device, tensors):
            return self.function(*tensors)
        return self._compiled(*tensors)

    def _is_ready(self, device: str, tensors: list[Tensor]) -> bool:
        """Compile for tensors of this kind, unless that was tried before; whether it worked."""
        n_rows, n_columns = tensors[0].shape
        is_long = n_columns > _LONG
        # What a graph is specialised to: sizes of one, long rows, threads and dtypes.
        kind = (device, torch.get_num_threads(), n_rows == 1, n_columns == 1, is_long)
        key = (*kind, *[t.dtype for t in tensors])
        if key not in self._ready:
            try:
                self._compiled(*(_example(tensor, is_long=is_long) for tensor in tensors))
            except Exception as error:  # no compiler, no headers, an old driver: torch has many
                if compile_mode() == "inductor":
                    raise
                self._ready[key] = False
                msg = (
                    f"Quantizers run uncompiled, which is slower: {type(error).__name__} in "
                    f"`{self.function.__name__}`. Install a C++ compiler, or set "
                    "ADQ_SEARCH_COMPILE=off to hide this."
                )
                warnings.warn(msg, AdqSearchWarning, stacklevel=4)
            else:
                self._ready[key] = True
        return self._ready[key]


def compiles(values: Tensor) -> bool:
    """Return whether kernels over `values` are to be compiled."""
    is_cpu = values.device.type == "cpu"
    return compile_mode() in (("inductor",) if is_cpu else ("auto", "native", "inductor"))


def _example(tensor: Tensor, *, is_long: bool) -> Tensor:
    sizes = {0: (), 1: (_ENTRIES,), 2: (_ROWS, _COLUMNS[is_long])}[tensor.ndim]
    shape = [1 if own == 1 else size for own, size in zip(tensor.shape, sizes, strict=True)]
    return tensor.new_ones(shape)
