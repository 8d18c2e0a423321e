"""Convolutions are torch's; slow gradients in bfloat16 go another way and are at least as exact."""

import pytest
import torch
from torch.nn import functional as F

from adq_search.convolution import convolve, is_unsound
from adq_search.layers import QuantConv2d, to_quantized_
from adq_search.quantizers import LsqInput, LsqWeight

#: Kernel, stride, groups of 8 channels, whether torch's gradients in bfloat16 are slow.
SHAPES = [
    (3, 2, 8, True),
    (5, 1, 8, True),
    (1, 2, 8, True),
    (3, 1, 8, False),
    (3, 2, 1, False),
    (3, 2, 2, False),
]


def drawn(kernel, groups):
    torch.manual_seed(0)
    values = torch.randn(4, 8, 11, 10).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 8 // groups, kernel, kernel)
    return [t.requires_grad_() for t in (values, weight, torch.randn(16))]


def gradients(call, tensors, upstream):
    out = call(*tensors)
    return out, torch.autograd.grad(out, tensors, upstream.to(out.dtype))


@pytest.mark.parametrize(("kernel", "stride", "groups", "is_slow"), SHAPES)
def test_gradients_in_bfloat16(kernel, stride, groups, is_slow):
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    tensors = drawn(kernel, groups)
    exact_of = [t.detach().double().requires_grad_() for t in tensors]
    like = F.conv2d(*exact_of, *geometry)
    upstream = torch.randn(like.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.bfloat16().float()
    _, exact = gradients(lambda *t: F.conv2d(*t, *geometry), exact_of, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        out, ours = gradients(lambda *t: convolve(*t, *geometry), tensors, upstream)
        theirs_out, theirs = gradients(lambda *t: F.conv2d(*t, *geometry), tensors, upstream)
    assert (type(out.grad_fn).__name__ == "_DepthwiseBackward") is is_slow
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, theirs_out)
    for own, their, true in zip(ours, theirs, exact, strict=True):
        assert own.dtype == their.dtype == torch.float32
        assert (own - true).norm() <= 1.05 * (their - true).norm()
        assert (own - true).norm() <= 0.02 * true.norm()


@pytest.mark.parametrize(("kernel", "stride", "groups", "_"), SHAPES)
def test_float32_is_torchs(kernel, stride, groups, _):
    geometry = ((stride, stride), "valid", (1, 1), groups)
    tensors = drawn(kernel, groups)
    out = F.conv2d(*tensors, *geometry)
    upstream = torch.randn_like(out)
    ours, own = gradients(lambda *t: convolve(*t, *geometry), tensors, upstream)
    assert torch.equal(ours, out)
    for a, b in zip(own, torch.autograd.grad(out, tensors, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_quantized_depthwise_layers_train_in_bfloat16(padding_mode):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 8, 3, 2, padding=1, groups=8, padding_mode=padding_mode)
    inputs = LsqInput(4, n_channels=8, channel_dim=-3)
    weights = LsqWeight(4, tuple(layer.weight.shape))
    values = torch.rand(4, 8, 12, 12).to(memory_format=torch.channels_last)
    inputs.initialize_(values)
    weights.initialize_(layer.weight)
    to_quantized_(layer, weights, inputs)
    assert type(layer) is QuantConv2d

    def found(*, is_half):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            out = layer(values)
        return torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))

    for half, full in zip(found(is_half=True), found(is_half=False), strict=True):
        assert (half - full).norm() <= 0.03 * full.norm()


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_gradients_of_strided_1x1_convolutions_are_right(channels, n_threads):
    """Where torch's own end the process, hang or are wrong (oneDNN's issue 6035)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    generator = torch.Generator().manual_seed(0)
    geometry = ((2, 1), (0, 0), (1, 1), 1)
    try:
        for size in (9, 16, 31) * 10:
            values = torch.randn(12, channels, size, size, generator=generator)
            tensors = [
                values.to(memory_format=torch.channels_last).requires_grad_(),
                torch.randn(9, channels, 1, 1, generator=generator).requires_grad_(),
                torch.randn(9, generator=generator).requires_grad_(),
            ]
            exact_of = [t.detach().double().requires_grad_() for t in tensors]
            like = F.conv2d(*exact_of, *geometry)
            upstream = torch.randn(like.shape, generator=generator)
            _, exact = gradients(lambda *t: F.conv2d(*t, *geometry), exact_of, upstream)
            out, found = gradients(lambda *t: convolve(*t, *geometry), tensors, upstream)
            torch.testing.assert_close(out.double(), like, rtol=1e-5, atol=1e-5)
            for own, true in zip(found, exact, strict=True):
                assert (own - true).norm() <= 1e-5 * true.norm()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kernel", "geometry", "expected"),
    [
        (1, ((2, 2), (0, 0), (1, 1), 1), True),
        (1, ((1, 3), "valid", (1, 1), 1), True),
        (1, ((1, 1), (0, 0), (1, 1), 1), False),
        (1, ((2, 2), (1, 0), (1, 1), 1), False),
        (1, ((2, 2), (0, 0), (1, 1), 2), False),
        (3, ((2, 2), (0, 0), (1, 1), 1), False),
    ],
)
def test_which_convolutions_go_around_it(kernel, geometry, expected):
    assert is_unsound(torch.empty(8, 4, kernel, kernel), *geometry) is expected
    assert not is_unsound(torch.empty(8, 16, kernel, kernel), *geometry)


@pytest.mark.parametrize(
    "padding", [{"padding": "valid"}, {"padding": 1, "padding_mode": "circular"}], ids=str
)
def test_quantized_layers_of_any_padding_are_right(padding):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 9, 1, 2, **padding)
    inputs, weights = LsqInput(4, n_channels=4, channel_dim=-3), LsqWeight(4, (9, 4, 1, 1))
    values = torch.randn(8, 4, 11, 11).to(memory_format=torch.channels_last)
    inputs.initialize_(values)
    weights.initialize_(layer.weight)
    plain = torch.nn.Conv2d(4, 9, 1, 2, **padding)
    plain.load_state_dict(layer.state_dict())
    to_quantized_(layer, weights, inputs)
    upstream = torch.randn(layer(values).shape)
    for _ in range(20):
        found = torch.autograd.grad(layer(values), [layer.bias, weights.step], upstream)
    with torch.no_grad():
        plain.weight.copy_(weights(layer.weight))
        quantized = inputs(values).contiguous()  # torch's order is sound
    weight = plain.weight
    out = plain(quantized)
    to_bias, to_weight = torch.autograd.grad(out, [plain.bias, weight], upstream)
    (to_step,) = torch.autograd.grad(weights(layer.weight), [weights.step], to_weight)
    torch.testing.assert_close(layer(values), out, rtol=1e-5, atol=1e-5)
    for own, true in zip(found, (to_bias, to_step), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-4, atol=1e-5)
