r"""ASQ's factor in fixed point: an integer a sample, and the division by it.

Notation:
    mean         of a channel's integers over the positions of a sample
    W_1, W_2     adapter weights as integers of at most 24 bits, with a power-of-two unit
    beta         factor, held as an integer of f fraction bits, at least 1

References:
    [Zhou2025] arXiv 2504.17263, Eq. 4; the adapter as in its public code (see `quantizers.asq`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adq_search.integer._fixed import SUM_BITS, Carrier, Rescale, make_rescale, power_unit
from adq_search.quantizers import AsqInput

#: Most bits of the adapter's weights, sign included, and bits of the values it works on.
WEIGHT_BITS = 24
VALUE_BITS = 27
#: Bits of a factor.
FACTOR_BITS = 31


@dataclass(frozen=True, slots=True)
class FactorOf:
    """Computes the factor of every sample.

    Args:
        means: From sums over positions to means.
        layers: The adapter: integer weights, # shape: (out, in), and the rescaling after them.
        channel_dim: Counted from the end.
        fraction_bits: f of the result.
        limit: Largest factor.
    """

    means: Rescale
    layers: tuple[tuple[Tensor, Rescale], ...]
    channel_dim: int
    fraction_bits: int
    limit: float

    def __call__(self, *sources: Tensor) -> Tensor:
        """Return the factors, int64, # shape: (N, 1, ..., 1).

        Args:
            *sources: The values before the layer, int64, or integers in float64.
        """
        values = sources[0]
        channel_dim = values.ndim + self.channel_dim
        pooled = [dim for dim in range(1, values.ndim) if dim != channel_dim]
        sums = values.sum(dim=pooled) if pooled else values
        out = self.means.slow(sums.long())
        for weight, rescale in self.layers:
            out = rescale.slow(out @ weight.T)
        return out.view(-1, *(1 for _ in values.shape[1:]))


def factor_of(quantizer: AsqInput, carrier: Carrier, n_positions: int, largest: float) -> FactorOf:
    """Return the integer form of an adapter.

    Args:
        quantizer: Fitted.
        carrier: What the integers at the quantizer's input mean; a power-of-two unit.
        n_positions: Values of one channel in one sample.
        largest: Where factors are cut off.
    """
    unit = power_unit(carrier.limit, VALUE_BITS)
    means = make_rescale(
        [_scalar(carrier.unit / unit / n_positions)],
        _scalar(0.0),
        [_scalar(float(carrier.bound) * n_positions)],
        lowest=-(2**VALUE_BITS),
        highest=2**VALUE_BITS,
    )
    adapter = quantizer.adapter
    dense = [adapter.output] if adapter.hidden is None else [adapter.hidden, adapter.output]
    layers = []
    limit = carrier.limit
    fraction_bits = 0
    for layer in dense:
        bias = layer.bias.detach().double()
        reach = float((layer.weight.detach().double().abs().sum(1) * limit + bias.abs()).max())
        words, word_unit = _words(layer, unit, reach)
        bound = words.abs().sum(1).double() * math.ceil(limit / unit + 1)
        is_last = layer is dense[-1]
        limit = min(reach, largest) if is_last else reach
        target = power_unit(limit, FACTOR_BITS if is_last else VALUE_BITS)
        rescale = make_rescale(
            [_scalar(unit * word_unit / target)],
            bias / target,
            [bound],
            lowest=1 if is_last else 0,
            highest=math.ceil(limit / target),
        )
        layers.append((words, rescale))
        unit = target
        fraction_bits = -round(math.log2(target))
    return FactorOf(means, tuple(layers), quantizer.channel_dim, fraction_bits, limit)


def divide_by_factor(values: Tensor, factors: Tensor, ratio: float, fraction_bits: int) -> Tensor:
    """Return round(values * ratio / beta), by one integer division a sample.

    The reciprocal keeps 31 significant bits; what follows is a multiplier and a shift.

    Args:
        values: int64, below 2^31.
        factors: Integers of beta, # shape: (N, 1, ..., 1)
        ratio: Unit of the values over the step size.
        fraction_bits: f of the factors.
    """
    mantissa, exponent = math.frexp(ratio)
    dividend = round(mantissa * 2.0**SUM_BITS)
    reciprocals = dividend // factors
    n_bits = torch.frexp(reciprocals.double()).exponent.long()
    drop = (n_bits - 30).clamp(min=0)
    multipliers = reciprocals >> drop
    # values * ratio / beta = values * multipliers * 2^(exponent - 62 + drop + f)
    shifts = SUM_BITS - exponent - drop - fraction_bits
    return shift_right(values * multipliers, shifts)


def shift_right(values: Tensor, shifts: Tensor) -> Tensor:
    """Return round(values / 2^shifts), ties up; a negative shift multiplies, up to 2^62."""
    right = shifts.clamp(1, SUM_BITS)
    rounded = (values + (torch.ones_like(right) << (right - 1))) >> right
    return torch.where(shifts > 0, rounded, values << (-shifts).clamp(0, SUM_BITS))


def _words(layer: nn.Linear, unit: float, reach: float) -> tuple[Tensor, float]:
    """Return integer weights and their unit: `WEIGHT_BITS`, fewer where int64 could not sum them.

    Args:
        layer: Of the adapter.
        unit: Of its inputs.
        reach: Largest magnitude of its outputs.
    """
    weight = layer.weight.detach().double()
    finest = power_unit(float(weight.abs().max()), WEIGHT_BITS - 1)
    word_unit = max(finest, power_unit(reach, SUM_BITS - 2) / unit)
    return (weight / word_unit).round().long(), word_unit


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
