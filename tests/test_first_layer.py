"""The first layer's gradients are autograd's, without one to its input."""

import shutil

import pytest
import torch
from torch import nn

from adq_search.convert import apply_policy_
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import _native

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": (0, 2), "dilation": 2},
    {"groups": 3},
]
OURS, TORCHS = "_FirstBackward", "ConvolutionBackward0"


def layer(images, scheme="lsq", **geometry):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 9, 3, **geometry))
    apply_policy_(network, Policy.uniform(("0",), LayerPrecision(8, 3, scheme)), images)
    return network[0]


def drawn(*, lowest=0.0):
    torch.manual_seed(1)
    images = torch.rand(4, 3, 11, 12) * (1.0 - lowest) + lowest
    return images.to(memory_format=torch.channels_last)


def step(conv, images):
    """Output, the name of what made it, and all gradients to parameters."""
    out = conv(images)
    upstream = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape)
    gradients = torch.autograd.grad(out, list(conv.parameters()), upstream)
    return out.detach(), type(out.grad_fn).__name__, gradients


@pytest.mark.parametrize("mode", [pytest.param("native", marks=needs_compiler), "off"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("lowest", "factor"),
    [(0.0, 0.6), (-1.0, 0.6), (0.0, -0.6)],
    ids=["unsigned", "signed", "wrong sign"],
)
def test_gradients_are_those_of_autograd(mode, geometry, lowest, factor, monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", mode)
    images = drawn(lowest=lowest)
    conv = layer(images, **geometry)
    with torch.no_grad():
        conv.input_quantizer.step.mul_(factor)  # some values are clipped
    out, by, found = step(conv, images)
    expected_out, by_torch, expected = step(conv, images.clone().requires_grad_())
    assert (by, by_torch) == (OURS, TORCHS)
    assert torch.equal(out, expected_out)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@needs_compiler
def test_slopes_are_those_of_tensor_operations():
    images = drawn(lowest=-1.0)
    quantizer = layer(images).input_quantizer
    raw, codes = quantizer.step.detach() * 0.6, (quantizer.qmin, quantizer.qmax)
    found = _native.step_slopes(images, raw, 0.0, *codes)
    scaled = images.double() / raw
    clipped = scaled.clamp(*(float(code) for code in codes))
    inside = (scaled > codes[0]) & (scaled < codes[1])
    expected = clipped.round() - torch.where(inside, scaled, 0.0)
    torch.testing.assert_close(found, expected.float(), rtol=0.0, atol=1e-5)


def test_where_more_than_the_step_learns_autograd_does_it():
    images = drawn()
    assert step(layer(images), images)[1] == OURS
    assert step(layer(images, "asq"), images)[1] == TORCHS
    assert step(layer(images, padding="same"), images)[1] == TORCHS
    assert step(layer(images, padding_mode="circular", padding=1), images)[1] == TORCHS
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images)(images).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer(images)(images).grad_fn is None
    watched, seen = layer(images), []
    watched.input_quantizer.register_forward_hook(lambda *_: seen.append(1))
    step(watched, images)
    assert seen == [1]
    frozen = layer(images)
    frozen.input_quantizer.step.requires_grad_(requires_grad=False)
    assert type(frozen(images).grad_fn).__name__ == TORCHS


def test_frozen_weights_get_no_gradient():
    images = drawn()
    conv = layer(images)
    conv.weight.requires_grad_(requires_grad=False)
    conv(images).sum().backward()
    assert conv.weight.grad is None
    assert conv.input_quantizer.step.grad is not None
