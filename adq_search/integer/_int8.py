"""Sums of 8-bit codes and 8-bit words by oneDNN's int8 convolutions, where they are exact.

Products are added in int32, which is exact, on processors with VNNI or AMX. Older ones add pairs of
products in 16 bits, and saturate; so the largest codes and words are tried before the first use.
oneDNN is wrong for some shapes that few networks have (results/integer_speed): only common
shapes are taken, and each once compared with the sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

#: Convolutions to try: channels in and out, groups, size of the kernel. Each takes another routine.
_TRIED = ((64, 64, 1, 3), (5, 7, 1, 1), (3, 64, 1, 5), (64, 64, 4, 3), (32, 32, 32, 3))


def code_dtype(lowest: int, highest: int) -> torch.dtype:
    """Return the narrowest of uint8, int8 and float32 that holds these codes."""
    if lowest >= 0 and highest <= 255:
        return torch.uint8
    return torch.int8 if lowest >= -128 and highest <= 127 else torch.float32


class Int8Convolution:
    """Sums over square windows, computed from bytes.

    Args:
        words: -128 to 127, # shape: (out, in / groups, size, size)
        codes: uint8, or int8 for codes of both signs.
        exact: Computes the same in float32, for any shape of codes.
        stride: Of both spatial dimensions.
        padding: Zeros on every side.
        groups: Groups of channels.
    """

    def __init__(
        self,
        words: Tensor,
        codes: torch.dtype,
        exact: Callable[[Tensor], Tensor],
        *,
        stride: int,
        padding: int,
        groups: int,
    ) -> None:
        self.size, self.stride, self.padding = words.shape[-1], stride, padding
        self.codes, self.exact = codes, exact
        # oneDNN takes unsigned inputs and the one that stands for zero, with which it also pads.
        self._zero = 128 if codes == torch.int8 else 0
        ones, zeros = torch.ones(len(words)), torch.zeros(len(words), dtype=torch.int32)
        self._place = ([stride] * 2, [padding] * 2, [1, 1], groups)
        prepack = torch.ops.onednn.qconv_prepack
        packed = prepack(words.to(torch.int8), ones, 1.0, self._zero, *self._place, None)
        self._weights = (packed, ones, zeros, None)
        self._agrees: dict[torch.Size, bool] = {}

    def __call__(self, codes: Tensor) -> Tensor:
        """Return the sums in float32, # shape: (N, out, height, width)."""
        if not self.suits(codes.shape):
            return self.exact(codes)
        sums = self.raw(codes)
        if codes.shape not in self._agrees:
            self._agrees[codes.shape] = torch.equal(sums, self.exact(codes))
        return sums if self._agrees[codes.shape] else self.exact(codes)

    def suits(self, shape: torch.Size) -> bool:
        """Whether codes of this shape are summed right: at least two windows each way."""
        return min(shape[2:]) + 2 * self.padding >= self.size + self.stride

    def raw(self, codes: Tensor) -> Tensor:
        """Return what oneDNN makes of the codes."""
        codes = codes.to(self.codes).contiguous(memory_format=torch.channels_last)
        if self._zero:
            codes = codes.view(torch.uint8) ^ self._zero
        convolve = torch.ops.onednn.qconv_pointwise
        given = (codes, 1.0, self._zero, *self._weights, *self._place)
        sums: Tensor = convolve(*given, 1.0, 0, torch.float32, "none", [], "")
        return sums


@cache
def has_exact_int8() -> bool:
    """Whether this machine and this torch have int8 convolutions that do not saturate."""
    if not hasattr(torch.ops.onednn, "qconv_pointwise"):
        return False
    for n_in, n_out, groups, size in _TRIED:
        words = torch.full((n_out, n_in // groups, size, size), 127)
        codes = torch.full((2, n_in, size + 3, size + 3), 255)
        try:
            sums = Int8Convolution(
                words, torch.uint8, torch.Tensor.float, stride=1, padding=0, groups=groups
            ).raw(codes)
        except RuntimeError:  # oneDNN has no such routine for this processor
            return False
        if not bool((sums == 255 * 127 * words[0].numel()).all()):
            return False
    return True
