"""Contracts of sensitivity estimators.

Subclass `EstimatorContract` in a test module and name the estimator. Where its scores are a formula
of the float network, subclass `FormulaEstimatorContract` and write that down once more, slowly:

    class TestMine(FormulaEstimatorContract):
        estimator_class = Mine

        def slow_score(self, network, inputs, targets, name, quantized):
            ...  # loops over examples and weights, straight from the paper
            return loss_increase
"""

# ruff: noqa: D102 (a test's name is its sentence)

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.errors import SensitivityError
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import make_quantizers
from adq_search.sensitivity import (
    SensitivityEstimator,
    SensitivityTable,
    Subject,
    make_estimator,
    sensitivity_table,
)
from adq_search.space import SearchSpace
from adq_search.tracing import parametric_layers, trace

WEIGHT_BITS = (2, 4, 8)
INPUT_BITS = (2, 8)
_LAYERS = ("stem", "grouped", "shared", "head")
_RULE = {
    "weight_bits": list(WEIGHT_BITS),
    "input_bits": list(INPUT_BITS),
    "schemes": ["lsq", "pot", "adq"],  # even levels, powers of two, a codebook
    "scheme_weight_bits": {"pot": [2, 4]},
}
_COARSEST = LayerPrecision(WEIGHT_BITS[0], INPUT_BITS[0], "lsq")
#: Steps after which the example is fitted.
_N_STEPS = 100
_FINEST = LayerPrecision(WEIGHT_BITS[-1], INPUT_BITS[-1], "lsq")


class TrickyNetwork(nn.Module):
    """Grouped and plain convolutions, a shortcut, in-place activations, dropout, a shared layer.

    Maps images, # shape: (N, 1, H, W), to logits of three classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.shared = nn.Conv2d(4, 4, 1, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, # shape: (N, 3)."""
        x = self.relu(self.norm(self.stem(x)))
        x = x + self.relu(self.grouped(x))
        x = self.shared(self.relu(self.shared(x)))
        logits: Tensor = self.head(self.dropout(x.mean(dim=(2, 3))))
        return logits


