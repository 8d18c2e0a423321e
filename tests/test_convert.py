import copy
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from adq_search.convert import (
    apply_policy_,
    check_policy_fits,
    measure_health,
    quantized_layers,
    reestimate_batch_norm_,
    restore_,
)
from adq_search.errors import PolicyError, QuantizerError, TaskError
from adq_search.layers import QuantConv1d, QuantConv2d, QuantLinear
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.tracing import parametric_layers, trace

SCHEMES = ["lsq", "asq", "pot", "post", "asq_post", "adq"]


def precision(scheme: str = "lsq", bits: int = 4) -> LayerPrecision:
    return LayerPrecision(bits, bits, scheme, 0.9 if scheme == "adq" else None)


def image_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            plain=nn.Conv2d(3, 16, 3, padding=1),
            norm=nn.BatchNorm2d(16),
            act=nn.ReLU(),
            depthwise=nn.Conv2d(16, 16, 3, groups=16, padding=1, padding_mode="reflect"),
            grouped=nn.Conv2d(16, 8, 1, groups=4, bias=False),
            norm2=nn.BatchNorm2d(8),
            flat=nn.Flatten(),
            fc=nn.Linear(8 * 6 * 6, 5),
        )
    )


IMAGE_LAYERS = ("plain", "depthwise", "grouped", "fc")


def images(seed: int = 1, n: int = 8) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """Conv1d over time, then a linear layer on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 9, 3, padding=1)
        self.fc = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().transpose(1, 2))


class Branches(nn.Module):
    """A layer used twice, one never used, and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.extra = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.extra(self.twice(self.twice(x)) + y)


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "text": repr(model),
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in ("text", "modes", "hooks", "parameters", "attributes"):
        assert before[key] == after[key], key
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(t, after["state"][name]) for name, t in before["state"].items())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_apply_and_restore_is_the_identity_bit_for_bit(scheme, bits):
    model = image_network().train()
    model.plain.eval()
    before = snapshot(model)
    expected = copy.deepcopy(model).eval()(images())
    assert (
        apply_policy_(model, Policy.uniform(IMAGE_LAYERS, precision(scheme, bits)), images())
        is model
    )
    assert snapshot(model)["modes"][:2] == before["modes"][:2]
    model(images()).sum().backward()
    model.zero_grad(set_to_none=True)
    assert restore_(model) is model
    model.load_state_dict(before["state"])
    assert_same(before, snapshot(model))
    assert torch.equal(model.eval()(images()), expected)


def test_layers_change_class_and_keep_parameters():
    model = image_network()
    weight = model.fc.weight
    apply_policy_(model, Policy.uniform(IMAGE_LAYERS, precision()), images())
    assert type(model.plain) is QuantConv2d
    assert type(model.fc) is QuantLinear
    assert model.fc.weight is weight
    assert tuple(quantized_layers(model)) == IMAGE_LAYERS
    assert isinstance(model.fc, nn.Linear)
    tokens = apply_policy_(
        Tokens(), Policy.uniform(("conv", "fc"), precision("asq")), torch.randn(2, 4, 6)
    )
    assert type(tokens.conv) is QuantConv1d


