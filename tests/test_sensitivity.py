from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.errors import SensitivityError
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.quantizers import make_quantizers
from adq_search.sensitivity import (
    Curvature,
    Estimate,
    FisherEstimator,
    HessianEstimator,
    Labels,
    LayerCurvature,
    Subject,
    estimator_names,
    make_estimator,
    register_estimator,
    sensitivity_table,
)
from adq_search.space import SearchSpace
from adq_search.testing.estimators import TrickyNetwork
from adq_search.tracing import parametric_layers, trace

RULE = {
    "weight_bits": [2, 3, 4, 8],
    "input_bits": [2, 4, 8],
    "schemes": ["lsq", "asq_post", "pot", "adq"],
}


def _residual() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = TrickyNetwork().double()
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2.0)
    return network.train(), torch.randn(5, 1, 6, 6).double(), torch.tensor([0, 1, 2, 1, 0])


def _mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 3)).double()
    return network, torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 0, 1, 2])


def _space(network: nn.Module, inputs: Tensor, **content: Any) -> SearchSpace:
    return SearchSpace.from_spec({"default": RULE, **content}, trace(network, inputs[:1]))


def test_fisher_equals_one_backward_for_each_example() -> None:
    network, inputs, targets = _residual()
    found = FisherEstimator(labels=Labels("data"), chunk=2).curvature(
        network, inputs, targets, seed=0
    )
    network.eval()
    for name, layer in parametric_layers(network).items():
        expected = torch.zeros_like(layer.weight)
        for x, y in zip(inputs, targets, strict=True):
            network.zero_grad()
            F.cross_entropy(network(x.unsqueeze(0)), y.unsqueeze(0)).backward()
            expected += layer.weight.grad.square() / len(inputs)
        torch.testing.assert_close(found.layers[name].weight, expected, rtol=1e-9, atol=0)


def test_fisher_of_inputs_is_the_gradient_through_the_layer_alone() -> None:
    network, inputs, targets = _residual()
    found = FisherEstimator(labels=Labels("data")).curvature(network, inputs, targets, seed=0)
    network.eval()
    # By hand, without hooks: the input of `grouped` also feeds the shortcut, which must not count.
    stem = network.relu(network.norm(network.stem(inputs))).detach()
    own = stem.clone().requires_grad_()
    x = stem + network.relu(network.grouped(own))
    x = network.shared(network.relu(network.shared(x)))
    loss = F.cross_entropy(network.head(x.mean(dim=(2, 3))), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, own)
    grouped = found.layers["grouped"]
    torch.testing.assert_close(grouped.values, stem)
    torch.testing.assert_close(grouped.input, gradient.square(), rtol=1e-9, atol=0)
    assert len(found.layers["shared"].values) == 2 * len(inputs)  # two calls


def test_fisher_is_not_the_square_of_the_mean_gradient() -> None:
    network, inputs, targets = _mlp()
    found = FisherEstimator(labels=Labels("data")).curvature(network, inputs, targets, seed=0)
    network.zero_grad()
    F.cross_entropy(network(inputs), targets).backward()
    for name, layer in parametric_layers(network).items():
        assert layer.weight.grad.square().sum() < 0.9 * found.layers[name].weight.sum()


@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [
        pytest.param(FisherEstimator(), 1e-9, id="all classes"),
        pytest.param(FisherEstimator(labels=Labels(exact_classes=0, draws=2)), 0.06, id="drawn"),
    ],
)
def test_model_labels_give_the_gauss_newton_diagonal(
    estimator: FisherEstimator, tolerance: float
) -> None:
    # For softmax regression the Hessian is X^T (diag p - p p^T) X, whatever the labels.
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    inputs = torch.randn(4, 3).double().repeat(1 if estimator.labels.exact_classes else 2000, 1)
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    found = estimator.curvature(network, inputs, targets, seed=0)
    p = network(inputs).softmax(dim=1).detach()
    expected = ((p * (1 - p)).T @ inputs.square()) / len(inputs)
    torch.testing.assert_close(found.layers["0"].weight, expected, rtol=tolerance, atol=0)


def test_fisher_and_hessian_agree_where_activations_are_piecewise_linear() -> None:
    # There a layer's block of the Hessian is its Gauss-Newton matrix.
    network, inputs, targets = _mlp()
    found = FisherEstimator().curvature(network, inputs, targets, seed=0)
    for name, (weight, by_input) in _exact_average_traces(network, inputs, targets).items():
        layer = found.layers[name]
        assert float(layer.weight.mean()) == pytest.approx(weight, rel=1e-9)
        assert float(layer.input.mean()) == pytest.approx(by_input, rel=1e-9)


