"""Estimators that go through layers, networks and trainings, against slow obvious computation."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_
from adq_search.errors import SensitivityError
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.quantizers import make_quantizers
from adq_search.sensitivity import (
    FisherOutputEstimator,
    KlEstimator,
    Labels,
    LsqStepsEstimator,
    SensitivityTable,
    sensitivity_table,
)
from adq_search.space import SearchSpace
from adq_search.testing.estimators import TrickyNetwork
from adq_search.tracing import parametric_layers, trace

RULE = {"weight_bits": [2, 4, 8], "input_bits": [3, 8], "schemes": ["lsq", "post"]}


def _network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = TrickyNetwork().double()
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2.0)
    return network.eval(), 2.0 * torch.randn(8, 1, 6, 6).double(), torch.arange(8) % 3


def _space(network: nn.Module, inputs: Tensor, **content: Any) -> SearchSpace:
    return SearchSpace.from_spec(
        {"default": RULE, "pinned": {}, **content}, trace(network, inputs[:1])
    )


def _fitted(name: str, network: nn.Module, values: Tensor, precision: LayerPrecision):
    weight, by_input = make_quantizers(precision, parametric_layers(network)[name], lambda _: {})
    weight.initialize_(parametric_layers(network)[name].weight.detach())
    by_input.initialize_(values)
    return weight.eval(), by_input.eval()


@pytest.mark.parametrize("part", ["weights", "inputs", "both"])
def test_output_fisher_equals_a_loop_over_examples_and_outputs(part: str) -> None:
    network, inputs, targets = _network()
    space = _space(network, inputs)
    estimator = FisherOutputEstimator(labels=Labels("data"), joint=True, n_folds=2, chunk=3)
    table = sensitivity_table(estimator, network, inputs, targets, space)
    # By hand, for `grouped`, whose input also feeds the shortcut.
    seen = network.relu(network.norm(network.stem(inputs))).detach()
    precision = LayerPrecision(2, 3, "lsq")
    by_weight, by_input = _fitted("grouped", network, seen, precision)
    expected = 0.0
    for x, y in zip(seen, targets, strict=True):
        x = x.unsqueeze(0)
        output = network.grouped(x).detach().requires_grad_()
        z = x + network.relu(output.clone())
        z = network.shared(network.relu(network.shared(z)))
        F.cross_entropy(network.head(z.mean(dim=(2, 3))), y.unsqueeze(0)).backward()
        changed = copy.deepcopy(network.grouped)
        with torch.no_grad():
            if part in {"weights", "both"}:
                changed.weight.copy_(by_weight(changed.weight))
            error = changed(by_input(x) if part in {"inputs", "both"} else x) - output
        pairs = zip(output.grad.flatten().tolist(), error.flatten().tolist(), strict=True)
        expected += sum(0.5 * g * g * e * e for g, e in pairs) / len(inputs)
    found = {
        "weights": table.weights["grouped", "lsq", 2],
        "inputs": table.inputs["grouped", "lsq", 3],
        "both": table.both["grouped", "lsq", 2, 3],
    }
    assert found[part] == pytest.approx(expected, rel=1e-9)


def test_weights_and_inputs_together_are_not_their_sum() -> None:
    network, inputs, targets = _network()
    space = _space(network, inputs)
    for kind in (FisherOutputEstimator, KlEstimator):
        joint = sensitivity_table(kind(joint=True), network, inputs, targets, space)
        alone = sensitivity_table(kind(), network, inputs, targets, space)
        precision = LayerPrecision(2, 3, "lsq")
        assert joint.weights == alone.weights
        assert not alone.both
        assert alone.score("head", precision) == pytest.approx(
            sum(e.value for e in alone.parts("head", precision)[:2])
        )
        assert joint.score("head", precision) == joint.both["head", "lsq", 2, 3]
        assert joint.score("head", precision) != pytest.approx(
            alone.score("head", precision), rel=1e-3
        )


def _kl(before: Tensor, after: Tensor) -> float:
    total = 0.0
    for p, q in zip(before.softmax(dim=1).tolist(), after.softmax(dim=1).tolist(), strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(before)


@pytest.mark.parametrize("precision", [LayerPrecision(2, 3, "lsq"), LayerPrecision(4, 8, "post")])
def test_kl_is_that_of_the_quantized_network(precision: LayerPrecision) -> None:
    network, inputs, targets = _network()
    space = _space(network, inputs, share={"mixed": ["grouped", "shared"]})
    table = sensitivity_table(KlEstimator(joint=True, n_folds=3), network, inputs, targets, space)
    with torch.no_grad():
        before = network(inputs)
        policy = Policy.of(
            {n: precision if n in {"grouped", "shared"} else FLOAT for n in space.names}
        )
        quantized = copy.deepcopy(network)
        apply_policy_(quantized, policy, inputs)
        for name in ("grouped", "shared"):  # as calibrated on every call, not on the first alone
            layer = parametric_layers(quantized)[name]
            layer.input_quantizer = sensitivity_inputs(network, inputs, name, precision)
        expected = _kl(before, quantized(inputs))
    # A group's score is shared by its layers.
    found = [table.score(name, precision) for name in ("grouped", "shared")]
    assert found[0] == found[1]
    assert sum(found) == pytest.approx(expected, rel=1e-6)


def sensitivity_inputs(network, inputs, name, precision):
    seen = []
    hook = parametric_layers(network)[name].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    network(inputs)
    hook.remove()
    return _fitted(name, network, torch.cat(seen), precision)[1]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor, SearchSpace, SensitivityTable]:
    """Three clouds of points, and a network that tells them apart."""
    torch.manual_seed(1)
    targets = torch.arange(96) % 3
    centres = 2.0 * torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    inputs = centres[targets] + 0.5 * torch.randn(96, 4)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    space = _space(network, inputs)
    estimator = LsqStepsEstimator(epochs=3)
    return (
        network,
        inputs,
        targets,
        space,
        sensitivity_table(estimator, network, inputs, targets, space),
    )


def test_learned_steps_are_scaled_to_the_loss_of_uniform_policies(trained) -> None:
    # kappa is a least-squares fit: the errors it leaves are orthogonal to the importances, so the
    # predictions of the uniform policies cannot all lie on one side of what was measured.
    network, inputs, targets, space, table = trained
    predicted = [
        table.predict(Policy.uniform(space.names, LayerPrecision(w, i, "lsq")))
        for w, i in ((2, 3), (4, 8), (8, 8))
    ]
    assert predicted == sorted(predicted, reverse=True)
    assert all(p > 0 for p in predicted)
    quantized = copy.deepcopy(network)
    apply_policy_(
        quantized, Policy.uniform(space.names, LayerPrecision(2, 3, "lsq")), inputs
    ).eval()
    with torch.no_grad():
        untrained = _kl(network(inputs), quantized(inputs))
    assert predicted[0] < 3 * untrained  # nats of the right size, and no more than before training


def test_a_coarser_quantizer_of_the_same_bits_is_more_sensitive_by_its_error(trained) -> None:
    network, _, _, space, table = trained
    weight = network[2].weight.detach()
    mse = {}
    for scheme in ("lsq", "post"):
        quantizer, _ = make_quantizers(LayerPrecision(4, 8, scheme), network[2], lambda _: {})
        quantizer.initialize_(weight)
        with torch.no_grad():
            mse[scheme] = float((quantizer.eval()(weight) - weight).square().mean())
    ratio = table.weights["2", "post", 4] / table.weights["2", "lsq", 4]
    assert ratio == pytest.approx(mse["post"] / mse["lsq"], rel=1e-4)


def test_weight_steps_count_alpha_times(trained) -> None:
    network, inputs, targets, space, table = trained
    doubled = sensitivity_table(
        LsqStepsEstimator(epochs=3, alpha=4.0), network, inputs, targets, space
    )
    key = ("2", "lsq", 4)
    before = table.weights[key] / table.inputs["2", "lsq", 8]
    assert doubled.weights[key] / doubled.inputs["2", "lsq", 8] == pytest.approx(2 * before)


def test_training_steps_lowers_the_loss_that_they_are_scaled_by(trained) -> None:
    network, inputs, targets, space, short = trained
    long = sensitivity_table(LsqStepsEstimator(epochs=30), network, inputs, targets, space)
    worst = Policy.uniform(space.names, LayerPrecision(2, 3, "lsq"))
    assert long.predict(worst) < short.predict(worst)


@pytest.mark.parametrize("name", ["fisher", "fisher_output", "kl"])
def test_standard_errors_say_how_far_another_sample_lies(name: str) -> None:
    network, _, _ = _network()
    torch.manual_seed(3)
    inputs = 2.0 * torch.randn(20 * 64, 1, 6, 6).double()
    targets = torch.arange(len(inputs)) % 3
    space = _space(network, inputs)
    tables = [
        sensitivity_table(name, network, x, y, space)
        for x, y in zip(inputs.split(64), targets.split(64), strict=True)
    ]
    for key in itertools.islice(tables[0].weights, 0, None, 4):
        values = torch.tensor([t.weights[key] for t in tables])
        claimed = torch.tensor([t.weight_errors[key] for t in tables]).square().mean().sqrt()
        assert 0.5 < float(claimed / values.std()) < 2.0


def test_both_together_fall_with_either_number_of_bits() -> None:
    network, inputs, targets = _network()
    table = sensitivity_table(
        KlEstimator(joint=True), network, inputs, targets, _space(network, inputs)
    )
    for (layer, scheme, weight_bits, input_bits), score in table.both.items():
        for (other, same, more, richer), lower in table.both.items():
            if (layer, scheme) == (other, same) and more >= weight_bits and richer >= input_bits:
                assert lower <= score


def test_kl_names_the_group_and_the_choice_that_breaks_the_network() -> None:
    class Divider(nn.Module):
        """Breaks as soon as its layer's small weight is rounded to zero."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.tensor([[1.0, 0.01], [1.0, 1.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / self.layer.weight[0, 1].clamp(max=0.0).add(
                (self.layer.weight[0, 1] > 0).to(x)
            )

    network = Divider()
    inputs = torch.rand(8, 2) + 0.1
    rule = {"weight_bits": [2, 8], "input_bits": [8], "schemes": ["lsq"]}
    space = SearchSpace.from_spec({"default": rule, "pinned": {}}, trace(network, inputs[:1]))
    with pytest.raises(SensitivityError, match=r"With layer quantized \(lsq at 2 bits\)"):
        sensitivity_table("kl", network, inputs, torch.zeros(8, dtype=torch.int64), space)


def test_a_training_of_steps_that_diverges_names_the_layer(trained) -> None:
    network, inputs, targets, space, _ = trained
    with pytest.raises(SensitivityError, match=r"those of 0 are not.*`learning_rate`, now 1e\+10"):
        sensitivity_table(LsqStepsEstimator(learning_rate=1e10), network, inputs, targets, space)


def test_one_example_has_no_standard_error() -> None:
    network, inputs, targets = _network()
    table = sensitivity_table("fisher", network, inputs[:1], targets[:1], _space(network, inputs))
    assert all(math.isnan(error) for error in table.weight_errors.values())
    assert {row["standard_error"] for row in table.to_json()["weights"]} == {None}
