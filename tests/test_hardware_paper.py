"""The paper's own counts: Eqs. 10 to 16, Table 1, the table of Eq. 18."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision import models

from adq_search.errors import CostError
from adq_search.hardware.paper import (
    asq_overhead,
    conv_operations,
    conv_parameters,
    linear_operations,
    linear_parameters,
    odd_column,
    product_table,
    quantized_operations,
    stored_bits,
)
from adq_search.tracing import trace


def test_equations_10_to_16_against_torch():
    conv = torch.nn.Conv2d(5, 7, (3, 2), bias=False)
    linear = torch.nn.Linear(11, 13)

    assert conv_parameters(5, 7, 2, 3) == conv.weight.numel()
    assert linear_parameters(11, 13) == sum(p.numel() for p in linear.parameters())
    assert conv_operations(5, 7, 4, 6, 2, 3) == 4 * 6 * conv.weight.numel()
    assert linear_operations(11, 13) == linear.weight.numel()
    assert stored_bits(1000, 3) == 3000
    assert quantized_operations(1000, 8) == 250  # Eq. 15: OPS / 4
    assert quantized_operations(1000, 4) == 125  # Eq. 16: OPS / 8


@pytest.mark.parametrize(
    ("bits", "parameters", "compute"),
    [(8, "2.67", "0.04"), (4, "5.34", "0.07"), (3, "7.11", "0.10"), (2, "10.67", "0.14")],
)
def test_table_1_comes_out(bits, parameters, compute):
    network = models.resnet18()
    summary = trace(network, torch.zeros(1, 3, 224, 224))
    n_parameters = sum(p.numel() for p in network.parameters())

    ours = asq_overhead(summary.layers[1:-1], n_parameters, bits)

    assert f"{ours.parameters:.2f}" == parameters
    assert f"{ours.compute:.2f}" == compute


def test_the_table_of_three_bits_has_the_papers_size():
    table = product_table(3, 3)

    assert table.shape == (8, 4)
    assert table.tolist() == [
        [0, 0, 0, 0],
        [1, 1, 0, 0],
        [2, 1, 1, 1],
        [3, 2, 1, 1],
        [4, 3, 2, 1],
        [5, 4, 2, 2],
        [6, 4, 3, 2],
        [7, 5, 3, 2],
    ]


@pytest.mark.parametrize("fraction_bits", [0, 3, 8])
@pytest.mark.parametrize(("input_bits", "weight_bits"), [(2, 2), (3, 3), (4, 4), (8, 4)])
def test_products_by_exact_arithmetic(input_bits, weight_bits, fraction_bits):
    table = product_table(input_bits, weight_bits, fraction_bits=fraction_bits)

    for a in range(2**input_bits):
        for w in range(2 ** (weight_bits - 1)):
            scaled = a << fraction_bits
            if w % 2 == 0:
                assert table[a, w] == scaled // 2 ** (w // 2)
            else:
                # nearest integer n to scaled / sqrt(2^w): (2n - 1)^2 2^w <= (2 scaled)^2 <= ...
                n = int(table[a, w])
                assert max(2 * n - 1, 0) ** 2 * 2**w <= (2 * scaled) ** 2 <= (2 * n + 1) ** 2 * 2**w


def test_one_column_serves_every_odd_exponent():
    table, column = product_table(8, 4, fraction_bits=8), odd_column(8, fraction_bits=8)

    for w in range(1, 8, 2):
        assert np.abs(table[:, w] - (column >> (w - 1) // 2)).max() <= 1
    # with enough fraction bits the one column is A / sqrt 2 as nearly as it can be
    exact = np.arange(256) * math.sqrt(0.5) * 256
    assert np.abs(column - exact).max() <= 0.5


def test_a_table_out_of_range_is_refused():
    with pytest.raises(CostError, match="asked for 9, 4 and 0"):
        product_table(9, 4)
