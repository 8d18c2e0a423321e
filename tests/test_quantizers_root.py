"""Root-r: the family of levels 2^(-k/r), whose first two members are POT and POST."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from adq_search.convert import apply_policy_, quantized_layers
from adq_search.errors import QuantizerError
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import PostWeight, PotWeight, Quantizer, RootWeight
from adq_search.testing import SlowPass, WeightQuantizerContract
from tests.test_quantizers_powers import printed_levels, slow_power, snr_db


class RootContract(WeightQuantizerContract):
    quantizer_class = RootWeight

    def slow_pass(
        self, quantizer: Quantizer, values: list[float], upstream: list[float]
    ) -> SlowPass:
        base = 2 ** (1 / self.options.get("root", 3))
        levels = printed_levels(quantizer.bits, base, self.options.get("levels", "b_bit"))
        thresholds = quantizer.get_parameter("threshold").flatten().tolist()
        n_channel = 90 if len(thresholds) == 1 else 18
        return slow_power(levels, thresholds, n_channel, values, upstream)


class TestRootAsShipped(RootContract):
    pass


class TestRoot1(RootContract):
    options: ClassVar = {"root": 1}


class TestRoot2(RootContract):
    options: ClassVar = {"root": 2}


class TestRoot4(RootContract):
    options: ClassVar = {"root": 4}


class TestRoot3Eq17ByTensor(RootContract):
    options: ClassVar = {"root": 3, "levels": "eq17", "granularity": "tensor"}


def quantiles(n: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced probabilities, and the Gaussian values at them."""
    places = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return places, torch.erfinv(2 * places - 1) * math.sqrt(2)


def _weight() -> Tensor:
    return torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("levels", ["b_bit", "eq17"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("root", "twin"), [(1, PotWeight), (2, PostWeight)], ids=["pot", "post"])
def test_the_first_two_roots_are_pot_and_post_bit_for_bit(root, twin, dtype, levels, bits):
    weight = _weight().to(dtype)
    found = {}
    for kind, options in ((RootWeight, {"root": root}), (twin, {})):
        quantizer = kind(bits, tuple(weight.shape), levels=levels, **options).to(dtype)
        quantizer.initialize_(weight)
        values = weight.clone().requires_grad_()
        out = quantizer(values)
        out.mul(_weight().to(dtype)).sum().backward()
        threshold = quantizer.threshold
        found[kind] = [
            out,
            quantizer.codes(weight),
            quantizer.levels(),
            threshold,
            threshold.grad,
            values.grad,
        ]
        assert quantizer.storage_bits(bits, levels=levels, **options) == twin.storage_bits(
            bits, levels=levels
        )
    for ours, theirs in zip(found[RootWeight], found[twin]):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("root", [1, 2, 3, 4])
def test_every_rth_level_is_a_power_of_two_exactly(root):
    quantizer = RootWeight(5, (1, 4), root=root)
    quantizer.initialize_(torch.ones(1, 4))
    magnitudes = quantizer.levels()[0].tolist()[::-1][:15]
    assert magnitudes[::root] == [2.0**-k for k in range(len(magnitudes[::root]))]
    ratios = [b / a for a, b in itertools.pairwise(magnitudes)]
    assert ratios == pytest.approx([2 ** (-1 / root)] * 14, rel=1e-6)


@pytest.mark.parametrize(
    ("root", "bits", "gaussian_db", "laplace_db"),
    [
        (3, 3, 10.2, 8.0),
        (3, 4, 16.9, 13.2),
        (3, 5, 23.4, 22.4),
        (3, 6, 23.6, 23.6),
        (4, 4, 14.5, 11.2),
        (4, 5, 23.9, 20.2),
        (4, 6, 26.1, 26.0),
    ],
)
def test_noise_with_the_best_clip_matches_the_measured_table(root, bits, gaussian_db, laplace_db):
    """Base 2^(1/3) and 2^(1/4) of the project's hardware notes, section 2.1."""
    places, gaussian = quantiles(40_000)
    laplace = (1 - 2 * places).sign() * torch.log1p(-(2 * places - 1).abs())
    for values, expected in ((gaussian, gaussian_db), (laplace, laplace_db)):
        weight = values.float().view(1, -1)
        quantizer = RootWeight(bits, tuple(weight.shape), root=root)
        quantizer.initialize_(weight)
        found = []
        for alpha in torch.arange(0.6, 9, 0.05):
            with torch.no_grad():
                quantizer.threshold.fill_(alpha)
                found.append(snr_db(weight, quantizer(weight)))
        assert max(found) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(
    ("kind", "options", "useful_bits"),
    [
        (PotWeight, {}, 4),
        (PostWeight, {}, 4),
        (RootWeight, {"root": 2}, 4),
        (RootWeight, {}, 5),
        (RootWeight, {"root": 4}, 6),
    ],
)
def test_more_levels_do_not_pass_the_floor_that_is_told(kind, options, useful_bits):
    floor = kind.error_floor(**options)
    assert floor.useful_bits == useful_bits
    weight = quantiles(20_000)[1].float().view(1, -1)
    quantizer = kind(8, (1, 20_000), **options)
    quantizer.initialize_(weight)
    found = []
    for alpha in torch.arange(2, 9, 0.1):
        with torch.no_grad():
            quantizer.threshold.fill_(alpha)
            found.append(snr_db(weight, quantizer(weight)))
    assert max(found) == pytest.approx(floor.snr_db, abs=0.1)


def test_a_policy_names_it_as_a_pair_and_its_options_pick_the_root():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3))
    policy = Policy.of({"0": LayerPrecision(5, 8, "root+lsq")}, {"root": {"root": 4}})
    apply_policy_(network, policy, torch.randn(2, 1, 5, 5))
    quantizer = quantized_layers(network)["0"].weight_quantizer
    assert isinstance(quantizer, RootWeight)
    assert quantizer.root == 4


@pytest.mark.parametrize("root", [0, 5, True, 2.0, "2"])
def test_other_roots_are_refused(root):
    with pytest.raises(QuantizerError, match="Option 'root' of quantizer 'root' cannot be"):
        RootWeight(5, (3, 4), root=root)
