"""ONNX and QONNX: what onnxruntime and qonnx compute is what the quantized network computes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from adq_search.convert import apply_policy_, quantized_layers
from adq_search.errors import MissingExtraError, StorageError
from adq_search.export import (
    compare,
    graph_form,
    onnxruntime_form,
    qonnx_form,
    run_onnx,
    write_integer_onnx,
    write_onnx,
    write_qonnx,
)
from adq_search.policy import LayerPrecision, Policy
from adq_search.tasks.networks import small_resnet
from tests.test_export_package import INPUTS, SCHEMES, trained

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

#: Inputs of a sample in each quantized layer of `network`.
SIZES = {"0": 3 * 8 * 8, "3": 8 * 8 * 8, "6": 8 * 8 * 8, "10": 9 * 3 * 3}


def session(file, *, optimized=False):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def expected(model, inputs=INPUTS):
    with torch.no_grad():
        return model(inputs)


def assert_same_network(found, model, inputs=INPUTS):
    """Equal up to the order of float sums; another code anywhere would differ by a whole step."""
    reference = expected(model, inputs)
    torch.testing.assert_close(torch.from_numpy(found), reference, rtol=1e-5, atol=1e-5)
    assert (torch.from_numpy(found).argmax(1) == reference.argmax(1)).all()


@pytest.mark.parametrize(
    ("weight_bits", "input_bits"),
    [(2, 4), (4, 4), pytest.param(4, 2, marks=pytest.mark.slow), (8, 8)],
)
def test_onnxruntime_computes_the_quantized_network(weight_bits, input_bits, tmp_path):
    model, _, _ = trained(LayerPrecision(weight_bits, input_bits, "lsq"))
    file = tmp_path / "model.onnx"
    write_onnx(file, model, INPUTS[:2])
    runner = session(file)
    assert_same_network(runner.run(None, {"input": INPUTS.numpy()})[0], model)
    assert_same_network(runner.run(None, {"input": INPUTS[:1].numpy()})[0], model, INPUTS[:1])

    # The file holds the network's codes as integers of their own bits, and no float weights.
    content = onnx.load(file)
    stored = {c.name: c for c in content.graph.initializer}
    types = onnx.TensorProto
    for name, layer in quantized_layers(model).items():
        codes = stored[f"{name}/weight/codes"]
        assert codes.data_type == types.DataType.Value(f"INT{layer.weight_quantizer.bits}")
        held = onnx.numpy_helper.to_array(codes).astype("int64").tolist()
        assert held == layer.weight_quantizer.codes(layer.weight).tolist()
        assert f"{name}.weight" not in stored
    has_2bit = 2 in (weight_bits, input_bits)
    assert [(o.domain, o.version) for o in content.opset_import] == [("", 25 if has_2bit else 21)]
    kinds = {node.op_type for node in content.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    assert "Mark" not in kinds


@pytest.mark.slow
def test_an_optimizing_runtime_agrees_but_for_single_codes(tmp_path):
    """onnxruntime fuses Q/DQ into integer kernels, which round at other places."""
    model, _, _ = trained(LayerPrecision(8, 8, "lsq"))
    write_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    (found,) = session(tmp_path / "model.onnx", optimized=True).run(None, {"input": INPUTS.numpy()})
    reference = expected(model)
    assert (torch.from_numpy(found) - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_sign_and_range_of_inputs(signed, tmp_path):
    network = (
        nn.Sequential(nn.Linear(6, 3)) if signed else nn.Sequential(nn.ReLU(), nn.Linear(6, 3))
    )
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    name = "0" if signed else "1"
    apply_policy_(network, Policy.of({name: LayerPrecision(4, 4, "lsq")}), inputs)
    write_onnx(tmp_path / "model.onnx", network.eval(), inputs)
    far = inputs * 100  # far beyond the range: saturates
    (found,) = session(tmp_path / "model.onnx").run(None, {"input": far.numpy()})
    assert_same_network(found, network, far)


@pytest.mark.slow
def test_a_residual_network_with_branches(tmp_path):
    torch.manual_seed(0)
    network = small_resnet()
    inputs = torch.rand(16, 1, 8, 8)
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    policy = Policy.uniform(names, LayerPrecision(4, 4, "lsq"), ends=LayerPrecision(8, 8, "lsq"))
    apply_policy_(network, policy, inputs)
    network.eval()
    write_onnx(tmp_path / "model.onnx", network, inputs)
    (found,) = session(tmp_path / "model.onnx").run(None, {"input": inputs.numpy()})
    assert_same_network(found, network, inputs)


@pytest.fixture
def execute_qonnx(monkeypatch):
    """Return a function that runs a file node by node, QONNX's own nodes by the package qonnx."""
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    runner = pytest.importorskip("qonnx.core.onnx_exec")
    shapes = pytest.importorskip("qonnx.transformation.infer_shapes")
    make_model = runner.qonnx_make_model

    def make_readable(graph):
        # onnx may write a newer file format than the installed onnxruntime reads.
        model = make_model(graph)
        model.ir_version = 10
        return model

    monkeypatch.setattr(runner, "qonnx_make_model", make_readable)

    def execute(file, inputs):
        model = wrapper.ModelWrapper(str(file)).transform(shapes.InferShapes())
        return runner.execute_onnx(model, {"input": inputs.numpy()})["output"]

    return execute


