"""Batch norm and clipping in one pass: torch's values, and only where a network allows it."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_, reestimate_batch_norm_
from adq_search.errors import QuantizerError
from adq_search.norms import EVERYTHING, FusedNorm, Reader, find_readers, fused_norms
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import AsqInput
from adq_search.tasks import load_task
from adq_search.tasks.networks import small_resnet
from adq_search.tracing import parametric_layers
from adq_search.training import TrainingSettings, fit

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
LAST = torch.channels_last
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}


def normed(n_channels, activation=nn.ReLU, **options):
    """A batch norm with trained figures and a module behind it."""
    norm = nn.BatchNorm2d(n_channels, **options)
    with torch.no_grad():
        if norm.affine:
            norm.weight.uniform_(-1.0, 4.0)
            norm.bias.normal_()
    return nn.Sequential(norm, activation())


def step(network, values, upstream):
    values = values.detach().requires_grad_()
    network.zero_grad()
    out = network(values)
    out.backward(upstream)
    return [out.detach(), values.grad, *(p.grad.clone() for p in network.parameters())]


def batch(*shape, dtype=torch.float32):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    values = (3.0 * drawn + torch.linspace(-4.0, 9.0, shape[1]).view(1, -1, 1, 1)).to(dtype)
    return values.contiguous(memory_format=LAST), torch.randn(shape).to(dtype)


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape",
    [(8, 16, 9, 9), (3, 5, 7, 7), (2, 300, 3, 3), (4, 1, 6, 6), (64, 24, 5, 5), (2, 7, 1, 1)],
)
def test_values_and_gradients_are_those_of_float64(shape, activation):
    torch.manual_seed(0)
    ours = normed(shape[1], ACTIVATIONS[activation])
    exact = copy.deepcopy(ours).double()
    plain = copy.deepcopy(ours)
    values, upstream = batch(*shape)
    # No value where rounding decides whether the clipping lets its gradient through.
    before = exact[0](values.double())
    exact[0].reset_running_stats()
    near = (before.abs() < 1e-4) | ((before - 6.0).abs() < 1e-4)
    upstream = upstream.masked_fill(near, 0.0)
    with fused_norms(ours):
        assert type(ours[0]) is FusedNorm
        found = step(ours, values, upstream)
    expected = step(exact, values.double(), upstream.double())
    torchs = step(plain, values, upstream)
    for one, two, three in zip(found, expected, torchs, strict=True):
        error = (one - two).abs().max()
        # Torch's own error, or a few units in the last place of the largest value.
        assert error <= max(2.0 * (three - two).abs().max(), 2e-6 * two.abs().max())
    for one, two in zip(ours.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_bfloat16_values_with_float32_statistics():
    ours = normed(16)
    plain = copy.deepcopy(ours)
    values, upstream = batch(8, 16, 6, 6, dtype=torch.bfloat16)
    with fused_norms(ours):
        found = step(ours, values, upstream)
    expected = step(plain, values, upstream)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours[0].running_var, plain[0].running_var, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_figures_do_not_depend_on_threads():
    values, upstream = batch(16, 24, 16, 16)
    network = normed(24)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        own = copy.deepcopy(network)
        with fused_norms(own):
            found.append([*step(own, values, upstream), *own.buffers()])
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@needs_compiler
def test_a_large_mean_loses_no_variance():
    values = (1000.0 + torch.randn(16, 4, 16, 16)).contiguous(memory_format=LAST)
    network = normed(4, nn.Identity)
    with fused_norms(network):
        network(values)
    exact = values.double().var(dim=(0, 2, 3))
    torch.testing.assert_close(
        network[0].running_var.double(), 0.9 + 0.1 * exact, rtol=1e-5, atol=0.0
    )


@needs_compiler
def test_an_average_without_momentum_is_followed_as_torch_does():
    ours = normed(6, momentum=None)
    plain = copy.deepcopy(ours)
    for _ in range(3):
        values, _ = batch(4, 6, 5, 5)
        with fused_norms(ours):
            ours(values)
        plain(values)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("network", "values"),
    [
        (normed(4), torch.randn(3, 4, 5, 5)),
        (normed(4, affine=False), batch(3, 4, 5, 5)[0]),
        (normed(4, track_running_stats=False), batch(3, 4, 5, 5)[0]),
        (normed(4).double(), batch(3, 4, 5, 5, dtype=torch.float64)[0]),
        (normed(4).eval(), batch(3, 4, 5, 5)[0]),
    ],
    ids=["channels first", "without weights", "without statistics", "float64", "evaluation"],
)
def test_what_is_left_to_torch(network, values):
    plain = copy.deepcopy(network)
    with fused_norms(network):
        assert torch.equal(network(values), plain(values))


def test_a_single_value_a_channel_is_refused_as_torch_does():
    network = normed(4)
    with fused_norms(network), pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.randn(1, 4, 1, 1))


class Readers(nn.Module):
    """Batch norms, and what reads them."""

    def __init__(self, read):
        super().__init__()
        self.norm, self.relu, self.relu6 = nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU6()
        self.read = read

    def forward(self, values):
        return self.read(self, self.norm(values))


@pytest.mark.parametrize(
    ("read", "passes"),
    [
        (lambda own, out: own.relu(out), (0.0, torch.inf)),
        (lambda own, out: own.relu(out) + own.relu(out), (0.0, torch.inf)),
        (lambda own, out: own.relu(own.norm(own.relu(out))), (0.0, torch.inf)),
        (lambda own, out: own.relu6(out), (0.0, 6.0)),
        (lambda own, out: own.relu(out) + out, None),
        (lambda own, out: own.relu(out) + own.relu6(out), None),
        (lambda own, out: own.norm(own.relu(out)), None),
        (lambda own, out: F.relu(out), None),
        (lambda own, out: own.relu(out + 1), None),
        (lambda own, out: out, None),
        (lambda own, out: own.relu(out) if out.sum() > 0 else out, None),
    ],
    ids=[
        *("relu", "relu twice", "norm and relu twice", "relu6", "a shortcut too", "two ranges"),
        *("relu once of twice", "a function", "a sum between", "the output", "not traceable"),
    ],
)
def test_a_norm_clips_only_where_nothing_else_reads_it(read, passes):
    network = Readers(read)
    assert find_readers(network).get(network.norm, Reader()) == Reader(passes or EVERYTHING)
    plain = copy.deepcopy(network)
    values, _ = batch(4, 3, 5, 5)
    with fused_norms(network):
        assert network.norm.reader.passes == (passes or EVERYTHING)
        torch.testing.assert_close(network(values), plain(values))


def test_a_norm_that_is_watched_does_not_clip():
    network, seen = normed(3), []
    network[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with fused_norms(network):
        network(batch(4, 3, 5, 5)[0])
    assert seen[0].min() < 0


def test_the_network_is_the_same_afterwards():
    network = small_resnet().train()
    before = {name: type(module) for name, module in network.named_modules()}
    names, parameters = list(network.state_dict()), list(map(id, network.parameters()))

    def interrupted():
        with fused_norms(network):
            assert any(type(module) is FusedNorm for module in network.modules())
            assert list(network.state_dict()) == names
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: type(module) for name, module in network.named_modules()} == before
    assert list(map(id, network.parameters())) == parameters
    assert not any("reader" in module.__dict__ for module in network.modules())


SCHEMES = ("lsq", "lsq+n2uq", "asq")


def quantized_behind(scheme, activation=nn.ReLU, *, bits=4, n_channels=9):
    """A norm, a clipping and a quantized layer; and a batch for the norm."""
    torch.manual_seed(0)
    conv = nn.Conv2d(n_channels, 4, 3)
    network = nn.Sequential(*normed(n_channels, activation), conv).to(memory_format=LAST)
    values, _ = batch(6, n_channels, 12, 11)
    precision = LayerPrecision(bits, bits, scheme)
    apply_policy_(network, Policy.of({"2": precision}), values)
    return network.train(), values


@needs_compiler
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_behind_a_norm_is_the_same_in_one_pass(scheme, activation, bits):
    together, values = quantized_behind(scheme, ACTIVATIONS[activation], bits=bits)
    apart = copy.deepcopy(together)
    upstream = torch.randn(6, 4, 10, 9)
    if activation == "none":
        del together[1], apart[1]
    with fused_norms(together):
        assert together[0].reader.quantizer is together[-1].input_quantizer
        found = step(together, values, upstream)
    with fused_norms(apart):
        apart[0].reader = Reader(apart[0].reader.passes)
        expected = step(apart, values, upstream)
    assert torch.equal(found[0], expected[0])
    for one, two in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=float(5e-6 * two.abs().max()))


@needs_compiler
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_figures_do_not_depend_on_threads(scheme):
    threads, found = torch.get_num_threads(), []
    network, _ = quantized_behind(scheme, n_channels=24)
    values, _ = batch(16, 24, 16, 16)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        own = copy.deepcopy(network)
        with fused_norms(own):
            found.append([*step(own[:2], values, torch.ones_like(values)), *own.buffers()])
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@needs_compiler
def test_a_quantizer_that_others_read_around_stays_where_it_is():
    class Shortcut(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.norm, self.relu, self.conv = block

        def forward(self, values):
            out = self.relu(self.norm(values))
            return self.conv(out).mean() + out.mean()

    network = Shortcut(quantized_behind("lsq")[0])
    assert find_readers(network)[network.norm] == Reader((0.0, torch.inf))


def test_a_quantizer_that_is_watched_stays_where_it_is():
    network, values = quantized_behind("lsq")
    seen = []
    network[2].input_quantizer.register_forward_hook(lambda *args: seen.append(args))
    with fused_norms(network):
        network(values)
    assert len(seen) == 1


def test_an_unfitted_quantizer_is_refused_as_ever():
    network, values = quantized_behind("lsq")
    network[2].input_quantizer.is_initialized = False
    with fused_norms(network), pytest.raises(QuantizerError, match="never fitted"):
        network(values)


class Residual(nn.Module):
    """A ReLU behind an addition, read by a quantized layer and by a shortcut."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.relu, self.conv = block
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, values):
        out = self.relu(self.norm(values) + values)
        return self.pool(self.conv(out)) + 3 * self.pool(out)[:, :4]