def test_empirical_fisher_vanishes_on_a_fitted_set_but_the_default_does_not() -> None:
    network, inputs, _ = _mlp()
    with torch.no_grad():
        network[2].weight.mul_(3.0)
        targets = network(inputs).argmax(dim=1)
    by_data = FisherEstimator(labels=Labels("data")).curvature(network, inputs, targets, seed=0)
    many = inputs.repeat(200, 1)
    by_model = FisherEstimator().curvature(network, many, targets.repeat(200), seed=0)
    assert by_model.layers["2"].weight.sum() > 1.2 * by_data.layers["2"].weight.sum()


def _exact_average_traces(
    network: nn.Module, inputs: Tensor, targets: Tensor
) -> dict[str, tuple[float, float]]:
    """Return (weights, inputs) of a network of two linear layers, from whole Hessians."""
    first, middle, last = network[0], network[1], network[2]

    def loss(w1: Tensor, d1: Tensor, w2: Tensor, d2: Tensor) -> Tensor:
        hidden = F.linear(inputs + d1, w1, first.bias)
        logits = F.linear(middle(hidden) + d2, w2, last.bias)
        return F.cross_entropy(logits, targets, reduction="sum")

    at = (
        first.weight.detach(),
        torch.zeros_like(inputs),
        last.weight.detach(),
        torch.zeros(len(inputs), last.in_features, dtype=inputs.dtype),
    )
    blocks = torch.autograd.functional.hessian(loss, at)
    traces = [float(blocks[i][i].reshape(at[i].numel(), -1).trace()) for i in range(4)]
    n = len(inputs)
    return {
        "0": (traces[0] / n / at[0].numel(), traces[1] / at[1].numel()),
        "2": (traces[2] / n / at[2].numel(), traces[3] / at[3].numel()),
    }


def _hutchinson(
    estimator: HessianEstimator, n: int, network: nn.Module, inputs: Tensor, targets: Tensor
) -> dict[tuple[str, str], Estimate]:
    """Return the average traces of n probes, by layer and part."""
    space = cast("SearchSpace", None)  # probes do not ask what the layers may become
    subject = Subject(network, inputs, targets, space, seed=0)
    samples = [estimator.sample(subject, i, "network") for i in range(n)]
    return {(key.layer, key.part): e for key, e in estimator.traces(samples).items()}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Softplus], ids=["relu", "softplus"])
def test_hutchinson_finds_the_exact_traces_within_its_error(
    activation: Callable[[], nn.Module],
) -> None:
    network, inputs, targets = _mlp(activation)
    with torch.no_grad():
        network[0].bias.add_(1.0)  # so that both layers matter
        network[2].weight.mul_(2.0)
    found = _hutchinson(HessianEstimator(chunk=4), 400, network, inputs, targets)
    for name, exact in _exact_average_traces(network, inputs, targets).items():
        weight, by_input = found[name, "weights"], found[name, "inputs"]
        assert weight.error < 0.35 * weight.value
        assert weight.value == pytest.approx(exact[0], abs=4 * weight.error)
        assert by_input.value == pytest.approx(exact[1], abs=4 * by_input.error)


def test_hutchinson_averaged_over_all_probes_is_the_trace() -> None:
    # E over all 2^n sign vectors is exact: here n = 9 weights + 3 inputs of one example.
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    x, y = torch.randn(1, 3).double(), torch.tensor([1])
    weight = network[0].weight.detach()

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x + flat[9:], flat[:9].view(3, 3)), y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten(), torch.zeros(3)]))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=12))).double()
    products = signs * (signs @ hessian)
    exact = products[:, :9].sum(dim=1).mean(), products[:, 9:].sum(dim=1).mean()
    torch.testing.assert_close(exact[0], hessian[:9, :9].trace())
    found = _hutchinson(HessianEstimator(), 1500, network, x, y)
    weight, by_input = found["0", "weights"], found["0", "inputs"]
    assert weight.value * 9 == pytest.approx(float(exact[0]), abs=36 * weight.error)
    assert by_input.value * 3 == pytest.approx(float(exact[1]), abs=12 * by_input.error)


