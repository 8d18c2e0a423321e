"""The integer graph: onnxruntime's 32-bit sums are ours exactly, and its classes the network's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_, quantized_layers
from adq_search.errors import StorageError
from adq_search.export import write_integer_onnx
from adq_search.integer import snap_codebooks_, weight_words
from adq_search.policy import LayerPrecision, Policy
from tests.test_export_package import INPUTS, OPTIONS, SCHEMES, trained

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


def check(model, file, inputs):
    seen = {}
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        expected = model(inputs)
    found, sums = run_with_sums(file, inputs)
    for name, layer in quantized_layers(model).items():
        codes = layer.input_quantizer.codes(seen[name])
        words = weight_words(layer.weight_quantizer, layer.weight)
        for bank, found_sums in zip(words.banks, sums[name], strict=True):
            assert found_sums.dtype == torch.int32
            exact = slow_sums(layer, codes, bank)
            torch.testing.assert_close(found_sums.long(), exact, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found.argmax(1) == expected.argmax(1)).all()
    return sums


FITTING = {name: p for name, p in SCHEMES.items() if name != "root+lsq"}
QUICK = ("asq_post", "adq", "pot")


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in FITTING]
)
def test_sums_of_every_scheme_are_exact(scheme, tmp_path):
    model, _, _ = trained(FITTING[scheme])
    snap_codebooks_(model)
    write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    sums = check(model, tmp_path / "model.onnx", INPUTS)
    n_banks = {len(banks) for name, banks in sums.items() if name != "0"}
    assert n_banks == ({2} if "post" in scheme else {1})


@pytest.mark.parametrize("root", [3, 4])
def test_a_root_has_a_bank_for_each_remainder(root, tmp_path):
    model, _, _ = trained(LayerPrecision(5, 6, "root+lsq"), {"root": {"root": root}})
    write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    sums = check(model, tmp_path / "model.onnx", INPUTS)
    assert {len(banks) for name, banks in sums.items() if name != "0"} == {root}


@pytest.mark.slow
def test_a_snapped_root_of_one_half_needs_one_bank_of_more_bits(tmp_path):
    model, _, _ = trained(*((SCHEMES["post"], OPTIONS["snapped"][1])))
    with pytest.raises(StorageError, match="'post' at 4 bits. are integers up to"):
        write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])


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


def test_words_beyond_eight_bits_are_refused_with_the_layer(tmp_path):
    model, _, _ = trained(LayerPrecision(5, 4, "pot"))
    with pytest.raises(StorageError, match=r"layer '3' .'pot' at 5 bits. are integers up to \d+"):
        write_integer_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    assert not (tmp_path / "model.onnx").exists()


def test_padding_that_is_not_with_zeros_is_refused(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"))
    apply_policy_(network, Policy.of({"0": LayerPrecision(4, 4, "lsq")}), INPUTS)
    with pytest.raises(StorageError, match="padding_mode 'reflect'"):
        write_integer_onnx(tmp_path / "model.onnx", network.eval(), INPUTS[:2])
