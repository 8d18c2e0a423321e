import math
from typing import ClassVar

import pytest
import torch

from adq_search.quantizers import LsqInput, LsqWeight, Quantizer
from adq_search.testing import InputQuantizerContract, SlowPass, WeightQuantizerContract


def lsq_element(v: float, s: float, n: int, p: int) -> tuple[float, float, float]:
    """Output, d/dv and d/ds of one value: Esser et al. 2020, Eqs. 1-3 and 5."""
    z = v / s
    if z <= n:
        return n * s, 0.0, float(n)
    if z >= p:
        return p * s, 0.0, float(p)
    return round(z) * s, 1.0, round(z) - z


def slow_lsq(
    steps: list[float], codes: tuple[int, int], n_values: int, values: list[float], up: list[float]
) -> SlowPass:
    """Values in equal blocks, one step a block; N values in the gradient scale."""
    block = len(values) // len(steps)
    outputs, grad_values, grad_steps = [], [], [0.0] * len(steps)
    for i, (v, r) in enumerate(zip(values, up, strict=True)):
        out, dv, ds = lsq_element(v, steps[i // block], *codes)
        outputs.append(out)
        grad_values.append(r * dv)
        grad_steps[i // block] += r * ds / math.sqrt(n_values * codes[1])
    return outputs, {"values": grad_values, "step": grad_steps}


class TestLsqWeightByChannel(WeightQuantizerContract):
    quantizer_class = LsqWeight

    def slow_pass(self, quantizer: Quantizer, values: list[float], upstream: list[float]):
        codes = (-(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1) - 1)
        return slow_lsq(quantizer.step.flatten().tolist(), codes, 18, values, upstream)


class TestLsqWeightByTensor(WeightQuantizerContract):
    quantizer_class = LsqWeight
    options: ClassVar = {"granularity": "tensor"}

    def slow_pass(self, quantizer: Quantizer, values: list[float], upstream: list[float]):
        codes = (-(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1) - 1)
        return slow_lsq([quantizer.step.item()], codes, 90, values, upstream)


class TestLsqInputUnsigned(InputQuantizerContract):
    quantizer_class = LsqInput
    is_signed = False

    def slow_pass(self, quantizer: Quantizer, values: list[float], upstream: list[float]):
        codes = (0, 2**quantizer.bits - 1)
        return slow_lsq([quantizer.step.item()], codes, 54, values, upstream)


class TestLsqInputSigned(InputQuantizerContract):
    quantizer_class = LsqInput
    is_signed = True

    def slow_pass(self, quantizer: Quantizer, values: list[float], upstream: list[float]):
        codes = (-(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1) - 1)
        return slow_lsq([quantizer.step.item()], codes, 54, values, upstream)


def unit_weight(n_weights: int, *, bits: int = 3, step: float = 1.0) -> LsqWeight:
    quantizer = LsqWeight(bits, (n_weights, 1), granularity="tensor")
    quantizer.initialize_(torch.ones(n_weights, 1))
    with torch.no_grad():
        quantizer.step.fill_(step)
    return quantizer


def test_step_starts_at_two_mean_magnitudes_over_the_root_of_the_largest_code():
    weight = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    by_channel = LsqWeight(3, (2, 2))
    by_channel.initialize_(weight)
    assert by_channel.step.flatten().tolist() == pytest.approx([4 / 3**0.5, 1 / 3**0.5])
    by_tensor = LsqWeight(3, (2, 2), granularity="tensor")
    by_tensor.initialize_(weight)
    assert by_tensor.step.item() == pytest.approx(2 * 1.25 / 3**0.5)


def test_bounds_belong_to_the_outside_as_in_the_paper():
    weight = torch.tensor([[-4.0], [-3.9], [2.9], [3.0], [3.1]], requires_grad=True)
    quantizer = unit_weight(5)
    quantizer(weight).sum().backward()
    assert weight.grad.flatten().tolist() == [0, 1, 1, 0, 0]
    slopes = [-4, -0.1, 0.1, 3, 3]
    assert quantizer.step.grad.item() == pytest.approx(sum(slopes) / math.sqrt(5 * 3), rel=1e-5)


def test_halves_are_rounded_to_even():
    weight = torch.tensor([[0.5], [1.5], [2.5], [-0.5]])
    assert unit_weight(4)(weight).flatten().tolist() == [0, 2, 2, 0]


def test_a_step_of_wrong_sign_acts_by_its_magnitude_and_is_counted():
    weight = torch.tensor([[0.3], [1.2], [2.2]])
    right, wrong = unit_weight(3), unit_weight(3, step=-1.0)
    right(weight).square().sum().backward()
    wrong(weight).square().sum().backward()
    assert torch.equal(right(weight), wrong(weight))
    assert wrong.step.grad == -right.step.grad
    assert (right.health(weight).wrong_sign_steps, wrong.health(weight).wrong_sign_steps) == (0, 1)


def test_a_channel_of_zeros_takes_the_mean_step_of_the_others():
    quantizer = LsqWeight(4, (3, 2))
    quantizer.initialize_(torch.tensor([[1.0, 1.0], [0.0, 0.0], [3.0, 3.0]]))
    first, dead, last = quantizer.step.flatten().tolist()
    assert dead == pytest.approx((first + last) / 2)


def test_gradient_scale_of_inputs_counts_the_features_of_one_sample():
    values = torch.rand(3, 9, 2, 2)
    gradients = []
    for batch in (values, torch.cat([values, values])):
        quantizer = LsqInput(4, n_channels=9, channel_dim=-3)
        quantizer.initialize_(values)
        quantizer(batch).square().sum().backward()
        gradients.append(quantizer.step.grad.item())
    assert gradients[1] == pytest.approx(2 * gradients[0], rel=1e-5)


def test_saturation_is_the_share_beyond_the_outermost_codes():
    quantizer = unit_weight(4)
    weight = torch.tensor([[-4.0], [-4.5], [3.0], [5.0]])
    assert quantizer.health(weight).saturated == 0.5
    assert quantizer.health(weight).dead_levels == 6
