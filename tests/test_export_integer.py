"""The integer graph: onnxruntime's 32-bit sums are ours exactly, and its classes the network's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_, quantized_layers
from adq_search.errors import StorageError
from adq_search.export import int8_banks, write_integer_onnx
from adq_search.integer import snap_codebooks_, weight_words
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers._clipped import ClippedPowerWeight
from tests.test_export_package import INPUTS, SCHEMES, trained

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SUMS = {"ConvInteger", "MatMulInteger"}


def run_with_sums(file, inputs):
    """Return the outputs, and the int32 sums by layer, one tensor a bank."""
    model = onnx.load(file)
    names = [node.output[0] for node in model.graph.node if node.op_type in SUMS]
    for name in names:
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None)
        model.graph.output.append(info)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    found, *sums = session.run(["output", *names], {"input": inputs.numpy()})
    by_layer: dict[str, list[torch.Tensor]] = {}
    for name, values in zip(names, sums):
        by_layer.setdefault(name.partition("/")[0], []).append(torch.from_numpy(values))
    return torch.from_numpy(found), by_layer


def slow_sums(layer, codes, bank):
    """Sums in int64, by torch's integer convolution."""
    if isinstance(layer, nn.Linear):
        return codes @ bank.T
    function = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return function(codes, bank, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def assert_banks_are_the_words(layer, banks):
    """Every bank holds 8-bit integers, and together they are the layer's integer words."""
    words = weight_words(layer.weight_quantizer, layer.weight)
    assert all(-128 <= int(bank.min()) <= int(bank.max()) <= 127 for bank, _ in banks)
    whole = sum(c * bank.double() for bank, c in banks)
    held = sum(c * bank.double() for bank, c in zip(words.banks, words.constants, strict=True))
    torch.testing.assert_close(whole, held, rtol=0, atol=0)
    if isinstance(layer.weight_quantizer, ClippedPowerWeight):
        n_used = sum((bank != 0).int() for bank, _ in banks)
        snapped = layer.weight_quantizer.options.get("sqrt_half", "exact") != "exact"
        assert int(n_used.max()) == 1 or (snapped and layer.weight_quantizer.bits > 4)


def check(model, file, inputs):
    seen = {}
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        expected = model(inputs)
    found, sums = run_with_sums(file, inputs)
    for name, layer in quantized_layers(model).items():
        codes = layer.input_quantizer.codes(seen[name])
        banks = int8_banks(layer)
        for (bank, _), found_sums in zip(banks, sums[name], strict=True):
            assert found_sums.dtype == torch.int32
            exact = slow_sums(layer, codes, bank)
            torch.testing.assert_close(found_sums.long(), exact, rtol=0, atol=0)
        assert_banks_are_the_words(layer, banks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found.argmax(1) == expected.argmax(1)).all()
    return sums


#: Banks of 8-bit words in a layer of each scheme.
BANKS = {
    **dict.fromkeys(("lsq", "asq", "adq", "adq+lsq"), 1),
    **dict.fromkeys(("post", "asq_post", "post+n2uq"), 2),
    "pot": 1,
    "root+lsq": 3,
}
QUICK = ("asq_post", "adq", "pot")


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in SCHEMES]
)
def test_sums_of_every_scheme_are_exact(scheme, tmp_path):
    model, _, _ = trained(SCHEMES[scheme])
    snap_codebooks_(model)
    write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    sums = check(model, tmp_path / "model.onnx", INPUTS)
    n_banks = {len(banks) for name, banks in sums.items() if name != "0"}
    assert n_banks == {BANKS[scheme]}


@pytest.mark.parametrize("root", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_root_has_a_bank_for_each_remainder(root, tmp_path):
    model, _, _ = trained(LayerPrecision(5, 6, "root+lsq"), {"root": {"root": root}})
    write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    sums = check(model, tmp_path / "model.onnx", INPUTS)
    assert {len(banks) for name, banks in sums.items() if name != "0"} == {root}


@pytest.mark.parametrize("snapped", ["45/64", pytest.param("181/256", marks=pytest.mark.slow)])
def test_a_snapped_root_of_one_half_has_two_banks_of_powers(snapped, tmp_path):
    """Words are 64 2^j and 45 2^j: their factor goes to the banks' constants."""
    model, _, _ = trained(SCHEMES["post"], {"post": {"sqrt_half": snapped}})
    write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    sums = check(model, tmp_path / "model.onnx", INPUTS)
    assert {len(banks) for name, banks in sums.items() if name != "0"} == {2}
    odd, even = (int(part) for part in snapped.split("/"))
    layer = quantized_layers(model)["6"]
    (even_bank, even_factor), (odd_bank, odd_factor) = int8_banks(layer)
    assert (even_factor, odd_factor) == (even, odd)
    for bank in (even_bank, odd_bank):
        assert set(bank.abs().unique().tolist()) <= {0, 1, 2, 4, 8}


@pytest.mark.parametrize(
    ("weight_bits", "n_banks"), [(5, {2, 3}), pytest.param(6, {2, 3, 4, 5}, marks=pytest.mark.slow)]
)
def test_words_beyond_eight_bits_take_a_bank_for_each_seven(weight_bits, n_banks, tmp_path):
    model, _, _ = trained(LayerPrecision(weight_bits, 4, "pot"))
    write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    sums = check(model, tmp_path / "model.onnx", INPUTS)
    found = {len(banks) for name, banks in sums.items() if name != "0"}
    assert found <= n_banks
    assert max(found) > 1


def test_signals_vectors_and_negative_inputs(tmp_path):
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv1d(9, 6, 3, padding=2, stride=2, dilation=1, groups=3),
        nn.Flatten(),
        nn.Linear(30, 4),
    )
    inputs = torch.randn(5, 9, 8)
    policy = Policy.of(dict.fromkeys(("0", "2"), LayerPrecision(4, 8, "post")))
    apply_policy_(network, policy, inputs)
    write_integer_onnx(tmp_path / "model.onnx", network.eval(), inputs)
    check(network, tmp_path / "model.onnx", inputs)


def test_sums_beyond_32_bits_are_refused_with_the_layer(tmp_path):
    network = nn.Sequential(nn.Linear(70000, 1, bias=False))
    inputs = torch.rand(2, 70000)
    apply_policy_(network, Policy.of({"0": LayerPrecision(8, 8, "lsq")}), inputs)
    with torch.no_grad():  # every weight has the largest code, 127
        network[0].weight.fill_(1.0)
        network[0].weight_quantizer.step.fill_(1 / 127)
    with pytest.raises(StorageError, match=r"sums of layer '0' may reach \d{10}.*--format"):
        write_integer_onnx(tmp_path / "model.onnx", network.eval(), inputs)
    assert not (tmp_path / "model.onnx").exists()


def test_padding_that_is_not_with_zeros_is_refused(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"))
    apply_policy_(network, Policy.of({"0": LayerPrecision(4, 4, "lsq")}), INPUTS)
    with pytest.raises(StorageError, match="padding_mode 'reflect'"):
        write_integer_onnx(tmp_path / "model.onnx", network.eval(), INPUTS[:2])
