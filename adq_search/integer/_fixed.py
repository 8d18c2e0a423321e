r"""Fixed-point rescaling: integers times a multiplier, shifted back, rounded and clipped.

Notation:
    v_j     integers, |v_j| <= b_j
    r_j     real ratios, a_c real offset of channel c
    m_j     multipliers round(r_j 2^s), s the shift of a channel
    out = clip(floor((sum_j v_j m_j + round(a 2^s) + 2^(s-1)) / 2^s), lowest, highest)

Ties round up. int64 always holds the sum; float64 computes it exactly while it stays below 2^53.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adq_search.errors import IntegerError
from adq_search.integer._exact import EXACT_FLOAT64

#: Bits of a sum that int64 holds with room to spare.
SUM_BITS = 62
#: Bits of a multiplier, sign included, where nothing else is asked for.
MULTIPLIER_BITS = 32
#: Bits that a multiplier keeps before speed matters: the precision of float32, and a sign.
MULTIPLIER_ENOUGH = 25
#: Share of the largest result that rounded multipliers may lose: about what float32 loses.
COARSEST_RESULT = 2.0**-20
#: Values that are rescaled together: half a megabyte of float64.
BLOCK = 2**16
#: Bits of a value between layers, sign included.
CARRIER_BITS = 32


@dataclass(frozen=True, slots=True)
class Carrier:
    """What the integers of a tensor mean.

    Args:
        unit: Value of one.
        bound: Largest magnitude that can occur.
    """

    unit: float
    bound: int

    @property
    def limit(self) -> float:
        """Largest magnitude of a value."""
        return self.unit * self.bound


def carrier_for(limit: float) -> Carrier:
    """Return the finest power-of-two unit that keeps values of this magnitude within 31 bits.

    One bit is left free, so that rounding cannot overflow.

    Args:
        limit: Largest magnitude of a value.
    """
    unit = power_unit(limit, CARRIER_BITS - 2)
    return Carrier(unit=unit, bound=int(limit / unit) + 1)


def carrier_of_sum(first: Carrier, second: Carrier) -> Carrier:
    """Return the finest unit of the two that keeps the sum within 32 bits, or the next above."""
    unit, limit = max(first.unit, second.unit), first.limit + second.limit
    while limit / unit + 2 >= 2 ** (CARRIER_BITS - 1):
        unit *= 2
    return Carrier(unit=unit, bound=int(limit / unit) + 2)


def power_unit(limit: float, bits: int) -> float:
    """Return the smallest power of two of which `limit` holds at most 2^bits; 1 for no limit."""
    return 2.0 ** (math.frexp(limit)[1] - bits) if limit > 0 else 1.0


@dataclass(frozen=True)
class Rescale:
    """A multiplier and a shift for each channel (or one for all).

    Args:
        multipliers: m_j, int64, one tensor an input, each broadcastable to it.
        shifts: s >= 1, int64, broadcastable.
        offsets: round(a 2^s) + 2^(s-1), int64, broadcastable.
        lowest: Smallest result.
        highest: Largest result.
        is_exact_in_float64: Whether no sum reaches 2^53.
    """

    multipliers: tuple[Tensor, ...]
    shifts: Tensor
    offsets: Tensor
    lowest: int
    highest: int
    is_exact_in_float64: bool

    @cached_property
    def _flat(self) -> Rescale:
        """The same for values whose channels stand last."""
        return replace(
            self,
            multipliers=tuple(m.flatten() for m in self.multipliers),
            shifts=self.shifts.flatten(),
            offsets=self.offsets.flatten(),
        )

    @cached_property
    def _scaled(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Multipliers and offsets over 2^s: exact, since only the exponent changes."""
        down = torch.exp2(-self.shifts.double())
        return tuple(m.double() * down for m in self.multipliers), self.offsets.double() * down

    def fast(self, *values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the results, computed block by block in the cache; channels lie together.

        Args:
            *values: Integers in floating point, all of one shape, samples first.
            dtype: Of the results; the narrowest for codes.
        """
        first = values[0]
        channel_dim = first.ndim - self.shifts.ndim if self.shifts.ndim else min(1, first.ndim - 1)
        last = [value.movedim(channel_dim, -1) for value in values]
        out = torch.empty(last[0].shape, dtype=dtype)
        n_channels = max(1, out.shape[-1])
        rows, out_rows = [v.reshape(-1, n_channels) for v in last], out.view(-1, n_channels)
        work = torch.float64 if self.is_exact_in_float64 else torch.int64
        buffers = [torch.empty(0, dtype=work) for _ in values]
        at_once = max(1, BLOCK // n_channels)
        for start in range(0, len(out_rows), at_once):
            parts = []
            for buffer, value in zip(buffers, rows, strict=True):
                part = value[start : start + at_once]
                parts.append(buffer.resize_(part.shape).copy_(part))
            result = self._flat._rows_(parts)
            # Bytes are reached faster by way of int32.
            out_rows[start : start + at_once] = result.int() if dtype == torch.uint8 else result
        return out.movedim(-1, channel_dim)

    def slow(self, *values: Tensor) -> Tensor:
        """Return the results in int64.

        Args:
            *values: int64, all of one shape.
        """
        return self._integers_([value.clone() for value in values])

    def _rows_(self, parts: list[Tensor]) -> Tensor:
        if not self.is_exact_in_float64:
            return self._integers_(parts)
        scales, offsets = self._scaled
        total = parts[0].mul_(scales[0])
        for part, scale in zip(parts[1:], scales[1:], strict=True):
            total.add_(part.mul_(scale))
        return total.add_(offsets).floor_().clamp_(self.lowest, self.highest)

    def _integers_(self, parts: list[Tensor]) -> Tensor:
        total = parts[0].mul_(self.multipliers[0])
        for part, multiplier in zip(parts[1:], self.multipliers[1:], strict=True):
            total.add_(part.mul_(multiplier))
        total.add_(self.offsets)
        total >>= self.shifts
        return total.clamp_(self.lowest, self.highest)


def make_rescale(
    ratios: Sequence[Tensor],
    offset: Tensor,
    bounds: Sequence[Tensor],
    *,
    lowest: int,
    highest: int,
    multiplier_bits: int = MULTIPLIER_BITS,
) -> Rescale:
    """Choose multipliers of at most `multiplier_bits`.

    They have fewer (but no fewer than 24, as many as a float32 has) where that keeps every sum
    exact in float64, and where int64 holds no more.

    Args:
        ratios: r_j, float64, each broadcastable to its input.
        offset: a in units of the result, float64, broadcastable.
        bounds: Largest magnitude of each input, float64, broadcastable.
        lowest: Smallest result.
        highest: Largest result.
        multiplier_bits: Bits of a multiplier, sign included, 2 to 32.

    Raises:
        IntegerError: A ratio or the offset is not finite, or too large for any shift, or the
            sums leave a multiplier too few bits.
    """
    finite = all(bool(torch.isfinite(t).all()) for t in (*ratios, offset))
    # What is always zero needs no multiplier: the ratio of a dead channel may be anything.
    ratios = [torch.where(b > 0, r, 0.0) for b, r in zip(bounds, ratios, strict=True)]
    reach = offset.abs() + sum(b * r.abs() for b, r in zip(bounds, ratios, strict=True))
    largest = torch.stack([r.abs().broadcast_to(reach.shape) for r in ratios]).amax(0)
    size = _exponent(largest)
    enough = min(MULTIPLIER_ENOUGH, multiplier_bits) - 1 - size
    in_float64 = EXACT_FLOAT64.bit_length() - 2 - _exponent(reach)
    by_multiplier = torch.minimum(multiplier_bits - 1 - size, torch.maximum(in_float64, enough))
    by_sum = SUM_BITS - 1 - _exponent(reach)
    shifts = torch.minimum(by_multiplier, by_sum).clamp(max=SUM_BITS - 1)
    if not finite or int(shifts.min()) < 1:
        msg = (
            f"A rescaling needs finite ratios below 2^{multiplier_bits - 2}, but the largest is "
            f"{float(largest.max()):.3g}. Look for a batch norm with almost no variance."
        )
        raise IntegerError(msg)
    up = torch.exp2(shifts.double())
    top = 2 ** (multiplier_bits - 1) - 1
    multipliers = tuple((r * up).round().long().clamp(-top, top) for r in ratios)
    lost = sum(
        b * (m.double() / up - r).abs() for b, m, r in zip(bounds, multipliers, ratios, strict=True)
    )
    if bool((lost > COARSEST_RESULT * reach).any()):
        msg = (
            f"Rescaling may lose {COARSEST_RESULT:.0e} of the largest result, but sums of "
            f"{SUM_BITS} bits leave multipliers that lose {float((lost / reach).max()):.1e}. "
            "Use narrower inputs, or fewer of them."
        )
        raise IntegerError(msg)
    half = torch.ones_like(shifts) << (shifts - 1)
    offsets = (offset * up).round().long() + half
    sums = offsets.abs().double() + sum(
        b * m.abs().double() for b, m in zip(bounds, multipliers, strict=True)
    )
    return Rescale(
        multipliers,
        shifts,
        offsets,
        lowest,
        highest,
        is_exact_in_float64=bool((sums < EXACT_FLOAT64).all()),
    )


def _exponent(magnitudes: Tensor) -> Tensor:
    """Smallest e with magnitude < 2^e, int64; very small for zero."""
    exponents = torch.frexp(magnitudes).exponent.long()
    return torch.where(magnitudes > 0, exponents, -SUM_BITS)