def test_a_quantized_network_still_has_the_same_parametric_layers():
    model = apply_policy_(image_network(), Policy.uniform(IMAGE_LAYERS, precision("asq")), images())
    assert tuple(parametric_layers(model)) == IMAGE_LAYERS
    assert trace(model, images()).macs == trace(image_network(), images()).macs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_on_its_quantized_weights_and_inputs(scheme):
    policy = Policy.uniform(IMAGE_LAYERS, precision(scheme, 3))
    model = apply_policy_(image_network(), policy, images()).eval()
    x, conv = images(), model.plain
    expected = nn.functional.conv2d(
        conv.input_quantizer(x), conv.weight_quantizer(conv.weight), conv.bias, padding=1
    )
    assert torch.equal(conv(x), expected)
    assert len(conv.weight_quantizer(conv.weight)[0].unique()) <= 8


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_parameter_learns(scheme, bits):
    model = image_network()
    apply_policy_(model, Policy.uniform(IMAGE_LAYERS, precision(scheme, bits)), images())
    model.train()(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_eight_bits_are_close_to_float(scheme):
    model = Tokens().eval()
    x = torch.randn(16, 4, 12, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    apply_policy_(model, Policy.uniform(("conv", "fc"), precision(scheme, 8)), x)
    error = (model(x) - expected).square().mean() / expected.square().mean()
    # Powers of two stop at 14 dB, powers of the root at 20 dB, whatever the bits.
    assert error < {"pot": 0.06, "post": 0.03, "asq_post": 0.03}.get(scheme, 0.005)


def test_signs_are_found_layer_by_layer():
    model = apply_policy_(image_network(), Policy.uniform(IMAGE_LAYERS, precision()), images())
    signs = {
        name: layer.input_quantizer.is_signed for name, layer in quantized_layers(model).items()
    }
    assert signs == {"plain": True, "depthwise": False, "grouped": True, "fc": True}


def test_inputs_are_fitted_to_the_float_network_in_evaluation_mode():
    model = image_network().train()
    seen = []
    twin = copy.deepcopy(model).eval()
    twin.depthwise.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    twin(images())
    apply_policy_(model, Policy.uniform(IMAGE_LAYERS, precision()), images())
    expected = 2 * seen[0].abs().mean() / 15**0.5
    torch.testing.assert_close(model.depthwise.input_quantizer.step.detach(), expected.detach())
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)


def test_float_layers_stay_float():
    policy = Policy.uniform(IMAGE_LAYERS, precision(), ends=FLOAT)
    model = apply_policy_(image_network(), policy, images())
    assert tuple(quantized_layers(model)) == ("depthwise", "grouped")
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trained_state_loads_into_a_network_never_calibrated(scheme, tmp_path):
    policy = Policy.uniform(IMAGE_LAYERS, precision(scheme, 3))
    trained = apply_policy_(image_network(), policy, images()).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        trained(images()).square().mean().backward()
        optimizer.step()
    save_model(trained, str(tmp_path / "weights.safetensors"))
    fresh = apply_policy_(image_network(seed=9), policy)
    with pytest.raises(QuantizerError, match="calibration batch, or load a state dict"):
        fresh(images())
    load_model(fresh, str(tmp_path / "weights.safetensors"))
    assert torch.equal(fresh.eval()(images()), trained.eval()(images()))


def test_a_copy_is_independent():
    model = apply_policy_(image_network(), Policy.uniform(IMAGE_LAYERS, precision("adq")), images())
    twin = copy.deepcopy(model)
    twin.train()(images())
    before = model.fc.weight_quantizer.codebook
    assert not torch.equal(before, twin.fc.weight_quantizer.codebook)
    restore_(twin)
    assert quantized_layers(model)


def test_calibration_takes_tuples_and_layers_used_twice():
    model = Branches()
    names = ("twice", "never", "extra")
    policy = Policy.of({"twice": precision(), "never": FLOAT, "extra": precision()})
    batch = (torch.randn(5, 4), torch.randn(5, 4))
    apply_policy_(model, policy, batch)
    expected = 2 * batch[0].abs().mean() / 7**0.5
    assert model.twice.input_quantizer.step.item() == pytest.approx(expected.item())
    assert set(measure_health(model, batch).layers) == {"twice", "extra"}
    restore_(model)
    before = snapshot(model)
    with pytest.raises(PolicyError, match=r"does not reach: never. Leave these layers in 'float'"):
        apply_policy_(model, Policy.uniform(names, precision()), batch)
    assert_same(before, snapshot(model))


def test_a_policy_is_not_applied_twice():
    policy = Policy.uniform(IMAGE_LAYERS, precision())
    model = apply_policy_(image_network(), policy, images())
    with pytest.raises(PolicyError, match="this one is quantized. `restore_` it"):
        apply_policy_(model, policy, images())


def test_a_policy_of_another_network_is_refused_with_the_difference():
    policy = Policy.uniform(("plain", "depthwise", "pointwise", "fc"), precision())
    model = image_network()
    before = snapshot(model)
    text = (
        r"does not fit the network: layers of the network without a precision: grouped; "
        r"layers of the policy that the network lacks: pointwise\. Use the network"
    )
    with pytest.raises(PolicyError, match=text):
        apply_policy_(model, policy, images())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Policy.of({"fc": LayerPrecision(4, 4, "lsk")}), "Layer 'fc': There is no scheme 'lsk'"),
        (Policy.of({"fc": LayerPrecision(4, 4, "adq")}), "Layer 'fc': .* needs an ema_momentum"),
        (
            Policy.of({"fc": precision()}, {"post": {"lewels": "eq17"}}),
            "Options of the policy: .*Did you mean 'levels'",
        ),
        (Policy.of({"fc": precision()}, {"pist": {"levels": "eq17"}}), "quantizer 'pist'"),
    ],
    ids=["scheme", "momentum", "option", "quantizer of an option"],
)
def test_policies_that_say_nonsense_are_refused(policy, text):
    with pytest.raises(PolicyError, match=text):
        check_policy_fits(policy, ["fc"])


