r"""Weights as integers: one registry entry a weight quantizer.

Notation:
    w_o      a weight of output o
    u_o      unit of output o, a real number
    w_jo     integer word of bank j; c_j its constant
    w = u_o sum_j c_j w_jo; one bank, c = 1, for all but POST with the exact square
                         root and its kin with other roots

References:
    Even and odd exponents in two banks are known from logarithmic accelerators (NVIDIA
    US 11,886,980; LNS-Madam, arXiv 2106.13914); here they are applied to POST.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from adq_search.errors import IntegerError, did_you_mean
from adq_search.quantizers import AdqWeight, LsqWeight, RootWeight, WeightQuantizer
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._clipped import ClippedPowerWeight

#: Bits of an ADQ level word, sign included.
LEVEL_BITS = 8
#: Largest shift of a power-of-two word: 2^52 times an input code still fits the exact sums.
MAX_SHIFT = 52


@dataclass(frozen=True, slots=True)
class WeightWords:
    """A layer's weights as integers.

    Args:
        banks: Integer words of each bank, int64, # shape of each: (out, in / groups, *kernel)
        constants: Real constant of each bank.
        unit: What one is worth, by output, float64, # shape: (out,)
    """

    banks: tuple[Tensor, ...]
    constants: tuple[float, ...]
    unit: Tensor

    def values(self) -> Tensor:
        """Return the weights in float64, # shape: (out, in / groups, *kernel)."""
        total = sum(
            (c * bank.double() for c, bank in zip(self.constants, self.banks, strict=True)),
            start=torch.zeros(()),
        )
        return total * self.unit.view(-1, *(1 for _ in self.banks[0].shape[1:]))


WordsOf = Callable[[WeightQuantizer, Tensor], WeightWords]
_WORDS: dict[str, WordsOf] = {}


def register_words(quantizer: str) -> Callable[[WordsOf], WordsOf]:
    """Register the integer form of a weight quantizer: `f(quantizer, weight) -> WeightWords`.

    Raises:
        IntegerError: The quantizer has one already.
    """

    def register(function: WordsOf) -> WordsOf:
        if quantizer in _WORDS:
            msg = f"Weight quantizer '{quantizer}' has its integer words already. Rename yours."
            raise IntegerError(msg)
        _WORDS[quantizer] = function
        return function

    return register


@torch.no_grad()
def weight_words(quantizer: WeightQuantizer, weight: Tensor) -> WeightWords:
    """Return a layer's quantized weights as integers.

    Args:
        quantizer: Fitted.
        weight: The float weights, # shape: (out, in / groups, *kernel)

    Raises:
        IntegerError: The quantizer has no integer form, or its levels span too many bits.
    """
    if quantizer.name not in _WORDS:
        msg = (
            f"Each weight quantizer needs integer words, but '{quantizer.name}' has none. "
            f"Register them with `register_words`. {did_you_mean(quantizer.name, _WORDS)}"
        )
        raise IntegerError(msg)
    return _WORDS[quantizer.name](quantizer, weight)


@register_words("lsq")
def _uniform(quantizer: WeightQuantizer, weight: Tensor) -> WeightWords:
    assert isinstance(quantizer, LsqWeight)
    step = positive(quantizer.step)
    return WeightWords((quantizer.codes(weight),), (1.0,), per_output(step, weight))


@register_words("pot")
@register_words("post")
@register_words("root")
def _powers(quantizer: WeightQuantizer, weight: Tensor) -> WeightWords:
    assert isinstance(quantizer, ClippedPowerWeight)
    codes = power_codes(quantizer, weight)
    whole, bank = codes.exponents // codes.root, codes.exponents % codes.root
    shift = int(whole[codes.signs != 0].max()) if bool(codes.signs.any()) else 0
    if shift > MAX_SHIFT:
        msg = (
            f"Quantizer '{quantizer.name}' at {quantizer.bits} bits has weights 2^{shift} times "
            f"smaller than the largest; exact words reach 2^{MAX_SHIFT}. Give fewer weight bits."
        )
        raise IntegerError(msg)
    # Zero weights may have any exponent.
    words = codes.signs * 2 ** (shift - whole).clamp(min=0)
    unit = per_output(positive(quantizer.threshold), weight) * 2.0**-shift
    snapped = quantizer.options.get("sqrt_half", "exact")
    if snapped != "exact":
        ratio = Fraction(str(snapped))
        words = words * torch.where(bank == 1, ratio.numerator, ratio.denominator)
        return WeightWords((words,), (1.0,), unit / ratio.denominator)
    used = [j for j in range(codes.root) if bool(words[bank == j].any())] or [0]
    banks = tuple(words.masked_fill(bank != j, 0) for j in used)
    return WeightWords(banks, tuple(2.0 ** (-j / codes.root) for j in used), unit)


