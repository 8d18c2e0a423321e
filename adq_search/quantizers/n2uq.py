r"""N2UQ: inputs cut at learned thresholds, onto equidistant levels.

Notation:
    M = 2^b - 1 intervals of widths a_i from S_0 = s on; x' = beta_1 x; D = 2 / M
    T_i = S_(i-1) + a_i / 2; \\hat x = beta_2 D (#{i : x' > T_i} + n)

References:
    [Liu2022] Nonuniform-to-Uniform Quantization, CVPR 2022, Eqs. 7-10, and its public code.

Extensions of this package: thresholds start where LSQ would put them (beta_1 = D / s_0,
beta_2 = s_0 / D, a_i = D, with LSQ's initial step s_0), and signed inputs have the integer offset
n = -2^(b-1), so that zero stays on the grid (n = 0 in the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adq_search.policy import OptionValue
from adq_search.quantizers._base import INPUT_QUANTIZERS, InputQuantizer
from adq_search.quantizers._calibration import EPS, initial_step
from adq_search.quantizers._thresholds import (
    MIN_WIDTH,
    equidistant_levels,
    threshold_index,
    thresholds_through,
)


@INPUT_QUANTIZERS.register("n2uq")
class N2uqInput(InputQuantizer):
    """N2UQ for inputs: 2^b equidistant levels behind 2^b - 1 learned thresholds.

    Attributes:
        start: Start of the first interval s, # shape: ()
        widths: Interval widths a_i, used as max(a_i, 1e-3), # shape: (2^b - 1,)
        in_scale: beta_1, # shape: ()
        out_scale: beta_2, # shape: ()
    """

    name = "n2uq"
    is_elementwise = True
    # Levels and thresholds are learned apart: a level need not lie within its own interval.
    is_projection = False
    learning_rate_factor = 0.1

    def __init__(
        self, bits: int, *, n_channels: int, channel_dim: int, **options: OptionValue
    ) -> None:
        super().__init__(bits, n_channels=n_channels, channel_dim=channel_dim, **options)
        n_intervals = self.n_levels(bits) - 1
        self.start = nn.Parameter(torch.zeros(()))
        self.widths = nn.Parameter(torch.full((n_intervals,), 2 / n_intervals))
        self.in_scale = nn.Parameter(torch.ones(()))
        self.out_scale = nn.Parameter(torch.ones(()))

    def _fit(self, values: Tensor) -> None:
        self._fit_range(values)
        d = 2 / self.widths.numel()
        step = initial_step(values.reshape(1, -1), self.qmax)[0]
        self.in_scale.copy_(d / step)
        self.out_scale.copy_(step / d)
        self.widths.fill_(d)
        self.start.copy_(self.qmin * d)

    def _quantize(self, values: Tensor) -> Tensor:
        return thresholds_through(values, *self.trained(), self.qmin)

    def trained(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return start, widths, beta_1 and beta_2 as they are trained."""
        return self.start, self.widths, self.in_scale, self.out_scale

    def _codes(self, values: Tensor) -> Tensor:
        index = threshold_index(values, self.start, self.widths, self.in_scale)
        return index.long() + self.qmin.long()

    def _levels(self) -> Tensor:
        return equidistant_levels(self.widths, self.out_scale.abs().clamp(min=EPS), self.qmin)

    def _saturated(self, values: Tensor) -> Tensor:
        scaled = values * self.in_scale.abs().clamp(min=EPS)
        end = self.start + self.widths.clamp(min=MIN_WIDTH).sum()
        # Zeros below the first interval are rounded to zero, not cut off.
        return (scaled > end) | ((scaled < self.start) & (values < 0))

    def _positive_parameters(self) -> list[Tensor]:
        return [self.widths, self.in_scale, self.out_scale]