@pytest.mark.parametrize(
    "scheme",
    [
        *("lsq", "asq_post", "adq", "root+lsq"),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("asq", "post", "pot", "adq+lsq")),
        pytest.param("post+n2uq", marks=pytest.mark.slow),
    ],
)
def test_qonnx_computes_the_quantized_network(scheme, tmp_path, execute_qonnx):
    model, _, _ = trained(SCHEMES[scheme])
    inputs = INPUTS[:8]
    write_qonnx(tmp_path / "model.onnx", model, inputs)
    assert_same_network(execute_qonnx(tmp_path / "model.onnx", inputs), model, inputs)


@pytest.mark.parametrize("scheme", ["asq", "adq"])
def test_qonnx_takes_signals_and_vectors(scheme, tmp_path, execute_qonnx):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv1d(9, 9, 3), nn.Flatten(), nn.Linear(54, 4))
    inputs = torch.randn(5, 9, 8)
    policy = Policy.of({"0": SCHEMES[scheme], "2": SCHEMES[scheme]})
    apply_policy_(network, policy, inputs)
    network.eval()
    write_qonnx(tmp_path / "model.onnx", network, inputs)
    assert_same_network(execute_qonnx(tmp_path / "model.onnx", inputs), network, inputs)


@pytest.mark.parametrize(
    ("precision", "match"),
    [
        (LayerPrecision(3, 4, "lsq"), "the weights of layer '3' have 3"),
        (LayerPrecision(4, 6, "lsq"), "the inputs of layer '3' have 6"),
        (LayerPrecision(4, 4, "post"), "the weights of layer '3' are quantized by 'post'"),
        (LayerPrecision(4, 4, "asq"), "the inputs of layer '3' are quantized by 'asq'"),
    ],
    ids=str,
)
def test_what_plain_onnx_cannot_say_is_refused_with_the_layer(precision, match, tmp_path):
    model, _, _ = trained(precision)
    with pytest.raises(StorageError, match=f"{match}.*--format"):
        write_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    assert not (tmp_path / "model.onnx").exists()


