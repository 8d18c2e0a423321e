"""1x1 convolutions with a stride quantize what they read; values and gradients are those of all."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_
from adq_search.errors import QuantizerError
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import INPUT_QUANTIZERS, AsqInput, LsqInput

LAYER = {"in_channels": 8, "out_channels": 16, "kernel_size": 1, "stride": 2}


def layer(scheme, images, **geometry):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(**(LAYER | geometry)))
    precision = LayerPrecision(3, 3, scheme, ema_momentum=0.9 if scheme == "adq" else None)
    apply_policy_(network, Policy.uniform(("0",), precision), images)
    return network[0]


@pytest.fixture
def images():
    return torch.randn(4, 8, 11, 12, generator=torch.Generator().manual_seed(0))


def step(conv, images):
    values = images.clone().requires_grad_()
    out = conv(values)
    upstream = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape)
    return out.detach(), torch.autograd.grad(out, [values, *conv.parameters()], upstream)


def by_torch(conv, images):
    """The same by torch's convolution, in the layout where its strides are sound."""
    values = images.clone().requires_grad_()
    quantized = conv.input_quantizer(values), conv.weight_quantizer(conv.weight)
    out = F.conv2d(*quantized, conv.bias, conv.stride)
    upstream = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape)
    return out.detach(), torch.autograd.grad(out, [values, *conv.parameters()], upstream)


@pytest.mark.parametrize("scheme", ["lsq", "adq"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_what_is_read_is_quantized_as_all_would_be(scheme, layout, stride, images, monkeypatch):
    values = images.to(memory_format=layout)
    ours = layer(scheme, values, stride=stride)
    plain = copy.deepcopy(ours)
    seen = []
    part = type(ours.input_quantizer).forward_part
    monkeypatch.setattr(
        type(ours.input_quantizer),
        "forward_part",
        lambda self, own, whole: seen.append(own.shape) or part(self, own, whole),
    )
    out, found = step(ours, values)
    assert seen == [torch.Size([4, 8, *out.shape[2:]])]
    expected_out, expected = by_torch(plain, images)
    assert len(seen) == 1
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-6)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "geometry"),
    [
        ("asq", {}),  # its factor follows from all values of a sample
        ("lsq", {"stride": 1}),
        ("lsq", {"kernel_size": 3}),
        ("lsq", {"padding": 1}),
    ],
    ids=str,
)
def test_other_layers_quantize_all_they_are_given(scheme, geometry, images):
    conv, seen = layer(scheme, images, **geometry), []
    unwatched, found = step(conv, images)
    conv.input_quantizer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    out, gradients = step(conv, images)
    assert seen == [images.shape]
    assert torch.equal(out, unwatched)
    for one, two in zip(gradients, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    values = conv.input_quantizer(images)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = F.conv2d(values, conv.weight_quantizer(conv.weight), conv.bias, *geometry)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["lsq", "asq"])
def test_strides_are_sound_with_one_thread_and_odd_channels(scheme):
    """oneDNN's own gradient to the weights ends the process here (torch 2.14, AVX2)."""
    images = torch.randn(4, 6, 11, 12).to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for stride in (2, (1, 3)) * 20:
            conv = layer(scheme, images, in_channels=6, out_channels=9, stride=stride)
            _, gradients = step(conv, images)
            conv(images).sum().backward()  # as a first layer, whose input needs no gradient
            assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    finally:
        torch.set_num_threads(threads)


def test_hooks_of_the_quantizer_see_all_values(images):
    conv, seen = layer("lsq", images), []
    unwatched = conv(images)
    conv.input_quantizer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    torch.testing.assert_close(conv(images), unwatched, rtol=1e-5, atol=1e-6)
    assert seen == [images.shape]


@pytest.mark.parametrize("name", list(INPUT_QUANTIZERS))
def test_parts_are_quantized_as_the_whole_where_that_holds(name, images):
    quantizer = INPUT_QUANTIZERS[name](4, n_channels=8, channel_dim=-3)
    with pytest.raises(QuantizerError, match="never fitted"):
        quantizer.forward_part(images[:1], images)
    quantizer.initialize_(images)
    part = images[..., ::2, 1::3]
    if quantizer.is_elementwise:
        whole = quantizer(images)
        assert torch.equal(quantizer.forward_part(part, images), whole[..., ::2, 1::3])
        return
    with pytest.raises(QuantizerError, match="all values of a sample"):
        quantizer.forward_part(part, images)


def test_which_quantizers_are_elementwise():
    assert LsqInput.is_elementwise
    assert not AsqInput.is_elementwise
