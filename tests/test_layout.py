"""Channels last in training: the same mathematics, and no network is refused for it."""

import pytest
import torch
from torch import nn

from adq_search.convert import apply_policy_
from adq_search.layout import fast_layout
from adq_search.policy import LayerPrecision, Policy
from adq_search.tasks import Task, TensorPart
from adq_search.training import TrainingSettings, fit

IMAGES = torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(24) % 3


class Head(nn.Module):
    """Flattens by `view`, which takes one layout, or by `flatten`, which takes any."""

    def __init__(self, *, by_view):
        super().__init__()
        self.by_view = by_view
        self.fc = nn.Linear(4 * 6 * 6, 3)

    def forward(self, values):
        flat = values.view(len(values), -1) if self.by_view else values.flatten(1)
        return self.fc(flat)


def network(*, by_view=False):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*body, Head(by_view=by_view)).double()


def task(seen):
    """A task whose batches are written down as they reach the network's first layer."""

    def make_network():
        made = network()
        made[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        return made

    parts = [TensorPart(IMAGES.double(), TARGETS)] * 3
    return Task("small", make_network, *parts, n_classes=3)


def test_images_are_trained_on_channels_last():
    seen = []
    small = task(seen)
    made = small.make_network()
    fit(made, small, TrainingSettings(epochs=1, batch_size=8), seed=0)
    trained_on = [x for x in seen if len(x) > 1]
    assert len(trained_on) == 3
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in trained_on)
    assert made[0].weight.is_contiguous()


def test_layout_changes_nothing_but_rounding(monkeypatch):
    outcomes = []
    for layout in (fast_layout, lambda *_: torch.preserve_format):
        monkeypatch.setattr("adq_search.training.fast_layout", layout)
        made = network()
        loss = fit(made, task([]), TrainingSettings(epochs=2, batch_size=8), seed=0).loss
        outcomes.append((loss, made.state_dict()))
    (loss, state), (plain_loss, plain_state) = outcomes
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    for name, value in state.items():
        torch.testing.assert_close(value, plain_state[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("made", "example", "expected"),
    [
        (network(), IMAGES[:1].double(), torch.channels_last),
        (network(by_view=True), IMAGES[:1].double(), torch.preserve_format),
        (nn.Conv1d(3, 4, 3), torch.rand(1, 3, 6), torch.preserve_format),
        (nn.Linear(5, 3), torch.rand(1, 5), torch.preserve_format),
    ],
    ids=["flatten", "view", "sequences", "features"],
)
def test_channels_last_where_a_network_takes_it(made, example, expected):
    assert fast_layout(made, example) is expected


def shortcut(**geometry):
    """A network with a strided 1x1 convolution of few channels, as a shortcut has."""
    torch.manual_seed(0)
    conv = nn.Conv2d(**({"in_channels": 3, "out_channels": 4, "kernel_size": 1} | geometry))
    return nn.Sequential(conv, nn.Flatten(1), nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        ({"stride": 2}, torch.preserve_format),
        ({"stride": 2, "padding": 1, "padding_mode": "reflect"}, torch.preserve_format),
        ({"stride": 2, "padding": 1}, torch.channels_last),
        ({"stride": 1}, torch.channels_last),
        ({"stride": 2, "kernel_size": 3}, torch.channels_last),
    ],
    ids=str,
)
def test_float_layers_whose_gradients_onednn_takes_wrongly_keep_torchs_order(geometry, expected):
    made = shortcut(**geometry)
    made(IMAGES[:1])
    assert fast_layout(made, IMAGES[:1]) is expected
    layers = ["0", "2"]
    apply_policy_(made, Policy.uniform(layers, LayerPrecision(4, 4, "lsq")), IMAGES)
    assert fast_layout(made, IMAGES[:1]) is torch.channels_last


def test_a_teacher_with_such_a_layer_learns():
    """With channels last the process dies, on one thread and AVX2."""
    parts = [TensorPart(IMAGES, TARGETS)] * 3
    small = Task("small", lambda: shortcut(stride=2), *parts, n_classes=3)
    made = shortcut(stride=2)
    made(IMAGES[:1])
    settings = TrainingSettings(epochs=10, batch_size=8)
    assert fit(made, small, settings, seed=0).is_finite


def test_asking_changes_neither_modes_nor_statistics():
    made = network().train()
    made[1].eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    fast_layout(made, IMAGES[:1].double())
    assert made.training
    assert not made[1].training
    assert all(value.equal(before[name]) for name, value in made.state_dict().items())