def test_options_of_the_policy_reach_the_quantizers():
    policy = Policy.of(
        {"fc": precision("post")}, {"post": {"levels": "eq17"}, "lsq": {"granularity": "tensor"}}
    )
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 3)))
    apply_policy_(model, policy, torch.randn(8, 4))
    assert model.fc.weight_quantizer.levels().shape == (3, 17)


@pytest.mark.parametrize("where", ["weights", "inputs"])
def test_numbers_that_are_not_finite_leave_the_network_as_it_was(where):
    model, batch = image_network(), images()
    if where == "weights":
        with torch.no_grad():
            model.grouped.weight[0, 0] = torch.nan
    else:
        batch[0, 0, 0, 0] = torch.inf
    before = snapshot(model)
    name = "grouped" if where == "weights" else "plain"
    with pytest.raises(QuantizerError, match=f"{where.capitalize()} of layer '{name}': .*finite"):
        apply_policy_(model, Policy.uniform(IMAGE_LAYERS, precision()), batch)
    assert snapshot(model)["text"] == before["text"]
    assert snapshot(model)["hooks"] == before["hooks"]
    assert snapshot(model)["modes"] == before["modes"]


def test_an_error_of_the_network_leaves_it_as_it_was():
    model = image_network()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        apply_policy_(model, Policy.uniform(IMAGE_LAYERS, precision()), torch.randn(2, 3, 9, 9))
    assert_same(before, snapshot(model))


def test_torchs_transformer_layers_do_not_pass_the_quantizers_by():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    policy = Policy.uniform(("linear1", "linear2"), precision("lsq", 2))
    assert tuple(parametric_layers(model)) == ("linear1", "linear2")
    apply_policy_(model, policy, x)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x))
    restore_(model)
    with torch.no_grad():
        assert not torch.allclose(fast, model(x), atol=1e-2)


def test_works_under_autocast():
    policy = Policy.uniform(IMAGE_LAYERS, precision("asq_post"))
    model = apply_policy_(image_network(), policy, images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images())
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_channels_last_gives_the_same():
    for scheme in SCHEMES:
        policy = Policy.uniform(IMAGE_LAYERS, precision(scheme))
        model = apply_policy_(image_network(), policy, images()).eval()
        plain = model(images())
        last = model.to(memory_format=torch.channels_last)(
            images().contiguous(memory_format=torch.channels_last)
        )
        torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def test_health_counts_wrong_signs_and_dead_levels():
    model = apply_policy_(image_network(), Policy.uniform(IMAGE_LAYERS, precision()), images())
    model.train()
    health = measure_health(model, images())
    assert all(m.training for m in model.modules())
    assert (health.n_steps, health.wrong_sign_steps) == (16 + 16 + 8 + 5 + 4, 0)
    assert health.n_levels == 8 * 16
    with torch.no_grad():
        model.fc.input_quantizer.step.mul_(-100)
        model.plain.weight_quantizer.step[0] = 0
    sick = measure_health(model, images())
    assert sick.wrong_sign_steps == 2
    assert sick.layers["fc"].input.wrong_sign_steps == 1
    assert sick.dead_levels > health.dead_levels
    assert sick.max_saturated >= health.max_saturated > 0


def test_batch_norm_statistics_become_the_average_over_batches():
    policy = Policy.of({n: precision("adq") for n in IMAGE_LAYERS})
    model = apply_policy_(image_network(), policy, images())
    model.train()
    model.act.eval()
    modes = [m.training for m in model.modules()]
    codebook = model.plain.weight_quantizer.codebook.clone()
    batches = [images(seed) for seed in range(3)]
    reestimate_batch_norm_(model, batches)
    means = [model.plain.eval()(batch).mean(dim=(0, 2, 3)) for batch in batches]
    model.plain.train()
    torch.testing.assert_close(model.norm.running_mean, torch.stack(means).mean(0).detach())
    assert [m.training for m in model.modules()] == modes
    assert model.norm.momentum == 0.1
    assert torch.equal(model.plain.weight_quantizer.codebook, codebook)


def test_batch_norm_statistics_survive_the_lack_of_batches():
    model = image_network()
    model(images())
    before = model.norm.running_mean.clone()
    with pytest.raises(TaskError, match="at least one batch"):
        reestimate_batch_norm_(model, [])
    assert torch.equal(model.norm.running_mean, before)


def test_networks_without_batch_norm_are_left_alone():
    model = Tokens()
    before = snapshot(model)
    reestimate_batch_norm_(model, [])
    assert_same(before, snapshot(model))