def test_hutchinson_stops_early_and_says_how_sure_it_is() -> None:
    # One input x = 1, zero weights, two classes: H = (1/4) [[1, -1], [-1, 1]], z^T H z is 0 or 1.
    network = nn.Sequential(nn.Linear(1, 2, bias=False)).double()
    nn.init.zeros_(network[0].weight)
    inputs, targets = torch.ones(4, 1).double(), torch.tensor([0, 1, 0, 1])
    found = _hutchinson(HessianEstimator(), 8, network, inputs, targets)
    ones = found["0", "weights"].value * 2 * 8  # z^T H z over 2 weights, mean of 8 probes
    assert ones in range(1, 8)
    share = ones / 8
    assert found["0", "weights"].error == pytest.approx((share * (1 - share) / 7) ** 0.5 / 2)
    assert found["0", "inputs"].value == 0.0  # with zero weights no input matters
    steps: list[tuple[int, int]] = []
    space = _space(network, inputs, pinned={})
    sensitivity_table(
        HessianEstimator(tolerance=math.inf),
        network,
        inputs,
        targets,
        space,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [*((i, 50) for i in range(1, 9)), (50, 50)]


class Hill(nn.Module):
    """Logits whose loss bends downwards in the weight: -w^2 for class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat([y.square(), torch.zeros_like(y)], dim=1)


def test_a_negative_trace_is_refused_by_name() -> None:
    network = Hill().double()
    nn.init.constant_(network.layer.weight, 0.1)
    inputs, targets = torch.ones(3, 1).double(), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(SensitivityError, match=r"negative, but for the weights of layer.*fisher"):
        _hutchinson(HessianEstimator(), 8, network, inputs, targets)


@pytest.mark.parametrize("name", estimator_names())
def test_estimates_repeat_and_depend_on_the_seed(name: str) -> None:
    network, inputs, targets = _residual()

    def score(seed: int) -> dict[Any, float]:
        space = _space(network, inputs, pinned={})
        table = sensitivity_table(name, network, inputs, targets, space, seed=seed)
        return {**table.weights, **table.inputs}

    assert score(0) == score(0)
    assert score(0) != score(1)


def test_chunks_do_not_change_a_fisher_information() -> None:
    network, inputs, targets = _mlp()
    found = [
        FisherEstimator(labels=Labels("data"), chunk=chunk).curvature(
            network, inputs, targets, seed=0
        )
        for chunk in (1, 6)
    ]
    for layer in ("0", "2"):
        a, b = (f.layers[layer] for f in found)
        torch.testing.assert_close(a.values, b.values)
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-12)


def test_chunks_do_not_change_what_hutchinson_finds() -> None:
    network, inputs, targets = _mlp()
    one, all_at_once = (
        _hutchinson(HessianEstimator(chunk=chunk), 200, network, inputs, targets)
        for chunk in (1, 6)
    )
    for key, a in one.items():
        b = all_at_once[key]
        assert a.value == pytest.approx(b.value, abs=4 * (a.error + b.error))


def test_scores_are_curvature_times_the_real_quantizers_error() -> None:
    network, inputs, targets = _residual()
    space = _space(network, inputs, pinned={})
    table = sensitivity_table(
        FisherEstimator(labels=Labels("data")), network, inputs, targets, space, seed=0
    )
    curvature = FisherEstimator(labels=Labels("data")).curvature(network, inputs, targets, seed=0)
    for name, precision in (
        ("grouped", LayerPrecision(4, 8, "lsq")),
        ("shared", LayerPrecision(3, 4, "adq", 0.99)),
        ("head", LayerPrecision(4, 4, "pot")),
    ):
        layer = parametric_layers(network)[name]
        around = curvature.layers[name]
        by_weight, by_input = make_quantizers(precision, layer, lambda _: {})
        by_weight.initialize_(layer.weight.detach())
        by_input.initialize_(around.values)
        expected = 0.0
        with torch.no_grad():
            error = (by_weight.eval()(layer.weight) - layer.weight).flatten().tolist()
            for c, e in zip(around.weight.flatten().tolist(), error, strict=True):
                expected += 0.5 * c * e * e
            error = (by_input.eval()(around.values) - around.values).flatten().tolist()
            for c, e in zip(around.input.flatten().tolist(), error, strict=True):
                expected += 0.5 * c * e * e / len(inputs)
        # the running minimum may lower a score, never raise it
        assert table.score(name, precision) <= expected * (1 + 1e-9)
        assert table.score(name, precision) == pytest.approx(expected, rel=0.2)


def test_the_score_predicts_a_small_change_of_the_loss() -> None:
    # At the minimum of a softmax regression the quadratic model is the truth for small errors.
    torch.manual_seed(4)
    network = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    inputs = torch.randn(400, 4).double()
    with torch.no_grad():
        labels = torch.multinomial(network(inputs).softmax(dim=1), 1).squeeze(1)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    space = _space(network, inputs, pinned={})
    table = sensitivity_table("fisher", network, inputs, labels, space, seed=0)
    weight = network[0].weight.detach().clone()
    quantizer, _ = make_quantizers(LayerPrecision(4, 8, "lsq"), network[0], lambda _: {})
    quantizer.initialize_(weight)
    with torch.no_grad():
        before = F.cross_entropy(network(inputs), labels)
        network[0].weight.copy_(quantizer.eval()(weight))
        rise = float(F.cross_entropy(network(inputs), labels) - before)
    assert rise > 0
    assert table.weights["0", "lsq", 4] == pytest.approx(rise, rel=0.35)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=4, max_size=4))
def test_running_minimum_is_the_lowest_of_fewer_bits(curvatures: list[float]) -> None:
    # One weight row a bit-width would need; here the curvature picks which weights matter.
    network, inputs, targets = _mlp()
    space = _space(network, inputs, pinned={})
    rows = torch.tensor(curvatures, dtype=torch.float64).unsqueeze(1)
    around = {
        name: LayerCurvature(
            weight=rows[: layer.weight.shape[0]],
            input=torch.tensor(0.0),
            values=torch.randn(2, layer.in_features).double(),
        )
        for name, layer in parametric_layers(network).items()
    }
    table = sensitivity_table(Curvature("given", around, 2), network, inputs, targets, space)
    weight = network[0].weight.detach()
    raw = []
    for bits in (2, 3, 4, 8):
        quantizer, _ = make_quantizers(LayerPrecision(bits, 8, "pot"), network[0], lambda _: {})
        quantizer.initialize_(weight)
        error = (quantizer.eval()(weight) - weight).square().detach()
        raw.append(float(0.5 * (around["0"].weight * error).sum()))
    expected = list(itertools.accumulate(raw, min))
    assert [table.weights["0", "pot", b] for b in (2, 3, 4, 8)] == pytest.approx(expected)


def test_a_policy_is_predicted_by_the_sum_over_its_layers() -> None:
    network, inputs, targets = _mlp()
    space = _space(network, inputs, pinned={"last": "float"})
    table = sensitivity_table("fisher", network, inputs, targets, space)
    precision = LayerPrecision(3, 4, "lsq")
    assert table.predict(Policy.of({"0": precision, "2": FLOAT})) == table.score("0", precision)
    assert table.score("0", precision) == (
        table.weights["0", "lsq", 3] + table.inputs["0", "lsq", 4]
    )
    with pytest.raises(SensitivityError, match="No sensitivity was measured for 0 at W5A4 lsq"):
        table.score("0", LayerPrecision(5, 4, "lsq"))
    rows = table.to_json()["weights"]
    assert {"layer": "0", "quantizer": "lsq", "bits": 3}.items() <= next(
        r for r in rows if (r["quantizer"], r["bits"]) == ("lsq", 3)
    ).items()


def test_quantizer_options_reach_the_scores() -> None:
    network, inputs, targets = _mlp()
    scores = [
        sensitivity_table(
            "fisher",
            network,
            inputs,
            targets,
            _space(network, inputs, pinned={}, options={"pot": {"levels": levels}}),
        ).weights["0", "pot", 3]
        for levels in ("b_bit", "eq17")
    ]
    assert scores[1] < scores[0]


def test_progress_ends_where_it_said() -> None:
    network, inputs, targets = _mlp()
    steps: list[tuple[int, int]] = []
    sensitivity_table(
        "hessian",
        network,
        inputs,
        targets,
        _space(network, inputs, pinned={}),
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert len({total for _, total in steps}) == 1
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0], ids=["nan", "inf", "negative"])
@pytest.mark.parametrize("part", ["weight", "input"])
def test_a_bad_curvature_is_named(part: str, bad: float) -> None:
    network, inputs, targets = _mlp()
    curvature = FisherEstimator().curvature(network, inputs, targets, seed=0)
    layer = curvature.layers["2"]
    parts = {"weight": layer.weight, "input": layer.input, part: torch.tensor(bad)}
    layers = {**curvature.layers, "2": LayerCurvature(values=layer.values, **parts)}
    broken = Curvature("given", layers, curvature.n_kept)
    space = _space(network, inputs, pinned={})
    with pytest.raises(SensitivityError, match=rf"for the {part}s of 2 \(\w+, 2 bits\)"):
        sensitivity_table(broken, network, inputs, targets, space)


def test_nan_in_the_data_is_named() -> None:
    network, inputs, targets = _mlp()
    space = _space(network, inputs, pinned={})
    with pytest.raises(SensitivityError, match="inputs of 0 are not all finite"):
        sensitivity_table("fisher", network, inputs * math.nan, targets, space)


def test_estimators_have_names_of_their_own() -> None:
    assert estimator_names() == ("fisher", "fisher_output", "hessian", "kl", "lsq_steps")
    with pytest.raises(SensitivityError, match="Did you mean 'fisher'"):
        make_estimator("fischer")

    class Impostor(FisherEstimator):
        pass

    with pytest.raises(SensitivityError, match="'fisher' is taken"):
        register_estimator(Impostor)