@cache
def _fitted() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network at a minimum of its loss, where curvatures are positive."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TrickyNetwork().double().eval()
    targets = torch.tensor([0, 1, 2, 1, 0, 2])
    patterns = torch.randn(3, 1, 6, 6, dtype=torch.float64, generator=generator)
    noise = torch.randn(6, 1, 6, 6, dtype=torch.float64, generator=generator)
    inputs = 2.0 * patterns[targets] + 0.5 * noise
    network.train()(inputs)  # fills the batch norm's statistics
    optimizer = torch.optim.Adam(network.eval().parameters(), lr=0.02)
    for _ in range(_N_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network, inputs, targets


class EstimatorContract(ABC):
    """What holds for every sensitivity estimator.

    Attributes:
        estimator_class: The class under test.
        settings: What it is made with.
    """

    estimator_class: ClassVar[type[SensitivityEstimator]]
    settings: ClassVar[Mapping[str, Any]] = {}

    def make(self) -> SensitivityEstimator:
        """Return the estimator."""
        return self.estimator_class(**self.settings)

    def example(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        """Return a fitted network in training mode, inputs and classes."""
        network, inputs, targets = _fitted()
        return copy.deepcopy(network).to(dtype).train(), inputs.to(dtype), targets

    def space(self, network: nn.Module, inputs: Tensor, **content: Any) -> SearchSpace:
        """Return a space with all of the contract's precisions in every layer."""
        spec = {"default": _RULE, "pinned": {}, **content}
        return SearchSpace.from_spec(spec, trace(network, inputs[:1]))

    def measure(self, *, seed: int = 0, **options: Any) -> SensitivityTable:
        """Return the table of the example."""
        network, inputs, targets = self.example()
        space = self.space(network, inputs)
        return sensitivity_table(self.make(), network, inputs, targets, space, seed=seed, **options)

    def test_is_known_by_its_name(self) -> None:
        found = make_estimator(self.estimator_class.name, **self.settings)
        assert found == self.make()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_scores_every_choice_of_every_layer(self, dtype: torch.dtype) -> None:
        network, inputs, targets = self.example(dtype)
        space = self.space(network, inputs)
        table = sensitivity_table(self.make(), network, inputs, targets, space)
        for group in space.groups:
            for layer, precision in itertools.product(group.layers, group.choices):
                for score, error in table.parts(layer, precision):
                    assert math.isfinite(score)
                    assert score >= 0.0
                    assert error >= 0.0  # so it is not NaN

    def test_scores_layers_that_share_a_decision(self) -> None:
        network, inputs, targets = self.example()
        space = self.space(network, inputs, share={"mixed": ["grouped", "shared"]})
        table = sensitivity_table(self.make(), network, inputs, targets, space)
        assert all(table.score(name, _COARSEST) > 0.0 for name in ("grouped", "shared"))

    def test_more_bits_never_predict_more_loss(self) -> None:
        table = self.measure()
        for scores, bits in ((table.weights, WEIGHT_BITS), (table.inputs, INPUT_BITS)):
            for layer, quantizer in {key[:2] for key in scores}:
                known = [b for b in bits if (layer, quantizer, b) in scores]
                column = [scores[layer, quantizer, b] for b in known]
                assert len(column) > 1
                assert column == sorted(column, reverse=True)
        for (layer, scheme, by_weight, by_input), score in table.both.items():
            for (other, same, more, richer), lower in table.both.items():
                is_richer = more >= by_weight and richer >= by_input
                if (layer, scheme) == (other, same) and is_richer:
                    assert lower <= score

    def test_fewest_bits_predict_more_loss_than_most(self) -> None:
        table = self.measure()
        coarse, fine = (
            table.predict(Policy.uniform(_LAYERS, precision)) for precision in (_COARSEST, _FINEST)
        )
        assert coarse > 2.0 * fine

    def test_repeats_with_the_seed_and_draws_nothing_from_the_global_generator(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            before = torch.random.get_rng_state()
            first = self.measure(seed=1)
            assert torch.equal(torch.random.get_rng_state(), before)
            torch.manual_seed(6)
            assert self.measure(seed=1) == first

    def test_a_sample_is_the_same_whenever_it_is_asked_for(self) -> None:
        network, inputs, targets = self.example()
        network.eval()
        space = self.space(network, inputs)
        estimator = self.make()
        subject, again = (Subject(network, inputs, targets, space, seed=3) for _ in range(2))
        pieces = [(i, p) for i in range(2) for p in estimator.parts(subject)]
        first = {piece: estimator.sample(subject, *piece) for piece in pieces}
        for piece in reversed(pieces):
            assert estimator.sample(again, *piece) == first[piece]

    def test_has_pieces_to_count(self) -> None:
        network, inputs, targets = self.example()
        subject = Subject(network, inputs, targets, self.space(network, inputs), seed=0)
        estimator = self.make()
        parts = estimator.parts(subject)
        assert len(set(parts)) == len(parts) > 0
        assert 2 <= estimator.min_samples <= max(estimator.min_samples, 50)
        assert estimator.n_samples(subject) >= 1

    def test_what_is_kept_is_read_back_to_the_last_digit(self, tmp_path: Path) -> None:
        file = tmp_path / "sensitivity.json"
        assert self.measure(file=file) == self.measure(file=file)

    def test_leaves_the_network_as_it_was(self) -> None:
        network, inputs, targets = self.example()
        network.get_submodule("norm").eval()
        network.get_parameter("stem.weight").requires_grad = False
        before = {k: v.clone() for k, v in network.state_dict().items()}
        space = self.space(network, inputs, share={"mixed": ["grouped", "shared"]})
        sensitivity_table(self.make(), network, inputs, targets, space)
        assert network.training
        assert not network.get_submodule("norm").training
        assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["stem.weight"]
        assert all(p.grad is None for p in network.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

    def test_names_the_layer_with_nan(self) -> None:
        network, inputs, targets = self.example()
        space = self.space(network, inputs)
        with torch.no_grad():
            network.get_parameter("grouped.weight")[0, 0, 0, 0] = math.nan
        with pytest.raises(SensitivityError, match="weights of grouped are not all finite"):
            sensitivity_table(self.make(), network, inputs, targets, space)

    def test_refuses_an_output_that_is_no_logits(self) -> None:
        network = nn.Conv1d(1, 2, 1)
        inputs, targets = torch.randn(2, 1, 4), torch.tensor([0, 1])
        space = self.space(network, inputs)
        with pytest.raises(SensitivityError, match=r"logits of shape \(\d, classes\).*\d, 2, 4\)"):
            sensitivity_table(self.make(), network, inputs, targets, space)


class FormulaEstimatorContract(EstimatorContract):
    """What holds for an estimator whose scores are a formula of the float network.

    Attributes:
        many_samples: Settings of an estimator that finds the formula's value only on average, with
            which its standard error is below half of that.
    """

    many_samples: ClassVar[Mapping[str, Any] | None] = None

    @abstractmethod
    def slow_score(
        self, network: nn.Module, inputs: Tensor, targets: Tensor, name: str, quantized: Tensor
    ) -> float:
        """Compute what quantizing the weights of one layer costs, from the published formula.

        Args:
            network: In evaluation mode, float64.
            inputs: Examples.
            targets: Their classes.
            name: The layer.
            quantized: Its weights after quantization.
        """

    @pytest.mark.parametrize("scheme", ["lsq", "pot"])
    def test_a_score_is_that_of_the_published_formula(self, scheme: str) -> None:
        network, inputs, targets = self.example()
        network.eval()
        settings = {**self.settings, **(self.many_samples or {})}
        space = self.space(network, inputs)
        table = sensitivity_table(self.estimator_class(**settings), network, inputs, targets, space)
        for name in _LAYERS:
            weight = network.get_parameter(f"{name}.weight").detach()
            # The fewest bits: there the running minimum leaves the score alone.
            precision = LayerPrecision(WEIGHT_BITS[0], INPUT_BITS[0], scheme)
            quantizer, _ = make_quantizers(
                precision, parametric_layers(network)[name], lambda _: {}
            )
            quantizer.initialize_(weight)
            with torch.no_grad():
                quantized = quantizer.eval()(weight)
            expected = self.slow_score(network, inputs, targets, name, quantized)
            found = table.weights[name, scheme, WEIGHT_BITS[0]]
            error = table.weight_errors[name, scheme, WEIGHT_BITS[0]]
            if self.many_samples is not None:
                assert found == pytest.approx(expected, abs=4 * error)
                assert error < 0.5 * expected
            else:
                assert found == pytest.approx(expected, rel=1e-6)
