"""What every quantizer is, and what weight and input quantizers add to it.

A quantizer is a module that maps a tensor onto few values and lets gradients through as its paper
says ("fake quantization": the values stay floating point). It is made by its number of bits,
fitted to data by `initialize_`, and then called. What differs between quantizers is answered by
five methods with a leading underscore; checks, calibration state and health are answered here.

Bit ranges and levels live in buffers, not in code paths, so that one graph serves every policy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adq_search.errors import QuantizerError, did_you_mean
from adq_search.policy import MAX_BITS, MIN_BITS, OptionValue
from adq_search.quantizers._registry import Registry
from adq_search.quantizers._rows import row_order, to_rows


@dataclass(frozen=True, slots=True)
class QuantizerHealth:
    """What may be wrong with one quantizer, on given values.

    Args:
        n_steps: Trained steps, clipping thresholds, interval widths and scales that must be > 0.
        wrong_sign_steps: How many of them are <= 0 (the forward pass uses their magnitude).
        saturated: Share of the values beyond the representable range, 0 to 1.
        n_levels: Levels the quantizer has.
        dead_levels: Levels that none of the values reaches.
    """

    n_steps: int
    wrong_sign_steps: int
    saturated: float
    n_levels: int
    dead_levels: int


@dataclass(frozen=True, slots=True)
class ErrorFloor:
    """Where more bits stop helping a weight quantizer.

    Args:
        useful_bits: Most bits worth spending: beyond them, uniform levels of the same bits have
            less error on Gaussian and on Laplace weights.
        snr_db: Signal-to-noise ratio of Gaussian weights that no number of bits passes.
    """

    useful_bits: int
    snr_db: float


class Quantizer(nn.Module, ABC):
    """One way of mapping values onto few levels.

    Args:
        bits: Bits of a code, 2 to 8.
        options: Options by name; absent ones take the first value of `option_values`.

    Attributes:
        bits: Bits of a code, for display; the computation reads buffers.
        is_initialized: Whether the quantizer was fitted to data or loaded; it refuses to run
            before.
    """

    name: ClassVar[str]
    #: Whether levels follow the weights by an exponential moving average (needs `ema_momentum`).
    has_codebook: ClassVar[bool] = False
    #: Whether quantizing twice changes nothing more.
    is_projection: ClassVar[bool] = True
    #: Share of the weights' learning rate that the quantizer's own parameters were published with.
    learning_rate_factor: ClassVar[float] = 1.0
    #: Values that each option may take, the default first.
    option_values: ClassVar[Mapping[str, tuple[OptionValue, ...]]] = {}

    calibrated_bits: Tensor

    def __init__(self, bits: int, options: Mapping[str, OptionValue]) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.options = self.resolve_options(options)
        self.is_initialized = False
        # 0 until fitted, then the bits: a state of other bits is recognised when it is loaded.
        self.register_buffer("calibrated_bits", torch.zeros((), dtype=torch.int64))

    @classmethod
    def resolve_options(cls, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """Return all options of this quantizer with their values.

        Raises:
            QuantizerError: An option is unknown, or its value is.
        """
        for option, value in options.items():
            if option not in cls.option_values:
                known = cls.option_values or {"none": ()}
                msg = f"Quantizer '{cls.name}' has no option '{option}'. "
                raise QuantizerError(msg + did_you_mean(option, known))
            # By type too: True is no 1.
            if (type(value), value) not in [(type(v), v) for v in cls.option_values[option]]:
                allowed = [str(v) for v in cls.option_values[option]]
                msg = f"Option '{option}' of quantizer '{cls.name}' cannot be {value!r}. "
                raise QuantizerError(msg + did_you_mean(str(value), allowed))
        defaults = {option: values[0] for option, values in cls.option_values.items()}
        return defaults | dict(options)

    @classmethod
    def n_levels(cls, bits: int, **options: OptionValue) -> int:
        """Return how many levels a code can name; 2^bits unless the quantizer says otherwise."""
        cls.resolve_options(options)
        return int(2 ** check_bits(bits))

    @classmethod
    def storage_bits(cls, bits: int, **options: OptionValue) -> int:
        """Return the bits that a stored code takes: ceil(log2(levels))."""
        return math.ceil(math.log2(cls.n_levels(bits, **options)))

    @torch.no_grad()
    def initialize_(self, values: Tensor) -> None:
        """Fit the quantizer to float values.

        Args:
            values: The weights, or a batch of inputs.

        Raises:
            QuantizerError: There are no values, or some are not finite.
        """
        n_bad = int((~torch.isfinite(values)).sum())
        if values.numel() == 0 or n_bad:
            found = f"{n_bad} of {values.numel()} are not" if n_bad else "there are none"
            msg = (
                f"Quantizer '{self.name}' is fitted to finite values, but {found}. "
                "Check the pretrained weights and the calibration batch."
            )
            raise QuantizerError(msg)
        self._fit(values.detach())
        self.calibrated_bits.fill_(self.bits)
        self.is_initialized = True

    def forward(self, values: Tensor) -> Tensor:
        """Return the quantized values; same shape, dtype and device.

        Raises:
            QuantizerError: The quantizer was never fitted.
        """
        self._require_initialized()
        return self._quantize(values)

    @property
    def is_watched(self) -> bool:
        """Whether hooks see its calls: none may be left out, or be for a part of the values."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    @torch.no_grad()
    def codes(self, values: Tensor) -> Tensor:
        """Return the int64 code of every value; `forward` is the level that the code names.

        Uniform quantizers and N2UQ count from their lowest integer, the others index `levels()`.
        """
        self._require_initialized()
        return self._codes(values)

    @property
    def lowest_code(self) -> int:
        """The code of the lowest level."""
        return 0

    @torch.no_grad()
    def levels(self) -> Tensor:
        """Return the levels in ascending order.

        Returns:
            Levels, # shape: (n_levels,) or (out, n_levels)
        """
        self._require_initialized()
        return self._levels()

    @torch.no_grad()
    def health(self, values: Tensor) -> QuantizerHealth:
        """Measure wrong signs, saturation and dead levels on `values`."""
        self._require_initialized()
        steps = torch.cat([step.detach().flatten() for step in self._positive_parameters()])
        n_levels = self.n_levels(self.bits, **self.options)
        codes = self._codes(values).to(torch.int32)
        rows = to_rows(codes, row_order(codes)).flatten()
        # NaN has no code.
        indices = rows.sub_(self.lowest_code).clamp_(0, n_levels - 1)
        n_used = int((torch.bincount(indices, minlength=n_levels) > 0).sum())
        return QuantizerHealth(
            n_steps=steps.numel(),
            wrong_sign_steps=int((steps <= 0).sum()),
            saturated=float(self._saturated(values).float().mean()),
            n_levels=n_levels,
            dead_levels=n_levels - n_used,
        )

    @abstractmethod
    def _fit(self, values: Tensor) -> None:
        """Set parameters and buffers from finite `values`, in place."""

    @abstractmethod
    def _quantize(self, values: Tensor) -> Tensor:
        """Return the quantized values, differentiably."""

    @abstractmethod
    def _codes(self, values: Tensor) -> Tensor:
        """Return the int64 codes."""

    @abstractmethod
    def _levels(self) -> Tensor:
        """Return the sorted levels."""

    @abstractmethod
    def _saturated(self, values: Tensor) -> Tensor:
        """Return which values lie beyond the representable range, as booleans."""

    @abstractmethod
    def _positive_parameters(self) -> list[Tensor]:
        """Return the raw trained tensors that must be positive."""

    def _require_initialized(self) -> None:
        if not self.is_initialized:
            msg = (
                f"Quantizer '{self.name}' was never fitted to data. Give `apply_policy_` a "
                "calibration batch, or load a state dict."
            )
            raise QuantizerError(msg)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        held = int(self.calibrated_bits)
        if held not in (0, self.bits):
            errors: list[str] = rest[-1]
            errors.append(f"{prefix[:-1]} has {self.bits} bits, but the state is of {held} bits.")
        self.is_initialized = held == self.bits

    def extra_repr(self) -> str:
        """Show the bits and the options."""
        shown = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"bits={self.bits}{shown}"


