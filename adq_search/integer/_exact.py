"""Sums of integer products, computed by fast convolutions that are exact, or in int64.

A float32 convolution of integers makes no error in any order of summation while every partial sum
stays below 2^24. The largest sum is known before: the largest code times the L1 norm of a filter.
Where it is larger, the input channels are split; where one channel is too much, float64 (2^53)
takes over. Products of reduced precision would break this and are kept out; oneDNN and MKL take
neither Winograd nor Fourier transforms (a test compares with int64). Codes and words of 8 bits go
through int8 convolutions where the processor has exact ones, many times as fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.errors import IntegerError
from adq_search.integer._int8 import Int8Convolution, code_dtype, has_exact_int8

#: Integers up to here are exact in float32 and in float64.
EXACT_FLOAT32 = 2**24
EXACT_FLOAT64 = 2**53

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a layer slides over its input.

    Args:
        stride: Of each spatial dimension; empty for a linear layer.
        dilation: Of each spatial dimension.
        pads: Zeros before and after each spatial dimension, last dimension first, as `F.pad`.
        pad_mode: `constant`, or another mode of `F.pad`.
        groups: Groups of channels.
    """

    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    pad_mode: str = "constant"
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        """Read the geometry of a `Conv1d`, `Conv2d` or `Linear`."""
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            return cls()
        mode = layer.padding_mode
        return cls(
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            pads=tuple(layer._reversed_padding_repeated_twice),
            pad_mode="constant" if mode == "zeros" else mode,
            groups=layer.groups,
        )

    @property
    def plain_padding(self) -> tuple[int, ...] | None:
        """Zeros on either side of each dimension, where a convolution can add them itself."""
        before, after = self.pads[0::2], self.pads[1::2]
        if self.pad_mode != "constant" or before != after:
            return None
        return before[::-1]