@register_words("adq")
def _codebook(quantizer: WeightQuantizer, weight: Tensor) -> WeightWords:
    assert isinstance(quantizer, AdqWeight)
    table, unit = level_words(quantizer)
    return WeightWords((table[quantizer.codes(weight)],), (1.0,), per_output(unit, weight))


def level_words(quantizer: AdqWeight, level_bits: int = LEVEL_BITS) -> tuple[Tensor, Tensor]:
    """Return a codebook as integer level words, and the float64 value of one.

    Args:
        quantizer: Fitted.
        level_bits: Bits of a level word, sign included.

    Returns:
        Words, int64, # shape: (levels,); unit, # shape: ()
    """
    levels = quantizer.codebook.double()
    largest = levels.abs().max()
    unit = torch.where(largest > 0, largest, 1.0) / (2 ** (level_bits - 1) - 1)
    return (levels / unit).round().long(), unit


@dataclass(frozen=True, slots=True)
class PowerCodes:
    """Weights as signs and exponents: level = sign 2^(-exponent / root).

    Args:
        signs: -1, 0 or 1, int64, # shape: that of the weights
        exponents: Not negative, int64, same shape.
        root: 1 for POT, 2 for POST.
    """

    signs: Tensor
    exponents: Tensor
    root: int


def power_codes(quantizer: ClippedPowerWeight, weight: Tensor) -> PowerCodes:
    """Return the signs and exponents of a layer's weights.

    Args:
        quantizer: POT, POST or a root, fitted.
        weight: # shape: (out, in / groups, *kernel)
    """
    codes = quantizer.codes(weight)
    is_root = isinstance(quantizer, RootWeight)
    root = int(quantizer.options["root"]) if is_root else round(1 / quantizer.log2_base)
    return PowerCodes(quantizer.signs.long()[codes], quantizer.exponents.long()[codes], root)


@torch.no_grad()
def snap_codebooks_(network: nn.Module, level_bits: int = LEVEL_BITS) -> dict[str, float]:
    """Round every ADQ codebook to integer level words, in place.

    Afterwards the fake-quantized network multiplies by the levels that the integer network's
    table holds. A trial does it after training and before it measures; a codebook that was snapped
    is not changed by a bit.

    Args:
        network: Quantized; layers of other schemes are left alone.
        level_bits: Bits of a level word, sign included.

    Returns:
        By layer, the largest move of a level, in shares of the largest level. Levels nearer to
        each other than a word become one.
    """
    moves = {}
    for name, module in network.named_modules():
        if not isinstance(module, AdqWeight):
            continue
        words, unit = level_words(module, level_bits)
        snapped = words.double() * unit
        largest = unit * (2 ** (level_bits - 1) - 1)
        moved = (snapped - module.codebook.double()).abs().max() / largest
        moves[name.removesuffix(".weight_quantizer")] = float(moved)
        module.codebook.copy_(snapped)
    return moves


def sqrt_half_of(quantizer: ClippedPowerWeight) -> float:
    """What the quantizer's levels take for the square root of one half."""
    snapped = quantizer.options.get("sqrt_half", "exact")
    return math.sqrt(0.5) if snapped == "exact" else float(Fraction(str(snapped)))


def positive(raw: Tensor) -> Tensor:
    """The step in use, as the fake-quantized layer has it, in float64."""
    return raw.detach().abs().clamp(min=EPS).double()


def per_output(step: Tensor, weight: Tensor) -> Tensor:
    """One step an output, # shape: (out,)."""
    return step.reshape(-1).expand(weight.shape[0]).clone()