class WeightQuantizer(Quantizer):
    """A quantizer of one layer's weights.

    Args:
        bits: Bits of a weight code, 2 to 8.
        weight_shape: Shape of the weights, # shape: (out, in / groups, *kernel)
        ema_momentum: Share of the old codebook kept at each update, 0 <= m < 1, for a quantizer
            with a codebook; None otherwise.
        **options: Options by name, see `option_values`.

    Raises:
        QuantizerError: Bits, momentum or an option out of range.
    """

    def __init__(
        self,
        bits: int,
        weight_shape: tuple[int, ...],
        *,
        ema_momentum: float | None = None,
        **options: OptionValue,
    ) -> None:
        super().__init__(bits, options)
        if self.has_codebook and (ema_momentum is None or not 0.0 <= ema_momentum < 1.0):
            msg = f"Quantizer '{self.name}' needs an ema_momentum in [0, 1), not {ema_momentum}."
            raise QuantizerError(msg)
        if not self.has_codebook and ema_momentum is not None:
            msg = f"Quantizer '{self.name}' has no codebook: leave ema_momentum={ema_momentum} out."
            raise QuantizerError(msg)
        self.weight_shape = tuple(weight_shape)
        #: How many weights share one step or threshold.
        n_groups = math.prod(self._group_shape())
        self._n_group = max(1, math.prod(self.weight_shape) // max(1, n_groups))

    @classmethod
    def error_floor(cls, **options: OptionValue) -> ErrorFloor | None:
        """Return where more bits stop helping; None where each bit gains its 5 to 6 dB."""
        cls.resolve_options(options)
        return None

    def _group_shape(self) -> tuple[int, ...]:
        """Shape of a parameter with one entry a group: () or (out, 1, ..., 1)."""
        if self.options.get("granularity") == "tensor":
            return ()
        return (self.weight_shape[0], *(1 for _ in self.weight_shape[1:]))

    def _rows(self, weights: Tensor) -> Tensor:
        """One row a group, # shape: (groups, weights of a group)."""
        return weights.reshape(max(1, math.prod(self._group_shape())), -1)


class InputQuantizer(Quantizer):
    """A quantizer of one layer's inputs (activations).

    Whether the inputs are signed is found in `initialize_`: signed codes run from -2^(b-1) to
    2^(b-1) - 1, unsigned ones from 0 to 2^b - 1.

    Args:
        bits: Bits of an input code, 2 to 8.
        n_channels: Channels (features) of the input.
        channel_dim: Where they stand, counted from the end: -1 for linear layers, -3 for
            convolutions over two dimensions. A tensor with more dimensions than that has samples
            along its first one.
        **options: Options by name, see `option_values`.

    Raises:
        QuantizerError: Bits, the channel dimension or an option out of range.
    """

    #: Whether each value is quantized by itself, whatever the others are.
    is_elementwise: ClassVar[bool] = False

    qmin: Tensor
    qmax: Tensor

    def __init__(
        self, bits: int, *, n_channels: int, channel_dim: int, **options: OptionValue
    ) -> None:
        super().__init__(bits, options)
        if channel_dim >= 0:
            msg = f"channel_dim counts from the end, from -1 down, but is {channel_dim}."
            raise QuantizerError(msg)
        self.n_channels = n_channels
        self.channel_dim = channel_dim
        self.register_buffer("qmin", torch.zeros(()))
        self.register_buffer("qmax", torch.tensor(float(2**bits - 1)))

    def forward_part(self, part: Tensor, whole: Tensor) -> Tensor:
        """Return what `forward` makes of some of the values; gradients are those of all.

        Args:
            part: Those that the layer reads, any shape.
            whole: All of them.

        Raises:
            QuantizerError: The quantizer was never fitted, or is not elementwise.
        """
        self._require_initialized()
        if not self.is_elementwise:
            msg = f"Quantizer '{self.name}' has to see all values of a sample. Call it on them."
            raise QuantizerError(msg)
        return self._quantize_part(part, whole)

    def _quantize_part(self, part: Tensor, whole: Tensor) -> Tensor:
        return self._quantize(part)

    @property
    def is_signed(self) -> bool:
        """Whether the codes reach below zero."""
        return bool(self.qmin < 0)

    def _fit_range(self, values: Tensor) -> None:
        lowest = -(2 ** (self.bits - 1)) if bool((values < 0).any()) else 0
        self.qmin.fill_(lowest)
        self.qmax.fill_(lowest + 2**self.bits - 1)

    def _sample_shape(self, values: Tensor) -> tuple[int, ...]:
        """Shape that holds one number a sample: (N, 1, ..., 1); all ones without a batch."""
        has_batch = values.ndim > -self.channel_dim
        return (values.shape[0] if has_batch else 1, *(1 for _ in values.shape[1:]))

    @property
    def lowest_code(self) -> int:
        """The code of the lowest level."""
        return int(self.qmin)


WEIGHT_QUANTIZERS: Registry[WeightQuantizer] = Registry("weight quantizer")
INPUT_QUANTIZERS: Registry[InputQuantizer] = Registry("input quantizer")


def check_bits(bits: int) -> int:
    """Return `bits` where it is an integer of 2 to 8.

    Raises:
        QuantizerError: It is not.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        msg = f"A quantizer has {MIN_BITS} to {MAX_BITS} bits, but {bits!r} were asked for."
        raise QuantizerError(msg)
    return bits
