import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adq_search.quantizers import PostWeight, PotWeight, Quantizer
from adq_search.quantizers._calibration import quantile
from adq_search.testing import SlowPass, WeightQuantizerContract

KINDS = {"pot": (PotWeight, 2.0), "post": (PostWeight, math.sqrt(2))}


def printed_levels(bits: int, base: float, rule: str) -> list[float]:
    """The set of Eqs. 3 and 17, or the 2^b - 1 levels that b bits can name."""
    last = 2 ** (bits - 1) - (1 if rule == "eq17" else 2)
    magnitudes = [base**-k for k in range(last + 1)]
    return sorted([-m for m in magnitudes] + [0.0] + magnitudes)


def slow_power(
    levels: list[float],
    thresholds: list[float],
    n_channel: int,
    values: list[float],
    up: list[float],
) -> SlowPass:
    block = len(values) // len(thresholds)
    outputs, to_values, to_alpha = [], [], [0.0] * len(thresholds)
    for i, (v, r) in enumerate(zip(values, up, strict=True)):
        alpha = thresholds[i // block]
        z = v / alpha
        q = min(levels, key=lambda level: abs(min(max(z, -1.0), 1.0) - level))
        outputs.append(alpha * q)
        inside = abs(z) <= 1
        to_values.append(r if inside else 0.0)
        slope = q - z if inside else math.copysign(1.0, v)
        to_alpha[i // block] += r * slope / math.sqrt(n_channel)
    return outputs, {"values": to_values, "threshold": to_alpha}


class PowerContract(WeightQuantizerContract):
    def slow_pass(self, quantizer: Quantizer, values: list[float], upstream: list[float]):
        base = KINDS[quantizer.name][1]
        levels = printed_levels(quantizer.bits, base, self.options.get("levels", "b_bit"))
        n_channel = 90 if self.options.get("granularity") == "tensor" else 18
        thresholds = quantizer.threshold.flatten().tolist()
        return slow_power(levels, thresholds, n_channel, values, upstream)


class TestPot(PowerContract):
    quantizer_class = PotWeight


class TestPotEq17(PowerContract):
    quantizer_class = PotWeight
    options: ClassVar = {"levels": "eq17"}


class TestPost(PowerContract):
    quantizer_class = PostWeight


class TestPostEq17(PowerContract):
    quantizer_class = PostWeight
    options: ClassVar = {"levels": "eq17"}


class TestPostByTensor(PowerContract):
    quantizer_class = PostWeight
    options: ClassVar = {"granularity": "tensor"}


def with_threshold(
    kind: type[PotWeight] | type[PostWeight], bits: int, n: int, alpha: float = 1.0, **options: str
) -> PotWeight | PostWeight:
    quantizer = kind(bits, (1, n), **options)
    quantizer.initialize_(torch.full((1, n), alpha))
    return quantizer


def snr_db(values: Tensor, quantized: Tensor) -> float:
    return 10 * math.log10(values.square().sum() / (values - quantized).square().sum())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rule", ["b_bit", "eq17"])
def test_levels_are_the_printed_ones(bits, name, rule):
    kind, base = KINDS[name]
    levels = with_threshold(kind, bits, 4, levels=rule).double().levels()[0]
    assert levels.tolist() == pytest.approx(printed_levels(bits, base, rule), rel=1e-15)
    n_levels = 2**bits + (1 if rule == "eq17" else -1)
    assert len(levels) == kind.n_levels(bits, levels=rule) == n_levels
    assert kind.storage_bits(bits, levels=rule) == bits + (rule == "eq17")


def test_powers_of_two_are_exact():
    levels = with_threshold(PotWeight, 5, 4).levels()[0]
    assert all(math.frexp(level)[0] in (-0.5, 0.0, 0.5) for level in levels.tolist())


def test_two_bits_are_ternary_as_the_paper_says():
    assert with_threshold(PostWeight, 2, 3).levels()[0].tolist() == [-1, 0, 1]


def test_nearest_is_meant_in_the_linear_domain():
    # Between 0.5 and 0.7071 the middle is 0.6036; rounding exponents would switch at 0.5946.
    quantizer = with_threshold(PostWeight, 3, 3)
    out = quantizer(torch.tensor([[0.6, 0.603, 0.604]]))[0].tolist()
    assert out == pytest.approx([0.5, 0.5, math.sqrt(0.5)])


@pytest.mark.parametrize(
    ("kind", "bits", "rule", "expected_db"),
    [
        (PostWeight, 3, "b_bit", 11.6),
        (PostWeight, 3, "eq17", 14.0),
        (PostWeight, 4, "b_bit", 18.9),
        (PostWeight, 4, "eq17", 19.5),
        (PostWeight, 5, "b_bit", 20.1),
        (PotWeight, 3, "b_bit", 13.2),
        (PotWeight, 4, "b_bit", 14.2),
    ],
)
def test_gaussian_noise_with_the_best_clip_matches_the_measured_table(
    kind, bits, rule, expected_db
):
    weight = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    quantizer = with_threshold(kind, bits, weight.numel(), levels=rule)
    found = []
    for alpha in torch.arange(0.8, 4.5, 0.05):
        with torch.no_grad():
            quantizer.threshold.fill_(alpha)
            found.append(snr_db(weight, quantizer(weight)))
    assert max(found) == pytest.approx(expected_db, abs=0.1)


def test_threshold_starts_at_the_quantile_of_each_channel():
    weight = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    quantizer = PostWeight(4, (6, 500))
    quantizer.initialize_(weight)
    expected = torch.quantile(weight.abs(), 0.99, dim=1)
    torch.testing.assert_close(quantizer.threshold.flatten(), expected)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_quantile_agrees_with_torch(numbers, shares):
    values, shares = torch.tensor(numbers, dtype=torch.float64), torch.tensor(shares).double()
    torch.testing.assert_close(quantile(values[None], shares)[0], torch.quantile(values, shares))


def test_a_threshold_of_wrong_sign_acts_by_its_magnitude_and_is_counted():
    weight = torch.tensor([[0.3, -0.6, 1.5]])
    right, wrong = with_threshold(PostWeight, 3, 3), with_threshold(PostWeight, 3, 3)
    with torch.no_grad():
        wrong.threshold.neg_()
    for quantizer in (right, wrong):
        quantizer(weight).square().sum().backward()
    assert torch.equal(right(weight), wrong(weight))
    assert torch.equal(wrong.threshold.grad, -right.threshold.grad)
    assert wrong.health(weight).wrong_sign_steps == 1
    assert wrong.health(weight).saturated == pytest.approx(1 / 3)
