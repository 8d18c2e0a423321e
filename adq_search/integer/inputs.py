r"""Input quantizers in integers: from the fixed-point values between layers to input codes.

Notation:
    v        integer of a value v u, with unit u
    s        step size; beta factor of a sample (ASQ), held as an integer of f fraction bits
    T_i      thresholds (N2UQ): x beta_1 > T_i exactly where v > floor(T_i / (beta_1 u))

Every stage takes int64 values and computes in int64, or takes integers in float64 and returns the
same codes in the narrowest type that holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adq_search.errors import IntegerError, did_you_mean
from adq_search.integer._factor import FactorOf, divide_by_factor, factor_of
from adq_search.integer._fixed import Carrier, make_rescale
from adq_search.integer._int8 import code_dtype
from adq_search.integer.steps import Requantize, Step
from adq_search.quantizers import AsqInput, InputQuantizer, LsqInput, N2uqInput
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._nearest import count_below
from adq_search.quantizers._thresholds import MIN_WIDTH

#: Inputs and factors may be this many times as large as in the example before they are cut off.
MARGIN = 8.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What an example shows of a layer's input.

    Args:
        shape: Batch first.
        largest_factor: Of its samples (ASQ).
    """

    shape: tuple[int, ...]
    largest_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class InputStage:
    """The input quantizer of one layer, in integers.

    Args:
        codes: From values (and factors) to codes.
        step: Value of code 1, without the factor.
        lowest: Smallest code.
        highest: Largest code.
        factor: Computes each sample's factor from the values; None where there is none.
        can_fuse: Whether codes are the values over `step`, rounded and clipped: then the layer
            before can produce them at once.
    """

    codes: Step
    step: float
    lowest: int
    highest: int
    factor: FactorOf | None = None
    can_fuse: bool = False

    @property
    def max_code(self) -> int:
        """Largest magnitude of a code."""
        return max(abs(self.lowest), abs(self.highest))

    @property
    def code_dtype(self) -> torch.dtype:
        """Narrowest type of tensor that holds the codes."""
        return code_dtype(self.lowest, self.highest)


StageOf = Callable[[InputQuantizer, Carrier, Seen], InputStage]
_STAGES: dict[str, StageOf] = {}


def register_input_stage(quantizer: str) -> Callable[[StageOf], StageOf]:
    """Register an input quantizer: `f(quantizer, carrier, seen) -> InputStage`.

    Raises:
        IntegerError: The quantizer has a stage already.
    """

    def register(function: StageOf) -> StageOf:
        if quantizer in _STAGES:
            msg = f"Input quantizer '{quantizer}' has its integer stage already. Rename yours."
            raise IntegerError(msg)
        _STAGES[quantizer] = function
        return function

    return register


@torch.no_grad()
def input_stage(quantizer: InputQuantizer, carrier: Carrier, seen: Seen) -> InputStage:
    """Return an input quantizer in integers.

    Args:
        quantizer: Fitted.
        carrier: What its input's integers mean.
        seen: What the example shows of the input.

    Raises:
        IntegerError: The quantizer has no integer form.
    """
    if quantizer.name not in _STAGES:
        msg = (
            f"Each input quantizer needs an integer stage, but '{quantizer.name}' has none. "
            f"Register it with `register_input_stage`. {did_you_mean(quantizer.name, _STAGES)}"
        )
        raise IntegerError(msg)
    return _STAGES[quantizer.name](quantizer, carrier, seen)


@dataclass(frozen=True, slots=True)
class _ByThresholds:
    thresholds: Tensor
    lowest: int
    highest: int

    def __call__(self, *values: Tensor) -> Tensor:
        if values[0].dtype == torch.int64:
            return (values[0].unsqueeze(-1) > self.thresholds).sum(-1) + self.lowest
        counts = count_below(values[0], self.thresholds.double())
        return counts.add_(self.lowest).to(code_dtype(self.lowest, self.highest))


@dataclass(frozen=True, slots=True)
class _ByFactor:
    ratio: float
    fraction_bits: int
    lowest: int
    highest: int

    def __call__(self, *values: Tensor) -> Tensor:
        whole, factors = values[0].long(), values[1]
        codes = divide_by_factor(whole, factors, self.ratio, self.fraction_bits)
        codes = codes.clamp_(self.lowest, self.highest)
        is_integer = values[0].dtype == torch.int64
        return codes if is_integer else codes.to(code_dtype(self.lowest, self.highest))


@register_input_stage("lsq")
def _uniform(quantizer: InputQuantizer, carrier: Carrier, seen: Seen) -> InputStage:
    del seen
    assert isinstance(quantizer, LsqInput)
    step = _positive(quantizer.step)
    lowest, highest = int(quantizer.qmin), int(quantizer.qmax)
    rescale = make_rescale(
        [torch.tensor(carrier.unit / step, dtype=torch.float64)],
        torch.zeros((), dtype=torch.float64),
        [torch.tensor(float(carrier.bound), dtype=torch.float64)],
        lowest=lowest,
        highest=highest,
    )
    codes = Requantize(rescale, makes_codes=True)
    return InputStage(codes, step, lowest, highest, can_fuse=True)


@register_input_stage("n2uq")
def _thresholds(quantizer: InputQuantizer, carrier: Carrier, seen: Seen) -> InputStage:
    del seen
    assert isinstance(quantizer, N2uqInput)
    widths = quantizer.widths.clamp(min=MIN_WIDTH)
    ends = torch.cat([widths.new_zeros(1), widths.cumsum(0)[:-1]])
    thresholds = (quantizer.start + ends + widths / 2).double()
    scaled = thresholds / (_positive(quantizer.in_scale) * carrier.unit)
    whole = scaled.floor().clamp(-(2.0**52), 2.0**52).long()
    lowest, highest = int(quantizer.qmin), int(quantizer.qmax)
    step = _positive(quantizer.out_scale) * 2 / widths.numel()
    return InputStage(_ByThresholds(whole, lowest, highest), step, lowest, highest)


@register_input_stage("asq")
def _per_sample(quantizer: InputQuantizer, carrier: Carrier, seen: Seen) -> InputStage:
    assert isinstance(quantizer, AsqInput)
    step = _positive(quantizer.step)
    lowest, highest = int(quantizer.qmin), int(quantizer.qmax)
    n_positions = math.prod(seen.shape[1:]) // quantizer.n_channels
    factor = factor_of(quantizer, carrier, n_positions, MARGIN * seen.largest_factor)
    codes = _ByFactor(carrier.unit / step, factor.fraction_bits, lowest, highest)
    return InputStage(codes, step, lowest, highest, factor=factor)


@torch.no_grad()
def seen_of(quantizer: InputQuantizer, values: Tensor) -> Seen:
    """Return what float inputs show."""
    largest = 1.0
    if isinstance(quantizer, AsqInput):
        largest = float(quantizer.factors(values).max())
    return Seen(tuple(values.shape), largest)


@torch.no_grad()
def code_step(quantizer: InputQuantizer) -> float:
    """Return the value of code 1 of a fitted input quantizer, without a sample's factor."""
    return input_stage(quantizer, Carrier(unit=1.0, bound=1), Seen((1, quantizer.n_channels))).step


def _positive(raw: Tensor) -> float:
    """The step in use, as the fake-quantized layer has it."""
    return float(raw.detach().abs().clamp(min=EPS))
