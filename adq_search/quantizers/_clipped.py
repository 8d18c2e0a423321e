r"""What POT and POST share: exponential levels under a learned clipping threshold.

Notation:
    Q = alpha {0, +-B^-k, ..., +-B^-1, +-1} with base B: 2 (POT) or sqrt 2 (POST)
    b_bit: k = 2^(b-1) - 2, that is 2^b - 1 levels, which b bits can name
    eq17:  k = 2^(b-1) - 1, that is 2^b + 1 levels, as [Zhou2025] prints Eqs. 3 and 17

References:
    [Zhou2025] arXiv 2504.17263, section 3.3; what it leaves open (projection, training of alpha)
    is taken from its public code (SENGEL13/ASQ-POST): nearest level in the linear domain, alpha
    learned per output channel from the 0.99-quantile of |w|, its gradient scaled by 1 / sqrt(N)
    with N weights of a channel, no weight normalization.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from adq_search.policy import OptionValue
from adq_search.quantizers._base import WeightQuantizer, check_bits
from adq_search.quantizers._calibration import EPS, computing_dtype, quantile
from adq_search.quantizers._nearest import nearest_index
from adq_search.quantizers._through import clipped_through

INITIAL_QUANTILE = 0.99


class ClippedPowerWeight(WeightQuantizer):
    """Weights on `alpha * {0, +-base^-k .. +-1}`; a quantizer adds its name and base.

    Attributes:
        threshold: The trained alpha, # shape: (out, 1, ..., 1) or ()
    """

    #: Base of the levels as a power of two: 1 for 2, 1/2 for sqrt 2.
    log2_base: ClassVar[float]
    option_values: ClassVar[Mapping[str, tuple[OptionValue, ...]]] = {
        "granularity": ("channel", "tensor"),
        "levels": ("b_bit", "eq17"),
    }

    signs: Tensor
    exponents: Tensor

    def __init__(
        self,
        bits: int,
        weight_shape: tuple[int, ...],
        *,
        ema_momentum: float | None = None,
        **options: OptionValue,
    ) -> None:
        super().__init__(bits, weight_shape, ema_momentum=ema_momentum, **options)
        n_magnitudes = self.n_levels(bits, **options) // 2
        fall = torch.arange(n_magnitudes, dtype=torch.float32)
        one, zero = torch.ones(n_magnitudes), torch.zeros(1)
        # Small integers rather than levels: exact in every dtype the module is moved to.
        self.register_buffer("signs", torch.cat([-one, zero, one]))
        self.register_buffer("exponents", torch.cat([fall, zero, fall.flip(0)]))
        self.threshold = nn.Parameter(torch.ones(self._group_shape()))
        self._known_levels: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @classmethod
    def n_levels(cls, bits: int, **options: OptionValue) -> int:
        """Return 2^b - 1 levels, or 2^b + 1 for `levels="eq17"`."""
        extra = 1 if cls.resolve_options(options)["levels"] == "eq17" else -1
        return int(2 ** check_bits(bits)) + extra

    def unit_levels(self, dtype: torch.dtype) -> Tensor:
        """Return the levels for alpha = 1, # shape: (n_levels,)."""
        snapped = self.options.get("sqrt_half", "exact")
        if snapped != "exact":
            root = float(Fraction(str(snapped)))
            whole, rest = self.exponents.to(dtype) // 2, self.exponents.to(dtype) % 2
            return self.signs.to(dtype) * torch.exp2(-whole) * torch.where(rest == 1, root, 1.0)
        return self.signs.to(dtype) * torch.exp2(self.exponents.to(dtype) * -self.log2_base)

    def _fit(self, values: Tensor) -> None:
        rows = self._rows(values).abs()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        thresholds = quantile(rows, rows.new_tensor([INITIAL_QUANTILE])).squeeze(-1)
        alive = thresholds > EPS
        spare = thresholds[alive].mean() if bool(alive.any()) else rows.new_ones(())
        self.threshold.copy_(torch.where(alive, thresholds, spare).view(self.threshold.shape))

    def _quantize(self, values: Tensor) -> Tensor:
        levels = self.levels_for(values, self.threshold)
        return clipped_through(values, self.threshold, levels, self.gradient_scale)

    def levels_for(self, values: Tensor, threshold: Tensor) -> Tensor:
        """Return the levels for alpha = 1 as `clipped_through` takes them, # shape: (n_levels,)."""
        key = computing_dtype(values, threshold), self.exponents.device
        if key not in self._known_levels:
            self._known_levels[key] = self.unit_levels(key[0])
        return self._known_levels[key]

    @property
    def gradient_scale(self) -> float:
        """Of the gradient to the threshold: 1 / sqrt(N)."""
        return float(self._n_group**-0.5)

    def _codes(self, values: Tensor) -> Tensor:
        scaled = self._scaled(values)
        return nearest_index(scaled, self.unit_levels(scaled.dtype)).long()

    def _levels(self) -> Tensor:
        levels = self._positive().reshape(-1, 1) * self.unit_levels(self.threshold.dtype)
        return levels.reshape(*self.threshold.shape[:1], -1)

    def _saturated(self, values: Tensor) -> Tensor:
        return self._scaled(values).abs() > 1

    def _positive_parameters(self) -> list[Tensor]:
        return [self.threshold]

    def _scaled(self, values: Tensor) -> Tensor:
        threshold = self._positive()
        return values.to(computing_dtype(values, threshold)) / threshold

    def _positive(self) -> Tensor:
        return self.threshold.detach().abs().clamp(min=EPS)
