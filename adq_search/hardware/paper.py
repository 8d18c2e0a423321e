"""The counts of [Zhou2025]_, as printed: Eqs. 10 to 16, the table of Eq. 18, Table 1.

For comparison with the paper; the cost model itself counts otherwise (see `cost`): Eq. 10 has no
bias and Eq. 11 has one, and a quantized operation (Eqs. 15, 16) is linear in the bits.

.. [Zhou2025] Zhou et al.: Precision Neural Network Quantization via Learnable Adaptive Modules.
   arXiv 2504.17263.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_search.errors import CostError
from adq_search.hardware.input_stages import adapter_shapes
from adq_search.tracing import LayerInfo

#: Bits of the full-precision network that quantized operations refer to.
REFERENCE_BITS = 32
#: Bits of adapters and steps in Table 1.
ADAPTER_BITS = 8


def conv_parameters(c_in: int, c_out: int, k_w: int, k_h: int) -> int:
    """Return the parameters of a convolution, Eq. 10."""
    return c_in * c_out * k_w * k_h


def linear_parameters(n_in: int, n_out: int) -> int:
    """Return the parameters of a linear layer, Eq. 11."""
    return n_in * n_out + n_out


def conv_operations(c_in: int, c_out: int, h_out: int, w_out: int, k_w: int, k_h: int) -> int:
    """Return the operations (multiplications) of a convolution, Eq. 12."""
    return c_in * c_out * h_out * w_out * k_w * k_h


def linear_operations(n_in: int, n_out: int) -> int:
    """Return the operations of a linear layer, Eq. 13."""
    return n_in * n_out


def stored_bits(parameters: int, bits: int) -> int:
    """Return the storage of quantized parameters, Eq. 14."""
    return parameters * bits


def quantized_operations(operations: float, bits: int) -> float:
    """Return QOPS, Eqs. 15 and 16: a quarter of the operations at 8 bits, an eighth at 4."""
    return operations * bits / REFERENCE_BITS


def product_table(
    input_bits: int, weight_bits: int, *, fraction_bits: int = 0
) -> NDArray[np.int64]:
    """Return the table of Eq. 18: sqrt(2)^-W A for every input A and exponent W.

    For 3 bits it has the paper's size [8, 4]. Even exponents stand in it as the shifts that Eq. 18
    makes of them (bits fall off), odd ones rounded to the nearest integer.

    Args:
        input_bits: Bits of A, unsigned.
        weight_bits: Bits of the weight; exponents 0 to 2^(b-1) - 1, as Eq. 17 prints them.
        fraction_bits: Bits kept below the input's last one; 0 is the literal mode.

    Returns:
        Integers in units of 2^-fraction_bits, # shape: (2^input_bits, 2^(weight_bits - 1))

    Raises:
        CostError: Bits out of range.
    """
    if not (1 <= input_bits <= 8 and 2 <= weight_bits <= 8 and 0 <= fraction_bits <= 16):
        msg = (
            "A product table takes 1 to 8 input bits, 2 to 8 weight bits and 0 to 16 fraction "
            f"bits, but was asked for {input_bits}, {weight_bits} and {fraction_bits}."
        )
        raise CostError(msg)
    inputs = np.arange(2**input_bits, dtype=np.int64)[:, None] << fraction_bits
    exponents = np.arange(2 ** (weight_bits - 1), dtype=np.int64)
    shifted = inputs >> (exponents // 2)
    rounded = np.rint(inputs * np.exp2(-exponents / 2)).astype(np.int64)
    table: NDArray[np.int64] = np.where(exponents % 2 == 0, shifted, rounded)
    return table


def odd_column(input_bits: int, *, fraction_bits: int = 0) -> NDArray[np.int64]:
    """Return the one column that a table needs: A / sqrt 2; later odd exponents are its shifts.

    The shifts drop bits that `product_table` rounds, so the two differ where f is small.

    Returns:
        Integers in units of 2^-fraction_bits, # shape: (2^input_bits,)
    """
    column: NDArray[np.int64] = product_table(input_bits, 2, fraction_bits=fraction_bits)[:, 1]
    return column


@dataclass(frozen=True, slots=True)
class AsqOverhead:
    """What ASQ adds to a network, as shares of the quantized network (Table 1).

    Args:
        bits: Bits of the network.
        parameters: Share of the stored bits, in percent.
        compute: Share of the quantized operations, in percent.
    """

    bits: int
    parameters: float
    compute: float


def asq_overhead(layers: Sequence[LayerInfo], n_parameters: int, bits: int) -> AsqOverhead:
    """Return the overhead of ASQ at one number of bits, by the counts that reproduce Table 1.

    Parameters: adapters with biases and one weight step for each output channel, at 8 bits, over
    all parameters of the network (batch norm included) at b bits. Compute: multiplications and
    additions of the adapters' linear layers at 8 bits, over the operations (Eqs. 12, 13) of the
    layers that have an adapter, at b bits. Pooling is in neither, as in the paper.

    Args:
        layers: The layers whose inputs ASQ quantizes: in the paper all but the first and the last.
        n_parameters: Parameters of the whole network.
        bits: Bits of weights and inputs of those layers.
    """
    n_adapter = n_steps = n_macs = 0
    for layer in layers:
        shapes = adapter_shapes(layer.in_channels)
        n_adapter += sum(linear_parameters(n_in, n_out) for n_in, n_out in shapes)
        n_macs += sum(linear_operations(n_in, n_out) for n_in, n_out in shapes)
        n_steps += layer.out_channels
    stored = stored_bits(n_adapter + n_steps, ADAPTER_BITS) / stored_bits(n_parameters, bits)
    operations = sum(layer.macs for layer in layers)
    compute = quantized_operations(2 * n_macs, ADAPTER_BITS) / quantized_operations(
        operations, bits
    )
    return AsqOverhead(bits, 100.0 * stored, 100.0 * compute)
