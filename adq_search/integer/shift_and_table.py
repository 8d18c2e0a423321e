r"""The paper's own multiplication for POST: shifts and a table, and what they lose.

Notation ([Zhou2025]_ Eq. 18, W an exponent, A an input code):
    sqrt2^-W A = A            W = 0
                 A >> W / 2   W even
                 LUT(W, A)    W odd: round(A sqrt2^-W)
    f   fraction bits: A is shifted left by f first; 0 in the paper

Integer shifts drop bits, so the sums are not those of the trained network; `sqnr_db` says how far
they are away. `words.weight_words` has the exact sums.

.. [Zhou2025] arXiv 2504.17263, section 3.3.1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adq_search.errors import IntegerError
from adq_search.integer._exact import ExactSum, Geometry
from adq_search.integer.words import per_output, positive, power_codes, sqrt_half_of
from adq_search.layers import QuantLayer
from adq_search.quantizers._clipped import ClippedPowerWeight


def product_table(
    exponents: int,
    root: int,
    *,
    lowest: int,
    highest: int,
    fraction_bits: int = 0,
    sqrt_half: float = math.sqrt(0.5),
) -> Tensor:
    """Return the products of every input code with every exponent.

    Args:
        exponents: How many exponents there are, counted from 0.
        root: 1 for POT (shifts only), 2 for POST.
        lowest: Lowest input code.
        highest: Highest input code.
        fraction_bits: f.
        sqrt_half: What POST's levels take for the square root of one half.

    Returns:
        Integers of f fraction bits, int64, # shape: (codes, exponents)
    """
    inputs = torch.arange(lowest, highest + 1).unsqueeze(1) << fraction_bits
    powers = torch.arange(exponents)
    whole, rest = powers // root, powers % root
    by_shift = inputs >> whole.clamp(max=62)
    fall = torch.exp2(-whole.double()) * (
        sqrt_half**rest if root == 2 else torch.exp2(-rest.double() / root)
    )
    by_table = (inputs.double() * fall).round().long()
    return torch.where(rest == 0, by_shift, by_table)


@dataclass(frozen=True, slots=True)
class TableSums:
    """The sums of a layer by shifts and a table; interchangeable with `ExactSum`.

    Args:
        parts: For each exponent in use, the sum over its signs, and its column of products.
        lowest: Input code of the first product.
        unit: What one is worth, by output, in input steps: 2^-f times the clipping threshold,
            float64, # shape: (out,)
    """

    parts: tuple[tuple[ExactSum, Tensor], ...]
    lowest: int
    unit: Tensor

    @property
    def bounds(self) -> Tensor:
        """Largest magnitude of each output's sum, int64, # shape: (out,)."""
        return torch.stack([sums.bounds for sums, _ in self.parts]).sum(0)

    def fast(self, codes: Tensor) -> Tensor:
        """Return the sums in float64, from codes in float32."""
        places = codes.long() - self.lowest
        parts = (sums.fast(column.float()[places]).double() for sums, column in self.parts)
        return functools.reduce(torch.Tensor.add_, parts)

    def slow(self, codes: Tensor) -> Tensor:
        """Return the sums in int64, from codes in int64."""
        places = codes - self.lowest
        return torch.stack([sums.slow(column[places]) for sums, column in self.parts]).sum(0)


def table_sums(layer: QuantLayer, name: str, *, fraction_bits: int = 0) -> TableSums:
    """Return the sums of a POT or POST layer as Eq. 18 has them.

    Args:
        layer: Quantized, with power-of-root weights.
        name: Of the layer, for errors.
        fraction_bits: f.

    Raises:
        IntegerError: The layer's weights are not powers of a root of two.
    """
    quantizer, inputs = layer.weight_quantizer, layer.input_quantizer
    if not isinstance(quantizer, ClippedPowerWeight):
        msg = (
            f"Layer '{name}': shifts and a table serve powers of two and their roots, but its "
            f"weights are '{quantizer.name}'. Sum it exactly."
        )
        raise IntegerError(msg)
    powers = power_codes(quantizer, layer.get_parameter("weight"))
    table = product_table(
        int(powers.exponents.max()) + 1,
        powers.root,
        lowest=inputs.lowest_code,
        highest=inputs.lowest_code + 2**inputs.bits - 1,
        fraction_bits=fraction_bits,
        sqrt_half=sqrt_half_of(quantizer),
    )
    geometry = Geometry.of(layer)
    used = powers.exponents[powers.signs != 0].unique().tolist() or [0]
    parts = []
    for exponent in used:
        signs = powers.signs * (powers.exponents == exponent)
        column = table[:, exponent].contiguous()
        parts.append((ExactSum(signs, geometry, int(column.abs().max()), name), column))
    threshold = per_output(positive(quantizer.threshold), layer.get_parameter("weight"))
    return TableSums(tuple(parts), inputs.lowest_code, threshold * 2.0**-fraction_bits)


@torch.no_grad()
def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    """Return the signal-to-noise ratio of `found`, decibels; infinite where nothing differs."""
    noise = float((wanted.double() - found.double()).square().sum())
    signal = float(wanted.double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
