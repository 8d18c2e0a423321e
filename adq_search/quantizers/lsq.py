r"""LSQ: uniform levels with a learned step size.

Notation:
    v, \\hat v = clip(round(v / s), -Q_N, Q_P) s, step size s, N values of one sample or filter

References:
    [Esser2020] Learned Step Size Quantization, ICLR 2020: Eqs. 1-3, sections 2.1 and 2.2.

Two choices that the paper leaves open: for inputs, N in the gradient scale g = 1 / sqrt(N Q_P)
counts the features of one *sample*, so that g does not change with the batch size; for weights
with a step per output channel, N counts the weights of one filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from adq_search.policy import OptionValue
from adq_search.quantizers._base import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    InputQuantizer,
    WeightQuantizer,
)
from adq_search.quantizers._calibration import EPS, initial_step, integer_grid, n_features
from adq_search.quantizers._through import (
    uniform_inputs_through,
    uniform_integers,
    uniform_through,
)


@WEIGHT_QUANTIZERS.register("lsq")
class LsqWeight(WeightQuantizer):
    """LSQ for weights: codes -2^(b-1) to 2^(b-1) - 1, one step an output channel or a tensor.

    Attributes:
        step: The trained steps s, # shape: (out, 1, ..., 1) or ()
    """

    name = "lsq"
    option_values: ClassVar[Mapping[str, tuple[OptionValue, ...]]] = {
        "granularity": ("channel", "tensor")
    }

    qmin: Tensor
    qmax: Tensor

    def __init__(
        self,
        bits: int,
        weight_shape: tuple[int, ...],
        *,
        ema_momentum: float | None = None,
        **options: OptionValue,
    ) -> None:
        super().__init__(bits, weight_shape, ema_momentum=ema_momentum, **options)
        self.register_buffer("qmin", torch.tensor(-(2.0 ** (bits - 1))))
        self.register_buffer("qmax", torch.tensor(2.0 ** (bits - 1) - 1))
        self.step = nn.Parameter(torch.ones(self._group_shape()))

    def _fit(self, values: Tensor) -> None:
        self.step.copy_(initial_step(self._rows(values), self.qmax).view(self.step.shape))

    def _quantize(self, values: Tensor) -> Tensor:
        n = self._n_group
        return uniform_through(values, self.step, self.qmin, self.qmax, n_features=n)

    def _codes(self, values: Tensor) -> Tensor:
        return uniform_integers(values, self._positive(), self.qmin, self.qmax).long()

    def _levels(self) -> Tensor:
        grid = integer_grid(self.bits, self.qmin, self.step)
        return self._positive().reshape(-1, 1).mul(grid).reshape(*self.step.shape[:1], -1)

    def _saturated(self, values: Tensor) -> Tensor:
        scaled = values / self._positive()
        return (scaled < self.qmin) | (scaled > self.qmax)

    def _positive_parameters(self) -> list[Tensor]:
        return [self.step]

    @property
    def lowest_code(self) -> int:
        """The code of the lowest level."""
        return int(self.qmin)

    def _positive(self) -> Tensor:
        return self.step.detach().abs().clamp(min=EPS)


@INPUT_QUANTIZERS.register("lsq")
class LsqInput(InputQuantizer):
    """LSQ for inputs: one step a layer, signed or unsigned as calibration finds.

    Attributes:
        step: The trained step s, # shape: ()
    """

    name = "lsq"
    is_elementwise = True

    def __init__(
        self, bits: int, *, n_channels: int, channel_dim: int, **options: OptionValue
    ) -> None:
        super().__init__(bits, n_channels=n_channels, channel_dim=channel_dim, **options)
        self.step = nn.Parameter(torch.ones(()))

    def _fit(self, values: Tensor) -> None:
        self._fit_range(values)
        self.step.copy_(initial_step(values.reshape(1, -1), self.qmax)[0])

    def _quantize(self, values: Tensor) -> Tensor:
        return self._quantize_part(values, values)

    def _quantize_part(self, part: Tensor, whole: Tensor) -> Tensor:
        n = self.n_features(whole)
        return uniform_inputs_through(part, self.step, self.qmin, self.qmax, n_features=n)

    def n_features(self, values: Tensor) -> int:
        """Return N of the step's gradient scale: the features of one sample."""
        return n_features(values, self._sample_shape(values))

    def _codes(self, values: Tensor) -> Tensor:
        return uniform_integers(values, self._positive(), self.qmin, self.qmax).long()

    def _levels(self) -> Tensor:
        return self._positive() * integer_grid(self.bits, self.qmin, self.step)

    def _saturated(self, values: Tensor) -> Tensor:
        scaled = values / self._positive()
        return (scaled < self.qmin) | (scaled > self.qmax)

    def _positive_parameters(self) -> list[Tensor]:
        return [self.step]

    def _positive(self) -> Tensor:
        return self.step.detach().abs().clamp(min=EPS)
