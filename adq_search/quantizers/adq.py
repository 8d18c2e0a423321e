r"""ADQ: weights on an adaptive codebook, found by quantiles and moved by an average.

Notation:
    c_j     codebook: k negative levels, 0, k positive ones, with k = 2^(b-1) - 1
    i(w)    index of the level nearest to w (thresholds at midpoints)
    m       EMA momentum: c_j <- m c_j + (1 - m) mean{w : i(w) = j}

References:
    [Jia2025] ADQ, arXiv 2510.19760. Its summary and one review are public, its formulas are not:
    quantiles of positive and of negative weights, a zero level, one codebook a layer, EMA.

Choices of this package where the paper is not known: quantile positions i / (k + 1/2), which give
all levels the same share of the weights (option `quantile_rule="plain"`: i / (k + 1)); zero is
pinned; the codebook moves after each forward pass in training mode; levels without weights stay;
the gradient passes to the weights unchanged, none goes to the codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adq_search.policy import OptionValue
from adq_search.quantizers import _native, _native_functions
from adq_search.quantizers._base import WEIGHT_QUANTIZERS, WeightQuantizer, check_bits
from adq_search.quantizers._calibration import computing_dtype, quantile
from adq_search.quantizers._compile import Kernel, compiles
from adq_search.quantizers._nearest import nearest_index, nearest_level, nearest_tables
from adq_search.quantizers._rows import from_rows, row_order, to_rows
from adq_search.quantizers._through import straight_through


@WEIGHT_QUANTIZERS.register("adq")
class AdqWeight(WeightQuantizer):
    """Adaptive codebook for the weights of one layer.

    Attributes:
        codebook: Sorted levels in units of the weights, # shape: (2^b - 1,)
        momentum: EMA momentum m, # shape: ()
    """

    name = "adq"
    has_codebook = True
    option_values: ClassVar[Mapping[str, tuple[OptionValue, ...]]] = {
        "quantile_rule": ("half", "plain")
    }

    codebook: Tensor
    momentum: Tensor

    def __init__(
        self,
        bits: int,
        weight_shape: tuple[int, ...],
        *,
        ema_momentum: float | None = None,
        **options: OptionValue,
    ) -> None:
        super().__init__(bits, weight_shape, ema_momentum=ema_momentum, **options)
        self._n_side = self.n_levels(bits, **options) // 2
        evenly = torch.arange(-self._n_side, self._n_side + 1) / self._n_side
        self.register_buffer("codebook", evenly)
        self.register_buffer("momentum", torch.tensor(float(ema_momentum or 0.0)))

    @classmethod
    def n_levels(cls, bits: int, **options: OptionValue) -> int:
        """Return 2^b - 1: as many levels below zero as above, and zero."""
        cls.resolve_options(options)
        return int(2 ** check_bits(bits)) - 1

    def _fit(self, values: Tensor) -> None:
        weights = values.flatten().to(computing_dtype(values, self.codebook))
        sides = [weights[weights < 0].neg(), weights[weights > 0]]
        if not len(sides[0]) and not len(sides[1]):
            return
        # A side without weights mirrors the other one.
        negative, positive = (
            self._quantiles(side if len(side) else other)
            for side, other in zip(sides, sides[::-1], strict=True)
        )
        zero = weights.new_zeros(1)
        self.codebook.copy_(torch.cat([-negative.flip(0), zero, positive]))

    def _quantiles(self, magnitudes: Tensor) -> Tensor:
        """Levels of one side, ascending, # shape: (k,)."""
        spacing = 0.5 if self.options["quantile_rule"] == "half" else 1.0
        shares = torch.arange(1, self._n_side + 1, device=magnitudes.device)
        return quantile(magnitudes.unsqueeze(0), shares / (self._n_side + spacing))[0]

    def _quantize(self, values: Tensor) -> Tensor:
        parameters = (self.codebook, self.momentum)
        if _native.takes(values, *parameters):
            return _native_functions.codebook_through(values, *parameters, follows=self.training)
        with torch.no_grad():
            quantized, sums, counts = snapped(values.detach(), self.codebook)
            if self.training:
                sums[self._n_side] = 0
                moved = moved_codebook(self.codebook, sums, counts, self.momentum)
                self.codebook.copy_(moved)
        return straight_through(values, quantized)

    def _codes(self, values: Tensor) -> Tensor:
        weights = values.to(computing_dtype(values, self.codebook))
        return nearest_index(weights, self.codebook.to(weights.dtype)).long()

    def _levels(self) -> Tensor:
        return self.codebook.clone()

    def _saturated(self, values: Tensor) -> Tensor:
        # No clipping: the outermost levels are means, and the gradient passes everywhere.
        return torch.zeros_like(values, dtype=torch.bool)

    def _positive_parameters(self) -> list[Tensor]:
        return [self.codebook.new_zeros(0)]


def snapped(weights: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest levels; by level, sums of weights less their level, and counts."""
    levels = codebook.to(computing_dtype(weights, codebook))
    order = row_order(weights)
    rows = to_rows(weights, order).to(levels.dtype)
    tables = nearest_tables(levels)
    quantized, index = _snap(rows, *tables, compiled=compiles(weights))
    # NaN counts beyond the codebook.
    by_level = rows.new_zeros(2, len(rows), len(tables[0]))
    by_level[0].scatter_add_(1, index, rows - quantized)
    by_level[1].scatter_add_(1, index, torch.ones_like(rows))
    sums, counts = by_level.sum(dim=1)[:, : len(levels)]
    return from_rows(quantized, weights, order).to(weights.dtype), sums, counts


_snap = Kernel(nearest_level)


def moved_codebook(codebook: Tensor, sums: Tensor, counts: Tensor, momentum: Tensor) -> Tensor:
    """Return c_j + (1 - m) mean(w - c_j), the EMA step: small numbers are averaged.

    Levels cannot change order: a mean lies within its level's interval. Nothing waits for the
    values, so a GPU is not held up.

    Args:
        codebook: One or more of them, # shape: (..., levels)
        sums: By level, the sum of weights less their level, same shape; 0 for a level that stays,
            as the middle one does.
        counts: By level, how many weights there are, same shape.
        momentum: m, for all levels of a codebook.
    """
    means = sums / counts.clamp(min=1)
    return codebook + (means * (1 - momentum)).to(codebook.dtype)