@needs_compiler
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_clipping_and_quantizing_behind_an_addition_is_the_same_in_one_pass(
    scheme, activation, bits
):
    block, values = quantized_behind(scheme, ACTIVATIONS[activation], bits=bits)
    together = Residual(block)
    apart = copy.deepcopy(together)
    upstream = torch.randn(6, 4, 1, 1)
    with fused_norms(together):
        assert together.relu.reader.quantizer is together.conv.input_quantizer
        found = step(together, values, upstream)
    with fused_norms(apart):
        apart.relu.reader = Reader(apart.relu.reader.passes)
        expected = step(apart, values, upstream)
    assert torch.equal(found[0], expected[0])
    for one, two in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=float(5e-6 * two.abs().max()))


@needs_compiler
def test_what_was_quantized_for_a_layer_is_not_held_once_it_is_taken():
    network, values = quantized_behind("lsq")
    network = Residual(network)
    seen = []
    network.conv.register_forward_hook(lambda module, args, out: seen.append(vars(args[0])))
    with fused_norms(network):
        network(values)
    assert seen == [{}]


class Deep(nn.Module):
    """What reads a norm differs between training and evaluation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.relu, self.head = nn.ReLU(), nn.Linear(8, 10)
        self.seen = []

    def forward(self, images):
        out = self.norm(self.conv(images))
        self.seen.append(getattr(self.norm, "reader", None))
        out = self.relu(out) + out if self.training else self.relu(out)
        return self.head(out.mean(dim=(2, 3)))


def test_a_training_run_traces_the_network_as_it_trains():
    network = Deep().eval()
    fit(network, load_task("digits"), TrainingSettings(epochs=1, batch_size=512), seed=0)
    assert Reader() in network.seen
    assert type(network.norm) is nn.BatchNorm2d


def test_other_channels_are_refused_by_torch_and_not_read():
    norm = nn.Sequential(nn.BatchNorm2d(8)).train()
    few = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    with fused_norms(norm), pytest.raises(RuntimeError, match="8 elements|channels|running_mean"):
        norm(few)


@pytest.mark.parametrize(("channel_dim", "n_channels"), [(-1, 5), (-1, 16), (-3, 4)])
def test_asq_of_other_channels_is_refused_by_torch_and_not_read(channel_dim, n_channels):
    quantizer = AsqInput(4, n_channels=8, channel_dim=channel_dim).train()
    shape = (3, 8) if channel_dim == -1 else (3, 8, 5, 5)
    quantizer.initialize_(torch.rand(shape))
    wrong = torch.rand((3, n_channels) if channel_dim == -1 else (3, n_channels, 5, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        quantizer(wrong.to(memory_format=torch.channels_last) if wrong.ndim == 4 else wrong)


def test_relu_before_pooling_gets_its_gradient_channels_last():
    """Pooling hands it back in torch's own layout, on which torch's ReLU is slow."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    values, _ = batch(4, 3, 9, 9)
    upstream = torch.randn(4, 8)
    expected = step(copy.deepcopy(network), values, upstream)
    seen = []
    with fused_norms(network):
        # Hooks of a tensor run in the order of their registration: this one sees what ReLU gets.
        network[2].register_forward_pre_hook(
            lambda _, args: args[0].register_hook(seen.append) and None
        )
        found = step(network, values, upstream)
    assert seen[0].is_contiguous(memory_format=LAST)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_statistics_are_estimated_again_in_the_same_passes():
    torch.manual_seed(0)
    network = small_resnet()
    batches = [torch.rand(16, 1, 8, 8).to(memory_format=LAST) for _ in range(3)]
    names = list(parametric_layers(network))
    apply_policy_(network, Policy.uniform(names, LayerPrecision(4, 4, "lsq")), batches[0])
    plain = copy.deepcopy(network)
    reestimate_batch_norm_(plain, batches)
    with fused_norms(network):
        reestimate_batch_norm_(network, batches)
    for one, two in zip(network.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
