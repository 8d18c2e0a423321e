"""Compiled and plain quantizers are the same, and no policy compiles anything new."""

import os
import random
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from adq_search.convert import apply_policy_, restore_
from adq_search.errors import AdqSearchWarning, QuantizerError
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import (
    AdqWeight,
    AsqInput,
    LsqInput,
    LsqWeight,
    N2uqInput,
    PostWeight,
    PotWeight,
    RootWeight,
    _again,
)
from adq_search.quantizers._compile import Kernel, compiles
from adq_search.quantizers._intervals import interval_entry, interval_sums, padded, rank

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler"
)
SHAPE = (6, 9, 5, 7)
QUANTIZERS = {
    "lsq input": lambda bits, shape=SHAPE: LsqInput(bits, n_channels=9, channel_dim=-3),
    "asq": lambda bits, shape=SHAPE: AsqInput(bits, n_channels=9, channel_dim=-3),
    "n2uq": lambda bits, shape=SHAPE: N2uqInput(bits, n_channels=9, channel_dim=-3),
    "lsq weight": lambda bits, shape=SHAPE: LsqWeight(bits, shape),
    "lsq weight by tensor": lambda bits, shape=SHAPE: LsqWeight(bits, shape, granularity="tensor"),
    "pot": lambda bits, shape=SHAPE: PotWeight(bits, shape),
    "post": lambda bits, shape=SHAPE: PostWeight(bits, shape),
    "post eq17": lambda bits, shape=SHAPE: PostWeight(bits, shape, levels="eq17"),
    "root": lambda bits, shape=SHAPE: RootWeight(bits, shape),
    "adq": lambda bits, shape=SHAPE: AdqWeight(bits, shape, ema_momentum=0.9),
}


def compiled_graphs():
    return counters["stats"]["unique_graphs"]


def run(quantizer, values, upstream):
    """Output, and everything that a training step moves."""
    values = values.detach().requires_grad_()
    out = quantizer(values)
    out.backward(upstream)
    gradients = [values.grad, *(p.grad for p in quantizer.parameters())]
    return out.detach(), gradients, list(quantizer.buffers())


@needs_compiler
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["native", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_form_is_equal_to_plain_tensor_operations(
    form, name, bits, layout, dtype, monkeypatch
):
    torch.manual_seed(bits)
    sample = torch.randn(SHAPE).to(dtype).to(memory_format=layout)
    sample[0, 0, 0, :3] = torch.tensor([0.0, 50.0, -50.0])
    upstream = torch.randn(SHAPE)
    results = []
    for mode in ("off", form):
        monkeypatch.setenv("ADQ_SEARCH_COMPILE", mode)
        torch.manual_seed(bits)
        quantizer = QUANTIZERS[name](bits)
        quantizer.initialize_(sample / 2)
        results.append(run(quantizer, sample, upstream))
    (plain, plain_grads, plain_buffers), (fast, fast_grads, fast_buffers) = results
    assert torch.equal(fast, plain)
    assert fast.stride() == plain.stride()
    for found, expected in zip(fast_grads, plain_grads):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max())
    for found, expected in zip(fast_buffers, plain_buffers):
        torch.testing.assert_close(found, expected)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def step(policy, batch):
    network = small_network()
    apply_policy_(network, policy, batch)
    network(batch).square().sum().backward()
    return restore_(network)


