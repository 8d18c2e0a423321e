from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_search.quantizers import AdqWeight, Quantizer
from adq_search.testing import WeightQuantizerContract


class AdqContract(WeightQuantizerContract):
    quantizer_class = AdqWeight

    def slow_pass(self, quantizer: Quantizer, values: list[float], upstream: list[float]):
        """Nearest entry of the codebook; the gradient passes unchanged."""
        codebook = quantizer.codebook.tolist()
        outputs = [min(codebook, key=lambda level: abs(v - level)) for v in values]
        return outputs, {"values": list(upstream)}


class TestAdq(AdqContract):
    pass


class TestAdqPlainQuantiles(AdqContract):
    options: ClassVar = {"quantile_rule": "plain"}


def fitted(weight: torch.Tensor, bits: int, *, momentum: float = 0.9, **options: str) -> AdqWeight:
    quantizer = AdqWeight(bits, tuple(weight.shape), ema_momentum=momentum, **options)
    quantizer = quantizer.to(weight.dtype)
    quantizer.initialize_(weight)
    return quantizer


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, generator=generator, dtype=torch.float64)


def slow_update(codebook: list[float], weights: list[float], momentum: float) -> list[float]:
    """c_j <- m c_j + (1 - m) mean of its weights; zero and empty levels stay."""
    bins: dict[int, list[float]] = {}
    for w in weights:
        nearest = min(range(len(codebook)), key=lambda j: abs(w - codebook[j]))
        bins.setdefault(nearest, []).append(w)
    moved = list(codebook)
    for j, members in bins.items():
        if j != len(codebook) // 2:
            moved[j] = momentum * codebook[j] + (1 - momentum) * sum(members) / len(members)
    return moved


@pytest.mark.parametrize("bits", range(2, 9))
def test_codebook_is_balanced_around_a_zero(bits):
    quantizer = fitted(gaussian(5000), bits)
    k = 2 ** (bits - 1) - 1
    assert (quantizer.codebook[:k] < 0).all()
    assert quantizer.codebook[k] == 0
    assert (quantizer.codebook[k + 1 :] > 0).all()
    assert AdqWeight.n_levels(bits) == 2 * k + 1


def test_sides_take_their_own_quantiles():
    weight = torch.tensor([[-4.0, -2.0, -1.0, 1.0, 10.0, 100.0]])
    codebook = fitted(weight, 3, quantile_rule="plain").codebook
    # Three quantiles of three values at 1/4, 1/2, 3/4: half way, the median, half way.
    assert codebook.tolist() == [-3.0, -2.0, -1.5, 0.0, 5.5, 10.0, 55.0]


@pytest.mark.parametrize(
    ("rule", "errors"), [("half", [0.215, 0.069, 0.026]), ("plain", [0.318, 0.117, 0.046])]
)
def test_error_of_the_first_codebook_is_the_calculated_one(rule, errors):
    weight = gaussian(200_000)
    for bits, expected in zip((2, 3, 4), errors, strict=True):
        quantized = fitted(weight, bits, quantile_rule=rule).eval()(weight)
        relative = (weight - quantized).square().mean() / weight.square().mean()
        assert relative.item() == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_codebook_moves_by_the_average_after_each_forward(bits, momentum):
    weight = gaussian(400, seed=bits)
    quantizer = fitted(weight, bits, momentum=momentum).train()
    expected = quantizer.codebook.tolist()
    for _ in range(5):
        before = quantizer.codebook.clone()
        out = quantizer(weight)
        assert torch.isin(out, before).all()
        expected = slow_update(expected, weight.flatten().tolist(), quantizer.momentum.item())
        assert quantizer.codebook.tolist() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(2, 6), heavy=st.booleans())
def test_momentum_zero_is_lloyds_iteration_with_falling_error(seed, bits, heavy):
    weight = gaussian(300, seed=seed)
    if heavy:
        weight = weight**3
    quantizer = fitted(weight, bits, momentum=0.0).train()
    errors = [(weight - quantizer(weight)).square().sum().item() for _ in range(30)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert (quantizer.codebook.diff() >= 0).all()
    assert quantizer.codebook[2 ** (bits - 1) - 1] == 0


def test_lloyds_iteration_reaches_the_calculated_optimum():
    weight = gaussian(50_000)
    quantizer = fitted(weight, 3, momentum=0.0).train()
    for _ in range(200):
        quantizer(weight)
    relative = (weight - quantizer(weight)).square().mean() / weight.square().mean()
    assert relative.item() == pytest.approx(0.044, abs=0.001)


def test_levels_without_weights_stay():
    weight = torch.tensor([[-1.0, 1.0, 2.0, 3.0]])
    quantizer = fitted(weight, 3, momentum=0.5).train()
    quantizer.codebook.copy_(torch.tensor([-9.0, -8.0, -1.5, 0.0, 1.0, 2.0, 3.0]))
    quantizer(weight)
    assert quantizer.codebook.tolist() == [-9.0, -8.0, -1.25, 0.0, 1.0, 2.0, 3.0]


def test_gradient_passes_unchanged_also_beyond_the_outermost_level():
    weight = gaussian(50).requires_grad_()
    quantizer = fitted(weight.detach() / 10, 2).train()
    quantizer(weight).mul(3).sum().backward()
    assert (weight.grad == 3).all()
    assert list(quantizer.parameters()) == []


def test_weights_of_one_sign_mirror_their_levels():
    codebook = fitted(gaussian(100).abs(), 3).codebook
    torch.testing.assert_close(codebook, -codebook.flip(0))


def test_weights_that_are_not_numbers_leave_the_codebook_alone():
    weight = gaussian(100)
    quantizer = fitted(weight, 3, momentum=0.5).train()
    weight[0, 0] = torch.nan
    assert quantizer(weight)[0, 0].isnan()
    assert torch.isfinite(quantizer.codebook).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_weights_that_are_not_numbers_have_a_place_at_every_width(bits):
    weight = gaussian(300)
    quantizer = fitted(weight, bits, momentum=0.5).train()
    expected = slow_update(quantizer.codebook.tolist(), weight.flatten().tolist()[1:], 0.5)
    weight[0, 0] = torch.nan
    quantizer(weight)
    assert quantizer.codebook.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_middle_level_stays_zero_and_no_other_does():
    """A side's level may come to be zero, by rounding to words: it moves on, the middle one not."""
    quantizer = fitted(gaussian(64), 3, momentum=0.75)
    quantizer.codebook.copy_(torch.tensor([-3.0, -2.0, 0.0, 0.0, 1.0, 2.0, 3.0]))
    quantizer.train()(torch.tensor([[-0.5, -0.25]], dtype=torch.float64))
    wanted = [-3.0, -2.0, 0.25 * -0.375, 0.0, 1.0, 2.0, 3.0]
    assert quantizer.codebook.tolist() == pytest.approx(wanted)
