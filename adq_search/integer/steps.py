"""What an integer network does, one step after another, on integers only.

A step takes int64 tensors and returns int64, or takes the same integers in other types (float64
between layers, float32 for sums, the narrowest for codes) and returns the same results, faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from adq_search.integer._factor import shift_right
from adq_search.integer._fixed import Rescale
from adq_search.integer._int8 import code_dtype

#: Size, stride and padding of pooling windows, one entry a spatial dimension.
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Step(Protocol):
    """One step of an integer network."""

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the result of the step."""
        ...


class Sums(Protocol):
    """The integer sums of a layer: exact, or by shifts and a table."""

    @property
    def bounds(self) -> Tensor:
        """Largest magnitude of each output's sum, int64, # shape: (out,)."""
        ...

    def fast(self, codes: Tensor) -> Tensor:
        """Return the sums as integers in floating point, from codes of any other type."""
        ...

    def slow(self, codes: Tensor) -> Tensor:
        """Return the sums in int64, from codes in int64."""
        ...


@dataclass(frozen=True, slots=True)
class Operation:
    """A step with its place in the network.

    Args:
        result: Name of what it makes.
        sources: Names of what it takes.
        step: What it does.
    """

    result: str
    sources: tuple[str, ...]
    step: Step


@dataclass(frozen=True, slots=True)
class Enter:
    """Brings float inputs to fixed point; what lies beyond the bound is cut off.

    Args:
        unit: Value of one.
        bound: Largest magnitude of a result.
    """

    unit: float
    bound: int

    def __call__(self, *values: Tensor) -> Tensor:
        """Return integers in float64."""
        scaled = values[0].double() / self.unit
        return scaled.round_().clamp_(-self.bound, self.bound)


@dataclass(frozen=True, slots=True)
class Accumulate:
    """The sums of a layer over one bank of words."""

    sums: Sums

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the sums."""
        is_integer = values[0].dtype == torch.int64
        return self.sums.slow(values[0]) if is_integer else self.sums.fast(values[0])


@dataclass(frozen=True, slots=True)
class Requantize:
    """Multiplier and shift: sums, or values, to values between layers or to codes.

    Args:
        rescale: Multipliers, shifts and offsets.
        makes_codes: Whether the results are input codes of the next layer.
    """

    rescale: Rescale
    makes_codes: bool = False

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the results."""
        if values[0].dtype == torch.int64:
            return self.rescale.slow(*values)
        dtype = torch.float64
        if self.makes_codes:
            dtype = code_dtype(self.rescale.lowest, self.rescale.highest)
        return self.rescale.fast(*values, dtype=dtype)


@dataclass(frozen=True, slots=True)
class RequantizeByFactor:
    """As `Requantize`, with each sample's factor in between (ASQ).

    Args:
        rescale: From sums to values without the factor.
        shift: Right shift after the product with the factor.
        offset: Added then, int64, broadcastable.
        lowest: Smallest result.
        highest: Largest result.
    """

    rescale: Rescale
    shift: int
    offset: Tensor
    lowest: int
    highest: int

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the results; the last source is the factor."""
        *sums, factors = values
        is_integer = sums[0].dtype == torch.int64
        plain = self.rescale.slow(*sums) if is_integer else self.rescale.fast(*sums).long()
        out = shift_right(plain * factors, torch.tensor(self.shift)).add_(self.offset)
        out = out.clamp_(self.lowest, self.highest)
        return out if is_integer else out.double()


@dataclass(frozen=True, slots=True)
class Add:
    """A residual addition: both sides shifted to one unit, then clipped (ReLU).

    Args:
        shifts: Right shift of each side; negative shifts left, without loss.
        lowest: Smallest result.
        highest: Largest result.
    """

    shifts: tuple[int, int]
    lowest: int
    highest: int

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the sum."""
        first, second = (_shifted(v, s) for v, s in zip(values, self.shifts, strict=True))
        # A shifted side is ours to overwrite.
        total = first.add_(second) if self.shifts[0] else second + first
        return total.clamp_(self.lowest, self.highest)


@dataclass(frozen=True, slots=True)
class Clip:
    """ReLU and its kin.

    Args:
        lowest: Smallest result.
        highest: Largest result.
    """

    lowest: int
    highest: int

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the clipped values."""
        return values[0].clamp(self.lowest, self.highest)


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean pooling: sums over windows, then a multiplier.

    Args:
        rescale: From a window's sum to its mean.
        window: Size, stride and padding of the windows, by dimension; None for one over all.
        keeps_dimensions: Whether a window over all leaves dimensions of size 1.
    """

    rescale: Rescale
    window: Window | None = None
    keeps_dimensions: bool = True

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the means."""
        inputs = values[0]
        if self.window is None:
            spatial = tuple(range(2, inputs.ndim))
            sums = inputs.sum(dim=spatial, keepdim=self.keeps_dimensions)
        else:
            size, stride, padding = self.window
            sums = F.pad(inputs, [p for p in reversed(padding) for _ in range(2)])
            for dim, (length, step) in enumerate(zip(size, stride, strict=True)):
                sums = sums.unfold(2 + dim, length, step).sum(-1)
        return self.rescale.slow(sums) if sums.dtype == torch.int64 else self.rescale.fast(sums)


@dataclass(frozen=True, slots=True)
class Move:
    """Moves or selects integers and computes nothing: max pooling, slices, padding, shapes."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, *values: Tensor) -> Tensor:
        """Return the moved values."""
        return self.function(values[0])


def _shifted(values: Tensor, shift: int) -> Tensor:
    if shift == 0:
        return values
    if values.dtype == torch.int64:
        return shift_right(values, torch.tensor(shift))
    scaled = values * 2.0**-shift
    return scaled if shift < 0 else scaled.add_(0.5).floor_()
