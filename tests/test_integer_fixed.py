"""Fixed-point rescaling against Python's integers and fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_search.errors import IntegerError
from adq_search.integer._factor import divide_by_factor, factor_of, shift_right
from adq_search.integer._fixed import carrier_for, carrier_of_sum, make_rescale
from adq_search.quantizers import AsqInput


def scalar(value):
    return torch.tensor(float(value), dtype=torch.float64)


@given(
    values=st.lists(
        st.lists(st.integers(-(2**30), 2**30), min_size=3, max_size=3), min_size=1, max_size=2
    ),
    log_ratio=st.floats(-30, 4),
    offset=st.floats(-1000, 1000),
    size=st.integers(4, 30),
)
@settings(deadline=None, max_examples=200)
def test_both_arithmetics_are_the_formula_in_python_integers(values, log_ratio, offset, size):
    columns = [[v >> (30 - size) for v in column] for column in values]
    ratios = [2.0**log_ratio * (j + 1) / 1.7 for j in range(len(columns))]
    rescale = make_rescale(
        [scalar(r) for r in ratios],
        scalar(offset),
        [scalar(2**size)] * len(ratios),
        lowest=-(2**40),
        highest=2**40,
    )
    shift, offset_word = int(rescale.shifts), int(rescale.offsets)
    multipliers = [int(m) for m in rescale.multipliers]
    tensors = [torch.tensor(column) for column in columns]
    wanted = [
        (sum(v * m for v, m in zip(row, multipliers)) + offset_word) // 2**shift
        for row in zip(*columns)
    ]
    assert rescale.slow(*tensors).tolist() == wanted
    assert rescale.fast(*(t.double() for t in tensors)).tolist() == wanted
    assert all(abs(m) < 2**31 for m in multipliers)
    # The result is the real one, rounded; the multipliers carry at least 24 bits.
    for row, found in zip(zip(*columns), wanted):
        real = sum(Fraction(v) * Fraction(r) for v, r in zip(row, ratios)) + Fraction(offset)
        slack = sum(abs(v) for v in row) * max(ratios) * 2.0**-23 + 2.0**-20
        assert abs(found - real) <= Fraction(0.5 + slack)


def test_channels_have_multipliers_of_their_own_and_a_dead_one_is_its_offset():
    rescale = make_rescale(
        [torch.tensor([1e30, 1e-9, 3.0], dtype=torch.float64)],
        torch.tensor([2.4, 0.0, -1.0], dtype=torch.float64),
        [torch.tensor([0.0, 2.0**30, 100.0], dtype=torch.float64)],
        lowest=-1000,
        highest=1000,
    )
    values = torch.tensor([[0, 2**30, 100], [0, -(2**30), -100]])
    assert rescale.slow(values).tolist() == [[2, 1, 299], [2, -1, -301]]
    assert rescale.fast(values.double()).tolist() == [[2, 1, 299], [2, -1, -301]]


def test_ties_round_up_and_results_are_clipped():
    rescale = make_rescale([scalar(0.5)], scalar(0), [scalar(9)], lowest=-2, highest=3)
    values = torch.tensor([-9, -3, -1, 1, 3, 9])
    assert rescale.slow(values).tolist() == [-2, -1, 0, 1, 2, 3]


def test_a_batch_norm_that_has_no_variance_is_refused():
    for ratio in (math.inf, 2.0**31):
        with pytest.raises(IntegerError, match="almost no variance"):
            make_rescale([scalar(ratio)], scalar(0), [scalar(1)], lowest=0, highest=1)
    with pytest.raises(IntegerError, match="almost no variance"):
        make_rescale([scalar(2.0**40)], scalar(0), [scalar(1)], lowest=0, highest=1)


@given(st.floats(1e-12, 1e12))
def test_a_carrier_holds_its_limit_in_31_bits_and_wastes_none(limit):
    carrier = carrier_for(limit)
    assert carrier.limit >= limit
    assert 2**29 <= carrier.bound <= 2**30 + 1
    assert math.log2(carrier.unit).is_integer()


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_a_sum_stays_within_32_bits_and_as_fine_as_its_sides(first, second):
    sides = carrier_for(first), carrier_for(second)
    total = carrier_of_sum(*sides)
    reach = sum(math.floor(side.bound * (side.unit / total.unit) + 0.5) for side in sides)
    assert reach <= total.bound < 2**31
    coarsest = max(side.unit for side in sides)
    assert total.unit in (coarsest, 2 * coarsest)


@given(
    value=st.integers(-(2**30), 2**30),
    factor=st.integers(2**10, 2**30),
    ratio=st.floats(1e-9, 1e-3),
)
@settings(deadline=None)
def test_division_by_a_factor_is_the_real_quotient(value, factor, ratio):
    found = divide_by_factor(torch.tensor([[value]]), torch.tensor([[factor]]), ratio, 30)
    real = Fraction(value) * Fraction(ratio) * 2**30 / factor
    assert abs(int(found) - real) <= Fraction(1, 2) + abs(real) * Fraction(1, 2**28)


@given(st.integers(-(2**40), 2**40), st.integers(-10, 50))
def test_shifts_round_to_nearest_ties_up(value, shift):
    found = int(shift_right(torch.tensor(value), torch.tensor(shift)))
    assert found == math.floor(
        Fraction(value) / Fraction(2) ** shift + (Fraction(1, 2) if shift > 0 else 0)
    )


@pytest.mark.parametrize(
    ("n_channels", "scale"), [(4, 1.0), (208, 1e-6), (4096, 0.01), (6144, 1.0)]
)
def test_factor_is_the_adapters_for_few_and_for_very_many_channels(n_channels, scale):
    torch.manual_seed(0)
    quantizer = AsqInput(2, n_channels=n_channels, channel_dim=-1)
    if n_channels >= 1000:  # Weights of one magnitude: the largest sum that their words can have.
        quantizer.adapter.hidden.weight.data.sign_().mul_(0.01)
    values = torch.randn(16, n_channels, dtype=torch.float64) * scale
    quantizer.initialize_(values.float())
    carrier = carrier_for(float(values.abs().max()))
    integers = (values / carrier.unit).round()
    factor = factor_of(quantizer, carrier, 1, largest=4.0)
    wanted = quantizer.double().factors(integers * carrier.unit)
    found = factor(integers).double() * 2.0**-factor.fraction_bits
    assert ((found - wanted).abs() <= 2.0**-18 * wanted).all()
