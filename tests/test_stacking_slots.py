"""Quantizers of many networks in one pass of C++, against each network's own quantizer."""

import pytest
import torch

from adq_search.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS, AsqInput
from adq_search.stacking._native import LIBRARY
from adq_search.stacking._quantizers import stack_input_quantizers, stack_weight_quantizers
from tests.test_native import needs_compiler

pytestmark = needs_compiler

WEIGHTS = {
    "lsq": {},
    "pot": {},
    "post": {"sqrt_half": "45/64"},
    "root": {"root": 4},
    "adq": {"ema_momentum": 0.9},
    "lsq of a tensor": {"granularity": "tensor"},
}
#: N, C and pixels; one sample of the last has more values than a block of the C++.
SHAPES = [(5, 3, 2, 2), (7, 8, 9, 5), (3, 9, 25, 20), (6, 16), (4, 8, 11)]


def weights_of(kinds, shape):
    """A quantizer a slot, None for "float", fitted to weights of its own."""
    weights, quantizers = torch.randn(len(kinds), *shape), []
    for i, (kind, own) in enumerate(zip(kinds, weights)):
        if kind == "float":
            quantizers.append(None)
            continue
        make = WEIGHT_QUANTIZERS[kind.split()[0]]
        quantizers.append(make(2 + (3 * i) % 7, shape, **WEIGHTS[kind]))
        quantizers[-1].initialize_(own)
    return weights.flatten(0, 1), quantizers


def inputs_of(kinds, shape):
    values, quantizers = 2 * torch.randn(len(kinds), *shape), []
    for i, (kind, own) in enumerate(zip(kinds, values)):
        if kind == "float":
            quantizers.append(None)
            continue
        if i % 2:
            own.relu_()
        dim = {4: -3, 3: -2, 2: -1}[len(shape)]
        make = INPUT_QUANTIZERS[kind]
        quantizers.append(make(2 + (5 * i) % 7, n_channels=shape[1], channel_dim=dim))
        quantizers[-1].initialize_(own)
        with torch.no_grad():
            for parameter in quantizers[-1].parameters():
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return values.transpose(0, 1).flatten(1, 2), quantizers


def apart(quantizers, values, upstream, dim):
    outs, gradients = [], []
    pieces = zip(values.chunk(len(quantizers), dim), upstream.chunk(len(quantizers), dim))
    for quantizer, (piece, own) in zip(quantizers, pieces):
        own_values = piece.contiguous().requires_grad_()
        out = own_values if quantizer is None else quantizer(own_values)
        (gradient,) = torch.autograd.grad(out, own_values, own.contiguous(), retain_graph=True)
        if quantizer is not None and list(quantizer.parameters()):
            trained = list(quantizer.parameters())
            for parameter, found in zip(
                trained, torch.autograd.grad(out, trained, own.contiguous())
            ):
                parameter.grad = found
        outs.append(out.detach())
        gradients.append(gradient)
    return torch.cat(outs, dim), torch.cat(gradients, dim)


def together(stack, values, upstream):
    values = values.clone().requires_grad_()
    out = stack(values)
    (gradient,) = torch.autograd.grad(out, values, upstream, retain_graph=True)
    trained = list(stack.groups.parameters())
    found = torch.autograd.grad(out, trained, upstream) if trained else ()
    with torch.no_grad():  # what is written back are the gradients, in the parameters' place
        for parameter, own in zip(trained, found):
            parameter.copy_(own)
    return out.detach(), gradient