def test_a_missing_guest_is_named_with_the_extra(tmp_path, monkeypatch):
    model, _, _ = trained(LayerPrecision(4, 4, "lsq"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"'onnxscript'.*adq-search\[onnx\]"):
        write_onnx(tmp_path / "model.onnx", model, INPUTS[:2])


def test_exporting_leaves_the_network_as_it_is(tmp_path):
    model, _, _ = trained(LayerPrecision(4, 4, "lsq"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = expected(model)
    write_onnx(tmp_path / "model.onnx", model, INPUTS[:2])
    assert torch.equal(expected(model), outputs)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_codes_are_read_inside_the_graph_layer_by_layer(tmp_path):
    model, _, _ = trained(LayerPrecision(4, 4, "lsq"))
    file = tmp_path / "model.onnx"
    write_onnx(file, model, INPUTS[:2])
    assert graph_form(file) == "onnx"
    same = compare(model, onnxruntime_form(file), INPUTS.split(16))
    assert same.is_verified
    assert same.sums == {}
    assert same.codes.samples == 40
    assert same.codes.largest_logit_error < 1e-5
    counts = {name: 40 * n for name, n in SIZES.items()}
    assert {name: layer.codes for name, layer in same.codes.layers.items()} == counts

    # Inputs half as large in the third layer only: its codes differ, those before do not.
    other = onnx.load(file)
    (scale,) = (
        c for c in other.graph.initializer if c.name.startswith("6/input_") and "scale" in c.name
    )
    doubled = 2 * onnx.numpy_helper.to_array(scale)
    scale.CopyFrom(onnx.numpy_helper.from_array(doubled, scale.name))
    onnx.save(other, file)
    changed = compare(model, onnxruntime_form(file), [INPUTS]).codes
    assert not changed.is_verified
    assert changed.layers["0"].unexplained == changed.layers["0"].downstream == 0
    assert changed.layers["6"].unexplained > 0
    assert changed.layers["10"].downstream > 0


@pytest.mark.parametrize("scheme", ["asq_post", pytest.param("post+n2uq", marks=pytest.mark.slow)])
def test_qonnx_codes_are_read_too(scheme, tmp_path):
    pytest.importorskip("qonnx")
    model, _, _ = trained(SCHEMES[scheme])
    file = tmp_path / "model.onnx"
    write_qonnx(file, model, INPUTS[:2])
    assert graph_form(file) == "qonnx"
    same = compare(model, qonnx_form(file), [INPUTS[:6]])  # in three parts of two samples
    assert same.is_verified
    assert {name: layer.codes for name, layer in same.codes.layers.items()} == {
        name: 6 * n for name, n in SIZES.items()
    }


@pytest.mark.parametrize("scheme", ["asq", pytest.param("post+n2uq", marks=pytest.mark.slow)])
def test_integer_graphs_are_compared_with_int64_sums(scheme, tmp_path):
    model, _, _ = trained(SCHEMES[scheme])
    file = tmp_path / "model.onnx"
    write_integer_onnx(file, model, INPUTS[:2])
    assert graph_form(file) == "integer"
    same = compare(model, onnxruntime_form(file), [INPUTS])
    assert same.is_verified
    assert same.codes.unexplained == same.different_sums == 0
    assert list(same.sums) == list(quantized_layers(model))


def test_what_is_no_graph_of_this_network_is_refused(tmp_path):
    model, _, _ = trained(LayerPrecision(4, 4, "lsq"))
    file = tmp_path / "model.onnx"
    write_qonnx(file, model, INPUTS[:2])
    with pytest.raises(StorageError, match="onnxruntime .* cannot run .*model.onnx"):
        run_onnx(file, INPUTS)
    write_onnx(file, model, INPUTS[:2])
    with pytest.raises(StorageError, match=r"does not take inputs of shape \(2, 1, 8, 8\)"):
        compare(trained_on_grey(), onnxruntime_form(file), [torch.rand(2, 1, 8, 8)])
    plain = onnx.load(file)
    for node in plain.graph.node:
        node.name = ""
    onnx.save(plain, file)
    with pytest.raises(StorageError, match="holds no codes of quantized layers"):
        onnxruntime_form(file)
    file.write_bytes(b"no graph")
    with pytest.raises(StorageError, match="cannot be read"):
        onnxruntime_form(file)


def trained_on_grey():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    policy = Policy.of(dict.fromkeys(("0", "2"), LayerPrecision(4, 4, "lsq")))
    return apply_policy_(network, policy, torch.rand(4, 1, 8, 8)).eval()


def test_a_network_that_torch_cannot_export_is_refused(tmp_path):
    class Branching(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            return out if float(out.detach().sum()) > 0 else -out

    network = Branching(nn.Linear(6, 3))
    inputs = torch.randn(4, 6)
    apply_policy_(network, Policy.of({"0": LayerPrecision(4, 4, "lsq")}), inputs)
    with pytest.raises(StorageError, match="torch cannot export this network to ONNX"):
        write_onnx(tmp_path / "model.onnx", network.eval(), inputs)