@pytest.mark.slow
@needs_compiler
def test_no_policy_compiles_anything_after_the_first_of_each_scheme(monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "inductor")
    names = ("0", "2", "6")
    schemes = ["lsq", "asq", "post", "pot", "asq_post", "root+lsq", "adq", "adq+lsq"]
    batch = torch.randn(5, 3, 12, 12)

    def precision(scheme, weight_bits, input_bits, momentum):
        needs_momentum = scheme.startswith("adq")
        return LayerPrecision(
            weight_bits, input_bits, scheme, ema_momentum=momentum if needs_momentum else None
        )

    for scheme in schemes:
        step(Policy.uniform(names, precision(scheme, 4, 4, 0.9)), batch)
    before = compiled_graphs()
    dice = random.Random(0)
    for _ in range(20):
        layers = {
            name: precision(
                dice.choice(schemes), dice.randint(2, 8), dice.randint(2, 8), dice.random()
            )
            for name in names
        }
        step(Policy.of(layers), batch)
    assert before > 0
    assert compiled_graphs() == before


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["lsq", "asq_post", "adq"])
def test_a_quantized_network_can_be_compiled_as_a_whole(scheme):
    precision = LayerPrecision(4, 4, scheme, ema_momentum=0.9 if scheme == "adq" else None)
    batch = torch.randn(5, 3, 12, 12)
    results = []
    for backend in (None, "aot_eager"):
        network = small_network()
        apply_policy_(network, Policy.uniform(("0", "2", "6"), precision), batch)
        call = network if backend is None else torch.compile(network, backend=backend)
        out = call(batch)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in network.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_every_shape_of_tensor_runs_the_same_code(monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "inductor")

    def pass_over(*shape):
        for scheme in (LsqInput, AsqInput, N2uqInput):
            quantizer = scheme(4, n_channels=shape[1], channel_dim=1 - len(shape))
            values = torch.randn(shape).relu()
            quantizer.initialize_(values)
            run(quantizer, values, torch.ones(shape))

    pass_over(4, 6, 10, 3)
    before = compiled_graphs()
    for shape in [(16, 3, 8, 8), (7, 16, 16), (256, 64), (33, 5, 2, 9), (16, 16, 4, 4), (2, 256)]:
        pass_over(*shape)
    assert compiled_graphs() == before


@needs_compiler
def test_sums_do_not_depend_on_the_shape_that_came_first(monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "inductor")

    def gradients_after(*first):
        kernel = Kernel(lambda rows, scale: (rows * scale).sum(dim=1))
        kernel(torch.ones(first), torch.ones(first[0], 1))
        values = torch.randn(32, 999, generator=torch.Generator().manual_seed(0))
        return kernel(values, torch.ones(32, 1))

    assert torch.equal(gradients_after(2, 5), gradients_after(64, 4000))


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("auto", "cpu", False),
        ("auto", "meta", True),
        ("native", "cpu", False),
        ("inductor", "cpu", True),
        ("off", "meta", False),
    ],
)
def test_inductor_is_for_gpus_unless_asked_for(mode, device, expected, monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", mode)
    assert compiles(torch.zeros(2, device=device)) == expected


def test_the_default_job_starts_no_compiler(monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "auto")
    before = compiled_graphs()
    for scheme in ("asq_post", "adq"):
        momentum = 0.9 if scheme == "adq" else None
        precision = LayerPrecision(4, 4, scheme, ema_momentum=momentum)
        step(Policy.uniform(("0", "2", "6"), precision), torch.randn(64, 3, 8, 8))
    assert compiled_graphs() == before


def cannot_be_compiled(rows):
    torch._dynamo.graph_break()
    return rows + 1


def test_where_compiling_fails_the_plain_function_runs_and_says_so_once(monkeypatch, recwarn):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "auto")
    kernel = Kernel(cannot_be_compiled)
    with pytest.warns(
        AdqSearchWarning, match="in `cannot_be_compiled`. Install a C\\+\\+ compiler"
    ):
        assert kernel(torch.zeros(2, 3)).sum() == 6
    n_warnings = len(recwarn)
    assert kernel(torch.zeros(4, 3)).sum() == 12
    assert len(recwarn) == n_warnings


def test_asked_for_compiling_that_fails_is_an_error(monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "inductor")
    with pytest.raises(Exception, match="graph_break"):
        Kernel(cannot_be_compiled)(torch.zeros(2, 3))


def test_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "yes")
    with pytest.raises(QuantizerError, match="one of auto, native, inductor, off, not 'yes'"):
        compiles(torch.zeros(2))


@needs_compiler
@pytest.mark.parametrize("name", QUANTIZERS)
def test_sums_do_not_depend_on_the_number_of_threads(name, monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "native")
    shape = (32, 9, 16, 16)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = []
    threads = torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name](4, shape)
        quantizer.initialize_(values)
        out, gradients, buffers = run(quantizer, values, values.cos())
        found.append([out, *gradients, *buffers])
    torch.set_num_threads(threads)
    # What torch itself sums, over samples and by the adapter, may.
    exact = not name.startswith("asq")
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0.0 if exact else 1e-6, atol=0.0)