@dataclass(frozen=True)
class ExactSum:
    """All sums of one layer: `sum_i code_i word_i` for each output.

    Args:
        words: Integer weights, int64, # shape: (out, in / groups, *kernel) or (out, in)
        geometry: How they slide.
        max_code: Largest magnitude of an input code.
        name: Of the layer, for errors.
        code_dtype: uint8 or int8 where all input codes fit; None where both signs may occur.

    Raises:
        IntegerError: A sum may exceed 2^53.
    """

    words: Tensor
    geometry: Geometry
    max_code: int
    name: str
    code_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        largest = int(self.bounds.max())
        if largest >= EXACT_FLOAT64 or float(self._norms.double().sum(1).max()) >= 2.0**60:
            msg = (
                f"Layer '{self.name}': sums are computed exactly below 2^53, but this layer's may "
                f"reach {float(largest):.3g}. Give it fewer weight bits."
            )
            raise IntegerError(msg)

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is derived: packed words cannot be copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _norms(self) -> Tensor:
        """Sum of magnitudes by input channel, # shape: (out, in / groups)."""
        return self.words.abs().flatten(2).sum(2) if self.words.ndim > 2 else self.words.abs()

    @cached_property
    def bounds(self) -> Tensor:
        """Largest magnitude of each output's sum, int64, # shape: (out,)."""
        return self._norms.sum(1) * self.max_code

    @cached_property
    def is_wide(self) -> bool:
        """Whether a single input channel may exceed 2^24, so that float64 is needed."""
        return int(self._norms.max()) * self.max_code >= EXACT_FLOAT32

    @cached_property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """Ranges of input channels (of each group) whose sums stay below 2^24."""
        n = self.words.shape[1]
        if self.is_wide:
            return ((0, n),)
        cuts, total = [0], torch.zeros_like(self.bounds)
        for channel in range(n):
            more = total + self._norms[:, channel] * self.max_code
            if int(more.max()) >= EXACT_FLOAT32:
                cuts.append(channel)
                more = self._norms[:, channel] * self.max_code
            total = more
        return tuple(itertools.pairwise([*cuts, n]))

    @cached_property
    def _parts(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """One exact product or convolution a range of channels."""
        return tuple(self._part(self.words[:, i:j]) for i, j in self.chunks)

    def _part(self, words: Tensor) -> Callable[[Tensor], Tensor]:
        layout = torch.channels_last if words.ndim == 4 else torch.contiguous_format
        floats = words.to(torch.float64 if self.is_wide else torch.float32)
        slide = partial(self._slide, words=floats.contiguous(memory_format=layout))
        codes = self.code_dtype or code_dtype(-self.max_code, self.max_code)
        g = self.geometry
        if not self._takes_bytes(words, codes) or not has_exact_int8():
            return slide
        stride, padding = g.stride[0], g.pads[0]
        return Int8Convolution(words, codes, slide, stride=stride, padding=padding, groups=g.groups)

    def _takes_bytes(self, words: Tensor, codes: torch.dtype) -> bool:
        """Whether `Int8Convolution` can take codes of this type, and words."""
        g = self.geometry
        if words.ndim != 4 or codes == torch.float32:
            return False
        is_square = words.shape[2] == words.shape[3] and g.stride[0] == g.stride[1]
        is_plain = g.pad_mode == "constant" and len({*g.pads}) == 1 and g.dilation == (1, 1)
        # Signed codes are summed from 0 to 255, and corrected afterwards.
        largest = 255 if codes == torch.int8 else self.max_code
        are_exact = int(words.abs().flatten(1).sum(1).max()) * largest < EXACT_FLOAT32
        are_bytes = -128 <= int(words.min()) <= int(words.max()) <= 127
        is_common = is_square and is_plain and g.pads[0] <= words.shape[2] // 2
        return is_common and are_exact and are_bytes

    def fast(self, codes: Tensor) -> Tensor:
        """Return the sums as integers in floating point, float32 where they fit, else float64.

        Args:
            codes: Integers of any type, # shape: (N, in, *spatial) or (N, ..., in)
        """
        if len(self.chunks) == 1:
            return self._parts[0](codes)
        channel_dim = 1 if self.geometry.stride else codes.ndim - 1
        split = codes.unflatten(channel_dim, (self.geometry.groups, -1))
        total: Tensor | None = None
        for (start, stop), sums_of in zip(self.chunks, self._parts, strict=True):
            part = split.narrow(channel_dim + 1, start, stop - start)
            sums = sums_of(part.flatten(channel_dim, channel_dim + 1)).double()
            total = sums if total is None else total.add_(sums)
        assert total is not None
        return total

    def slow(self, codes: Tensor) -> Tensor:
        """Return the same sums in int64, by windows and integer products.

        Args:
            codes: int64, # shape: (N, in, *spatial) or (N, ..., in)
        """
        g = self.geometry
        if not g.stride:
            return codes @ self.words.T
        windows = F.pad(codes, g.pads, g.pad_mode) if any(g.pads) else codes
        windows = windows.unflatten(1, (g.groups, -1))
        for dim, (size, step, gap) in enumerate(
            zip(self.words.shape[2:], g.stride, g.dilation, strict=True)
        ):
            windows = windows.unfold(3 + dim, (size - 1) * gap + 1, step)[..., ::gap]
        words = self.words.unflatten(0, (g.groups, -1))
        space, kernel = "hw"[: len(g.stride)], "xy"[: len(g.stride)]
        equation = f"ngc{space}{kernel},goc{kernel}->ngo{space}"
        return torch.einsum(equation, windows, words).flatten(1, 2)

    def _slide(self, codes: Tensor, words: Tensor) -> Tensor:
        g, codes = self.geometry, codes.to(words.dtype)
        if not g.stride:
            return F.linear(codes, words)
        padding = g.plain_padding
        if padding is None:
            codes = F.pad(codes, g.pads, g.pad_mode)
        convolve = _CONVOLUTIONS[len(g.stride)]
        sums: Tensor = convolve(codes, words, None, g.stride, padding or 0, g.dilation, g.groups)
        return sums


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep products of reduced precision (bfloat16, TF32) and autocast out."""
    parts = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    held = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for part, precision in zip(parts, held, strict=True):
            part.fp32_precision = precision