def assert_together_is_apart(quantizers, make_stack, values, dim, dtype=torch.float32):
    torch.manual_seed(1)
    values = values.to(dtype)
    upstream = torch.randn_like(values)
    stack = make_stack(quantizers)
    assert LIBRARY.takes(values, *stack.parameters())
    found_out, found_gradient = together(stack, values, upstream)
    wanted_out, wanted_gradient = apart(quantizers, values, upstream, dim)
    for kind, found, wanted in zip(
        quantizers, found_out.chunk(len(quantizers), dim), wanted_out.chunk(len(quantizers), dim)
    ):
        if isinstance(kind, AsqInput):  # channel means are summed in another order
            differs = ~torch.isclose(found, wanted, rtol=1e-5, atol=1e-6)
            assert float(differs.float().mean()) < 1e-3
        else:
            assert torch.equal(found, wanted)
    # In bfloat16 the two ways that ASQ's gradients take are rounded in another order.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found_gradient, wanted_gradient, **close)
    codebooks = [getattr(quantizer, "codebook", torch.zeros(0)).clone() for quantizer in quantizers]
    gradients = [[p.grad for p in q.parameters()] if q else [] for q in quantizers]
    is_alone = [str(slot) in stack.alone for slot in range(len(quantizers))]
    stack.unstack_()
    for slot, quantizer in enumerate(quantizers):
        if quantizer is None or is_alone[slot]:
            continue
        for (name, found), wanted in zip(quantizer.named_parameters(), gradients[slot]):
            close = 1e-4 * float(wanted.abs().max()) + 1e-5
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=close, msg=name)
        if codebooks[slot].numel():
            torch.testing.assert_close(quantizer.codebook, codebooks[slot])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (3, 7), (2, 3000, 3), (5, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("shift", range(3))
def test_weights_of_all_kinds_together_are_each_quantized_as_alone(shape, shift):
    kinds = [*WEIGHTS, "float", "lsq", "adq", "post", "post"]
    kinds = kinds[shift:] + kinds[:shift]
    weights, quantizers = weights_of(kinds, shape)
    assert_together_is_apart(quantizers, stack_weight_quantizers, weights, dim=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kinds",
    [
        ["lsq", "asq", "n2uq", "float", "n2uq", "asq", "lsq"],
        ["n2uq", "n2uq", "n2uq"],
        ["asq", "float"],
        ["lsq"],
    ],
    ids="+".join,
)
def test_inputs_of_all_kinds_together_are_each_quantized_as_alone(kinds, shape, dtype):
    values, quantizers = inputs_of(kinds, shape)
    assert_together_is_apart(quantizers, stack_input_quantizers, values, dim=1, dtype=dtype)


def test_sums_do_not_depend_on_threads():
    values, quantizers = inputs_of(["n2uq", "lsq", "asq", "float"], (16, 16, 16, 16))
    upstream = torch.randn_like(values)
    found = []
    n_threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        stack = stack_input_quantizers(quantizers)
        # The adapters' products are torch's own, and may depend on threads.
        out, gradient = together(stack, values, upstream)
        steps = [p.detach() for name, p in stack.named_parameters() if "adapters" not in name]
        found.append([out, gradient, *steps])
    torch.set_num_threads(n_threads)
    assert all(torch.equal(one, two) for one, two in zip(*found))


def test_a_value_that_is_no_number_stays_one_and_spoils_only_its_slot():
    values, quantizers = inputs_of(["n2uq", "lsq", "n2uq"], (4, 3, 5, 5))
    stack = stack_input_quantizers(quantizers)
    wanted, _ = together(stack_input_quantizers(quantizers), values, torch.ones_like(values))
    values[1, 4, 2, 2] = torch.nan
    out, gradient = together(stack, values, torch.ones_like(values))
    assert out[1, 4, 2, 2].isnan()
    assert int(out.isnan().sum()) == 1
    own = slice(3, 6)
    others = [channel for channel in range(9) if channel not in range(own.start, own.stop)]
    assert torch.equal(out[:, others], wanted[:, others])
    assert bool(gradient[:, others].isfinite().all())


def test_a_level_beside_the_middle_that_is_zero_moves_as_alone():
    weights, quantizers = weights_of(["adq", "adq", "adq"], (4, 3, 3, 3))
    for quantizer in quantizers:
        middle = len(quantizer.codebook) // 2
        quantizer.codebook[middle - 1] = 0.0
    before = quantizers[0].codebook.clone()
    assert_together_is_apart(quantizers, stack_weight_quantizers, weights, dim=0)
    middle = len(before) // 2
    assert float(quantizers[0].codebook[middle]) == 0.0
    assert float(quantizers[0].codebook[middle - 1]) < 0.0


def test_a_quantizer_of_somebody_else_runs_alone():
    class Mine(WEIGHT_QUANTIZERS["lsq"]):
        def _quantize(self, values):
            return values * 2

    weights, quantizers = weights_of(["lsq", "float", "adq"], (4, 3, 3, 3))
    quantizers[1] = Mine(4, (4, 3, 3, 3))
    quantizers[1].initialize_(weights[4:8])
    out = stack_weight_quantizers(quantizers)(weights)
    assert torch.equal(out[4:8], weights[4:8] * 2)
    assert torch.equal(out[:4], quantizers[0](weights[:4]))
