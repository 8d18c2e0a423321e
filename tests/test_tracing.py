"""Shapes, MACs and coverage, against numbers worked out by hand and published ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from adq_search.errors import TaskError
from adq_search.tasks.networks import resnet20, small_resnet
from adq_search.tracing import parametric_layers, trace


class _TwoBranches(nn.Module):
    """Defines its layers in another order than it runs them, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.conv = nn.Conv1d(4, 6, kernel_size=3, groups=2, bias=False)
        self.auxiliary = nn.Linear(6, 2)

    def forward(self, signal: Tensor, extra: Tensor) -> Tensor:
        return self.fc(input=self.conv(signal).mean(-1) + extra)


class _FunctionalProduct(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values @ values.transpose(-1, -2)


class _OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.gain


class _MyLinear(nn.Linear):
    pass


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.attention(tokens, tokens, tokens)[0])


class _Shared(nn.Module):
    """Calls one layer on 5 and on 3 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.fc(tokens)[:, :3])


def test_layers_stand_in_execution_order_with_shapes_of_one_sample():
    summary = trace(_TwoBranches(), (torch.zeros(7, 4, 10), torch.zeros(7, 6)))

    assert summary.names == ("conv", "fc")
    conv, fc = summary.layers
    assert (conv.kind, conv.weight_shape, conv.groups) == ("conv1d", (6, 2, 3), 2)
    assert (conv.input_shape, conv.output_shape) == ((4, 10), (6, 8))
    assert (conv.n_inputs, conv.n_outputs, conv.fan_in) == (40, 48, 6)
    assert (conv.in_channels, conv.out_channels) == (4, 6)
    assert (conv.macs, conv.n_weights, conv.n_bias) == (48 * 6, 36, 0)
    assert (fc.kind, fc.input_shape, fc.output_shape) == ("linear", (6,), (3,))
    assert (fc.macs, fc.n_weights, fc.n_bias) == (18, 18, 3)
    assert (summary.macs, summary.n_weights) == (48 * 6 + 18, 54)
    assert summary["fc"] is fc


@pytest.mark.parametrize(
    ("network", "shape", "macs", "n_weights", "n_layers"),
    [
        pytest.param(resnet20, (3, 32, 32), 40_551_040, 268_336, 20, id="resnet20 A"),
        pytest.param(
            lambda: resnet20(shortcut="B"), (3, 32, 32), 40_813_184, 270_896, 22, id="resnet20 B"
        ),
        pytest.param(small_resnet, (1, 8, 8), 193_344, 19_464, 10, id="digits"),
        # conv + fc weights of the published 11,689,512 parameters, less 9,600 of batch norms
        # and 1,000 biases; convnet tables print 1.81 or 1.82 GMACs.
        pytest.param(models.resnet18, (3, 224, 224), 1_814_073_344, 11_678_912, 21, id="resnet18"),
        pytest.param(models.mobilenet_v2, (3, 224, 224), 300_774_272, 3_469_760, 53, id="mbv2"),
    ],
)
def test_known_networks_are_fully_covered(network, shape, macs, n_weights, n_layers):
    summary = trace(network(), torch.zeros(1, *shape))

    assert (summary.macs, summary.n_weights, len(summary)) == (macs, n_weights, n_layers)
    assert summary.coverage.unknown == ()
    assert summary.coverage.counted == summary.names


def test_a_layer_called_twice_sums_its_calls():
    layer = trace(_Shared(), torch.zeros(1, 5, 4))["fc"]

    assert layer.macs == 5 * 16 + 3 * 16
    assert (layer.input_shape, layer.output_shape) == ((5, 4), (5, 4))
    assert layer.n_input_reads == 20 + 12
    assert layer.n_output_writes == 20 + 12
    assert layer.n_weights == 16


def test_a_batch_folded_into_another_dimension_is_counted():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, tokens):
            return self.fc(tokens.flatten(0, 1))

    layer = trace(Folded(), torch.zeros(3, 5, 4))["fc"]

    assert layer.macs == 5 * 4 * 2
    assert layer.n_inputs == 20


@pytest.mark.parametrize(
    ("network", "shape", "unknown"),
    [
        pytest.param(
            lambda: nn.Sequential(nn.Linear(4, 4), _FunctionalProduct()),
            (3, 4),
            # (3, 4) times its transpose: 3 * 3 * 4 MACs
            ["1 (_FunctionalProduct: 36 MACs of its own that no layer accounts for)"],
            id="functional product",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(4, 4), _MyLinear(4, 2)),
            (4,),
            ["1 (_MyLinear: a subclass of Linear may compute otherwise, so it is not counted, 8"],
            id="subclass",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(4, 4), _OwnParameter()),
            (4,),
            ["1 (_OwnParameter: own parameters that no layer accounts for: gain)"],
            id="own parameter",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1)), nn.GRU(1, 1)),
            (4,),
            ["2 (GRU: "],
            id="recurrent",
        ),
        pytest.param(
            _Attention,
            (3, 4),
            # in: 3 x (3 tokens x 4 x 4); scores and values: 2 x (2 heads x 3 x 3 x 2); out: 48
            [
                "attention (MultiheadAttention: 264 MACs of its own",
                "attention.out_proj (NonDynamicallyQuantizableLinear: a subclass of Linear",
            ],
            id="attention",
        ),
    ],
)
def test_uncounted_work_is_named_with_its_reason(network, shape, unknown):
    found = trace(network(), torch.zeros(1, *shape)).coverage.unknown

    assert len(found) == len(unknown)
    assert all(f.startswith(u) for f, u in zip(found, unknown, strict=True)), found


def test_work_of_the_network_itself_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, values):
            return self.fc(values) @ self.fc.weight

    found = trace(Tied(), torch.zeros(1, 4)).coverage.unknown

    assert found == ("(network) (Tied: 12 MACs of its own that no layer accounts for)",)


def test_a_layer_that_never_runs_is_unknown_and_not_counted():
    summary = trace(_TwoBranches(), (torch.zeros(1, 4, 10), torch.zeros(1, 6)))

    assert summary.coverage.unknown == ("auxiliary (Linear: never called in the forward)",)
    assert "auxiliary" in parametric_layers(_TwoBranches())


def test_free_modules_are_leaves_that_do_no_macs():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(), nn.Sequential(nn.AvgPool2d(2)),
        nn.Flatten(), nn.Dropout(), nn.Identity(), nn.Linear(18, 2),
    )  # fmt: skip

    coverage = trace(network, torch.zeros(1, 1, 8, 8)).coverage

    assert coverage.free == ("1", "2", "3.0", "4", "5", "6")
    assert coverage.counted == ("0", "7")
    assert coverage.unknown == ()


def test_layers_inside_a_quantized_layer_are_its_own_affair():
    class QuantLinear(nn.Linear):
        is_quantized = True

        def __init__(self):
            super().__init__(4, 2)
            self.input_quantizer = nn.Sequential(nn.Linear(4, 1))

        def forward(self, values):
            return super().forward(values * self.input_quantizer(values))

    network = nn.Sequential(QuantLinear())
    summary = trace(network, torch.zeros(1, 4))

    assert summary.names == ("0",)
    assert list(parametric_layers(network)) == ["0"]
    assert summary.macs == 8
    assert summary.coverage.unknown == ()
    assert (
        summary.fingerprint == trace(nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4)).fingerprint
    )


def test_tracing_leaves_the_network_as_it_was():
    network = small_resnet()
    network.layer1.eval()
    modes = [m.training for m in network.modules()]
    state = {k: v.clone() for k, v in network.state_dict().items()}

    trace(network, torch.rand(4, 1, 8, 8))

    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_are_removed_and_modes_restored_when_the_forward_fails():
    network = small_resnet().train()

    with pytest.raises(TaskError, match=r"must run on its example.*\(2, 3, 8, 8\)"):
        trace(network, torch.zeros(2, 3, 8, 8))

    assert network.training
    assert not any(m._forward_hooks for m in network.modules())


def test_a_network_without_layers_is_refused():
    with pytest.raises(TaskError, match=r"needs at least one Conv1d.*1 MACs of its own"):
        trace(_FunctionalProduct(), torch.zeros(1, 1, 1))


def test_the_fingerprint_follows_the_structure_and_not_the_weights():
    def fingerprint(network, side=8):
        return trace(network, torch.zeros(1, 1, side, side)).fingerprint

    plain = fingerprint(small_resnet())

    assert plain == fingerprint(small_resnet())
    assert len(plain) == 16
    assert int(plain, 16) >= 0
    assert plain != fingerprint(small_resnet(channels=(8, 16, 24)))
    assert plain != fingerprint(small_resnet(), side=16)


def test_an_unknown_shortcut_is_refused():
    with pytest.raises(TaskError, match="'A' or 'B', but is 'C'"):
        resnet20(shortcut="C")
