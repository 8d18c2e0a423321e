"""Functions written down as names: their nodes in C++ and in Python do the same."""

import functools

import pytest
import torch

from adq_search import native_function
from adq_search.errors import AdqSearchWarning, QuantizerError
from adq_search.native_function import GRAPH, NativeFunction
from adq_search.norms import _passes
from adq_search.quantizers import AsqInput, N2uqInput, _native, _native_functions
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._thresholds import MIN_WIDTH
from tests.test_native import needs_compiler

EACH = {
    f"{module.__name__.rpartition('.')[2]} {name}": function
    for module in (_native_functions, _passes)
    for name, function in vars(module).items()
    if isinstance(function, NativeFunction)
}


def images(channels=4):
    torch.manual_seed(0)
    values = torch.randn(6, channels, 5, 7).to(memory_format=torch.channels_last)
    return values.requires_grad_()


def adaptive(call, *, n_channels):
    values = images(n_channels)
    quantizer = AsqInput(4, n_channels=n_channels, channel_dim=-3)
    quantizer.initialize_(values.detach())
    tensors = quantizer.tensors()
    out, _ = call((values, *tensors), quantizer.numbers(values))
    return [out], [values, *tensors]


def rectified(call):
    values = images(8)
    quantizer = AsqInput(3, n_channels=8, channel_dim=-3)
    quantizer.initialize_(values.detach().relu())
    tensors = quantizer.tensors()
    y, out, _ = call((values, *tensors), (0.0, torch.inf, *quantizer.numbers(values)))
    return [y, out], [values, *tensors]


def thresholds(call):
    values = images()
    quantizer = N2uqInput(3, n_channels=4, channel_dim=-3)
    quantizer.initialize_(values.detach())
    trained = quantizer.trained()
    numbers = _native_functions.interval_numbers(trained[1], MIN_WIDTH, EPS)
    out, index = call((values, quantizer.qmin, *trained), (*numbers, values.numel(), 1))
    assert not index.requires_grad
    return [out], [values, *trained]


def uniform(call):
    values = images()
    raw = torch.tensor([0.3, -0.2, 0.4, 0.3, 0.2, 0.1], requires_grad=True)
    grid = (torch.tensor(-4.0), torch.tensor(3.0))
    (out,) = call((values, raw, *grid), (True, 1e-8, False, 0.5, 6, 140, 1))
    return [out], [values, raw]


def codebook(call):
    values, levels = images(), torch.linspace(-1, 1, 7)
    (out,) = call((values, levels, torch.tensor(0.9)), (7, 14, values.numel(), 1))
    return [out, levels], [values]


CASES = {
    "ADAPTIVE": functools.partial(adaptive, n_channels=8),
    "ADAPTIVE, no hidden layer": functools.partial(adaptive, n_channels=4),
    "RECTIFIED_ADAPTIVE": rectified,
    "THRESHOLDS": thresholds,
    "UNIFORM": uniform,
    "CODEBOOK": codebook,
    "FOLLOWING_CODEBOOK": codebook,
}


def run(case, monkeypatch, *, in_cpp, given=None):
    """Return outputs and gradients."""
    function = getattr(_native_functions, case.partition(",")[0])
    monkeypatch.setitem(GRAPH.__dict__, "is_there", in_cpp)
    outs, tensors = CASES[case](function)
    nodes = {type(out.grad_fn).__name__ for out in outs if out.requires_grad}
    assert ("_InterpretedBackward" in nodes) is not in_cpp
    torch.manual_seed(1)
    flowing = [o for o in outs if o.requires_grad]
    upstream = given or [torch.randn(o.shape) for o in flowing]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = torch.autograd.grad(flowing, wanted, upstream)
    return [*(o.detach() for o in outs), *found]


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_nodes_of_both_kinds_do_the_same(case, monkeypatch):
    assert GRAPH.is_there
    ours, wanted = (run(case, monkeypatch, in_cpp=in_cpp) for in_cpp in (True, False))
    assert len(ours) > 1
    for own, expected in zip(ours, wanted, strict=True):
        assert torch.equal(own, expected)


@needs_compiler
@pytest.mark.parametrize("in_cpp", [True, False])
def test_an_output_that_nobody_reads_has_no_gradient_to_give(in_cpp, monkeypatch):
    monkeypatch.setitem(GRAPH.__dict__, "is_there", in_cpp)
    (y, out), (values, *_) = rectified(_native_functions.RECTIFIED_ADAPTIVE)
    alone = torch.autograd.grad(y.sum(), values, retain_graph=True)[0]
    assert torch.equal(alone, (values > 0).float())
    assert torch.autograd.grad(out.sum(), values)[0].abs().sum() > 0


@needs_compiler
@pytest.mark.parametrize("in_cpp", [True, False])
def test_gradients_in_another_layout_are_taken(in_cpp, monkeypatch):
    packed = torch.randn(6, 4, 5, 7)
    plain = run("UNIFORM", monkeypatch, in_cpp=in_cpp, given=[packed])
    lying = packed.to(memory_format=torch.channels_last)
    for own, expected in zip(
        run("UNIFORM", monkeypatch, in_cpp=in_cpp, given=[lying]), plain, strict=True
    ):
        assert torch.equal(own, expected)


@needs_compiler
@pytest.mark.parametrize("in_cpp", [True, False])
def test_second_derivatives_are_refused(in_cpp, monkeypatch):
    monkeypatch.setitem(GRAPH.__dict__, "is_there", in_cpp)
    (out,), (values, *_) = uniform(_native_functions.UNIFORM)
    (gradient,) = torch.autograd.grad((out**2).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives|once_differentiable"):
        gradient.sum().backward()


@needs_compiler
@pytest.mark.parametrize("in_cpp", [True, False])
def test_values_changed_after_the_forward_pass_are_noticed(in_cpp, monkeypatch):
    monkeypatch.setitem(GRAPH.__dict__, "is_there", in_cpp)
    (out,), (_, raw) = uniform(_native_functions.UNIFORM)
    with torch.no_grad():
        raw.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_compiler
@pytest.mark.parametrize("name", EACH)
def test_every_call_names_as_many_arguments_as_its_function_takes(name):
    function = EACH[name]
    for call, *names in (*function.forward, *function.backward):
        assert len(function.arguments(call, names)) == len(names) + 1
        assert function.library(call).address(call) > 0


@pytest.mark.parametrize("name", [name for name in EACH if "RECTIFIED" in name])
def test_what_was_clipped_is_kept_and_not_what_came_in(name):
    places = EACH[name].tensors
    assert places["y"] in EACH[name].kept
    assert not {places["values"], places["out"]} & set(EACH[name].kept)


def test_a_call_that_lacks_an_argument_is_refused():
    short = NativeFunction(
        _native.LIBRARY,
        inputs="weights codebook",
        numbers="n_levels",
        rooms={"out": "like weights"},
        outputs="out",
        forward=["codebook weights codebook n_levels out"],
    )
    with pytest.raises(ValueError, match="shorter"):
        short.arguments("codebook", short.forward[0][1:])


@pytest.mark.parametrize(("mode", "is_error"), [("auto", False), ("native", True)])
def test_without_a_compiler_nodes_are_pythons(mode, is_error, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", mode)
    fresh = native_function._Graph()
    if is_error:
        with pytest.raises(QuantizerError, match="no-such-compiler"):
            _ = fresh.is_there
    else:
        with pytest.warns(AdqSearchWarning, match="Install a C\\+\\+ compiler"):
            assert not fresh.is_there
