"""What a layer hands to its requantization: ratios times integer sums, plus an offset."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adq_search.errors import IntegerError
from adq_search.integer._factor import FactorOf
from adq_search.integer._fixed import Rescale, carrier_for, make_rescale
from adq_search.integer.steps import Requantize, RequantizeByFactor, Step

#: Stands for no limit where integers are clipped.
NO_LIMIT = 2**60


@dataclass(frozen=True)
class Affine:
    """Real values as `sum_j ratio_j v_j (times the factor) + offset`, by channel.

    Args:
        sources: Names of the integers v_j, and of the factor behind them where there is one.
        ratios: What one is worth, float64, each # shape: (channels,)
        offset: float64, # shape: (channels,)
        bounds: Largest magnitude of each v_j, float64, each # shape: (channels,)
        n_trailing: Dimensions behind that of the channels.
        factor: Of the samples (ASQ).
    """

    sources: tuple[str, ...]
    ratios: list[Tensor]
    offset: Tensor
    bounds: list[Tensor]
    n_trailing: int
    factor: FactorOf | None = None

    @property
    def plain_limit(self) -> float:
        """Largest magnitude of a value without factor and offset."""
        return float(self._reach().max())

    @property
    def limit(self) -> float:
        """Largest magnitude of a value."""
        largest_factor = 1.0 if self.factor is None else self.factor.limit
        return float((self._reach() * largest_factor + self.offset.abs()).max())

    def rescale(
        self, unit: float, lowest: int, highest: int, *, has_offset: bool = True
    ) -> Rescale:
        """Return the multipliers and shifts to integers of this unit."""
        offset = self.offset / unit if has_offset else torch.zeros_like(self.offset)
        return make_rescale(
            [self._shaped(r / unit) for r in self.ratios],
            self._shaped(offset),
            [self._shaped(b) for b in self.bounds],
            lowest=lowest,
            highest=highest,
        )

    def requantize(self, unit: float, lowest: int, highest: int) -> Step:
        """Return the step to integers of this power-of-two unit."""
        if self.factor is None:
            return Requantize(self.rescale(unit, lowest, highest))
        plain = carrier_for(self.plain_limit).unit
        return RequantizeByFactor(
            self.rescale(plain, -NO_LIMIT, NO_LIMIT, has_offset=False),
            shift=self.factor.fraction_bits + round(math.log2(unit / plain)),
            offset=self._shaped(self.offset / unit).round().long(),
            lowest=lowest,
            highest=highest,
        )

    def _reach(self) -> Tensor:
        products = [b * r.abs() for b, r in zip(self.bounds, self.ratios, strict=True)]
        return torch.stack(products).sum(0)

    def _shaped(self, by_channel: Tensor) -> Tensor:
        return by_channel.view(-1, *(1,) * self.n_trailing)


def folded(affine: Affine, norm: nn.Module, place: str) -> Affine:
    """Return the affine form behind a batch norm in evaluation: y g + h.

    Args:
        affine: Of the norm's input.
        norm: A batch norm.
        place: Its name, for the error.

    Raises:
        IntegerError: The norm has no running statistics.
    """
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        msg = (
            f"{place} normalizes by each batch, so it cannot be folded. Make it with "
            "`track_running_stats=True`."
        )
        raise IntegerError(msg)
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = torch.zeros_like(gain)
    if norm.affine:
        gain = gain * norm.weight.detach().double()
        shift = norm.bias.detach().double()
    return replace(
        affine,
        ratios=[ratio * gain for ratio in affine.ratios],
        offset=(affine.offset - norm.running_mean.double()) * gain + shift,
    )