def slow_intervals(values, weights, knots, entries):
    """Loops over Python floats: rank, entry, and sums by interval."""
    n = len(knots)
    ranks, chosen, sums, distances = [], [], [0.0] * n, [0.0] * n
    for x, w in zip(values, weights):
        below = sum(x > knot for knot in knots)
        ranks.append(float(below))
        chosen.append(entries[below - 1] if below else 0.0)
        if below:
            sums[below - 1] += w
            distances[below - 1] += w * (x - knots[below - 1])
    return ranks, chosen, sums, distances


@pytest.mark.parametrize("mode", ["off", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("n_knots", [3, 16, 255])
def test_intervals_agree_with_loops(mode, n_knots):
    generator = torch.Generator().manual_seed(n_knots)
    knots = torch.rand(n_knots, generator=generator, dtype=torch.float64).cumsum(0) / n_knots
    values = torch.randn(8, 60, generator=generator, dtype=torch.float64)
    values[0, :3] = knots[:3]
    weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    entries = torch.randn(n_knots, generator=generator, dtype=torch.float64)
    expected = slow_intervals(*(t.flatten().tolist() for t in (values, weights, knots, entries)))
    tables = padded(knots), padded(entries, 0.0)
    at_least = (torch.bucketize(values, knots) - values.lt(0).int()).clamp(min=0).to(torch.uint8)
    compiled = mode == "inductor"
    found = (
        INTERVALS["rank"](values, tables[0], compiled=compiled),
        INTERVALS["entry"](values, *tables, at_least, compiled=compiled),
        *INTERVALS["sums"](values, weights, tables[0], at_least, compiled=compiled),
    )
    n_inner = n_knots - 1
    for got, wanted, n in zip(found, expected, (480, 480, n_knots, n_inner)):
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(got.flatten()[:n], wanted[:n], rtol=1e-9, atol=1e-11)


INTERVALS = {
    "rank": Kernel(rank),
    "entry": Kernel(interval_entry),
    "sums": Kernel(interval_sums),
}


@pytest.mark.parametrize("scheme", ["lsq", "asq", "lsq+n2uq"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_quantized_inputs_are_made_again_and_not_kept(scheme, layout, monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    monkeypatch.setattr(_again, "KEPT_BELOW", 0)
    monkeypatch.setattr(_again, "KEPT_WITH_INDEX_BELOW", 0)
    batch = torch.randn(6, 3, 9, 9).to(memory_format=layout)
    names = ("0", "2")
    apply_policy_(network, Policy.uniform(names, LayerPrecision(4, 4, scheme)), batch)
    inputs = network[1](network[0](batch)).detach().requires_grad_()
    layer = network[2]

    out = layer(inputs)
    kept = out.grad_fn._saved_input, out.grad_fn._saved_input
    values = layer.input_quantizer(inputs)
    assert torch.equal(kept[0], values)
    assert kept[0].stride() == values.stride()
    assert kept[0].data_ptr() != kept[1].data_ptr()  # made anew each time it is asked for

    wanted = [inputs, *layer.parameters()]
    upstream = torch.randn(out.shape)
    found = torch.autograd.grad(out, wanted, upstream)
    plain = nn.functional.conv2d(values, layer.weight_quantizer(layer.weight), layer.bias)
    for got, expected in zip(found, torch.autograd.grad(plain, wanted, upstream), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("scheme", "n_values", "is_made_again"),
    [
        ("lsq", _again.KEPT_BELOW // 2, False),
        ("lsq", _again.KEPT_BELOW, True),
        ("lsq+n2uq", _again.KEPT_WITH_INDEX_BELOW // 2, False),
        ("lsq+n2uq", _again.KEPT_WITH_INDEX_BELOW, True),
    ],
)
def test_small_quantized_inputs_are_kept(scheme, n_values, is_made_again):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 1, 1))
    batch = torch.rand(2, 2, n_values // 256, 64)
    apply_policy_(network, Policy.uniform(("0",), LayerPrecision(4, 4, scheme)), batch)
    node = network(batch.requires_grad_()).grad_fn
    assert (node._saved_input.data_ptr() != node._saved_input.data_ptr()) is is_made_again


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_training_step_never_waits_for_the_gpu(name):
    quantizer = QUANTIZERS[name](4).cuda()
    sample = torch.randn(SHAPE, device="cuda")
    quantizer.initialize_(sample)
    upstream = torch.randn(SHAPE, device="cuda")
    run(quantizer, sample, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(quantizer, sample, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
