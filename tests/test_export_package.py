"""The hardware package: nothing lost, nothing larger than charged, and readable without us."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor, nn

from adq_search.convert import apply_policy_, quantized_layers
from adq_search.errors import PolicyError, StorageError
from adq_search.export import (
    INPUT_FORMS,
    WEIGHT_FORMS,
    compare,
    load_package_,
    pack,
    packed_bytes,
    read_vectors,
    unpack,
    write_package,
)
from adq_search.hardware import layer_cost
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.tracing import ModelSummary, trace

INPUTS = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5))
TARGETS = (INPUTS[:, 0].mean(dim=(1, 2)) > INPUTS[:, 1].mean(dim=(1, 2))).long()

SCHEMES = {
    "lsq": LayerPrecision(3, 4, "lsq"),
    "asq": LayerPrecision(4, 3, "asq"),
    "post": LayerPrecision(4, 4, "post"),
    "asq_post": LayerPrecision(3, 5, "asq_post"),
    "pot": LayerPrecision(4, 8, "pot"),
    "adq": LayerPrecision(3, 4, "adq", 0.9),
    "adq+lsq": LayerPrecision(2, 4, "adq+lsq", 0.9),
    "root+lsq": LayerPrecision(5, 6, "root+lsq"),
    "post+n2uq": LayerPrecision(4, 2, "post+n2uq"),
}
OPTIONS = {
    "by tensor": ("lsq", {"lsq": {"granularity": "tensor"}}),
    "eq17": ("post", {"post": {"levels": "eq17"}}),
    "snapped": ("asq_post", {"post": {"sqrt_half": "45/64"}}),
    "root 4": ("root+lsq", {"root": {"root": 4}}),
}


def network() -> nn.Module:
    """Plain, strided, depthwise and grouped convolutions, batch norm, a float layer, a head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 9, 1),
        nn.Flatten(),
        nn.Linear(81, 2),
    )


def trained(precision: LayerPrecision, options=None) -> tuple[nn.Module, Policy, ModelSummary]:
    """The network under a policy after a few steps, so that nothing is as it was initialised."""
    torch.manual_seed(0)
    model = network()
    summary = trace(model, INPUTS[:1])
    layers = dict.fromkeys(summary.names, precision) | {summary.names[3]: FLOAT}
    layers[summary.names[0]] = LayerPrecision(8, 8, "lsq")
    policy = Policy.of(layers, options)
    apply_policy_(model, policy, INPUTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
    return model.eval(), policy, summary


@pytest.fixture(
    scope="module",
    params=[
        *((p, None) for p in SCHEMES.values()),
        *((SCHEMES[s], o) for s, o in OPTIONS.values()),
    ],
    ids=[*SCHEMES, *OPTIONS],
)
def written(request, tmp_path_factory):
    precision, options = request.param
    model, policy, summary = trained(precision, options)
    folder = tmp_path_factory.mktemp("package")
    return model, policy, summary, folder, write_package(folder, model, policy, summary)


def test_loading_back_computes_the_same_bit_for_bit(written):
    model, _, _, folder, _ = written
    loaded = load_package_(network(), folder)
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS), model(INPUTS))
    for name, layer in quantized_layers(model).items():
        other = quantized_layers(loaded)[name]
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        assert torch.equal(other.weight_quantizer.levels(), weights.levels())
        assert torch.equal(other.input_quantizer.levels(), inputs.levels())
        assert other.weight_quantizer.codes(other.weight).tolist() == (
            weights.codes(layer.weight).tolist()
        )


def test_packed_sizes_are_what_the_cost_model_charges(written):
    _, policy, summary, folder, description = written
    tensors = load_file(folder / "tensors.safetensors")
    charged = 0.0
    for row in description["layers"]:
        if row["is_float"]:
            continue
        info, precision = summary[row["name"]], policy[row["name"]]
        bits = layer_cost(info, precision, policy.options).weight_bytes * 8
        charged += bits
        assert row["weight"]["stored_bits"] == bits
        assert tensors[row["weight"]["codes"]].nbytes == math.ceil(bits / 8)
    assert description["total"]["weight_bits"] == charged


# A reader with numpy, the JSON and nothing of ours.


def read_weight(row: dict, tensors: dict) -> np.ndarray:
    weight = row["weight"]
    n, bits = math.prod(weight["shape"]), weight["bits"]
    stream = int.from_bytes(tensors[weight["codes"]].tobytes(), "little")
    codes = np.array([(stream >> (i * bits)) & (2**bits - 1) for i in range(n)])
    assert codes.max() < weight["n_levels"]
    levels = tensors[weight["table"]][codes].reshape(weight["shape"])
    return levels * tensors[weight["scale"]].reshape(-1, *([1] * (len(weight["shape"]) - 1)))


def read_input(row: dict, tensors: dict, x: np.ndarray) -> np.ndarray:
    about = row["input"]
    t = {key: tensors[name] for key, name in about["tensors"].items()}
    one = np.float32(1e-8)
    if about["quantizer"] == "n2uq":
        scaled = x * np.maximum(np.abs(t["in_scale"]), one)
        return t["levels"][(scaled[..., None] > t["thresholds"]).sum(axis=-1)]
    step = np.maximum(np.abs(t["step"]), one)
    if about["quantizer"] == "asq":
        means = x.reshape(*x.shape[:2], -1).mean(axis=2)
        hidden = means
        if "adapter.hidden.weight" in t:
            hidden = np.maximum(means @ t["adapter.hidden.weight"].T + t["adapter.hidden.bias"], 0)
        beta = np.maximum(hidden @ t["adapter.output.weight"].T + t["adapter.output.bias"], one)
        step = step * beta.reshape(-1, *([1] * (x.ndim - 1)))
    return np.clip(np.round(x / step), about["lowest"], about["highest"]) * step


def test_a_reader_without_our_code_gets_the_same_weights_and_inputs(written):
    model, _, _, folder, _ = written
    description = json.loads((folder / "package.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    seen: dict[str, Tensor] = {}
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(INPUTS)
    for row in description["layers"]:
        if row["is_float"]:
            continue
        layer = quantized_layers(model)[row["name"]]
        with torch.no_grad():
            weight = layer.weight_quantizer(layer.weight).numpy()
            inputs = layer.input_quantizer(seen[row["name"]]).numpy()
        assert np.array_equal(read_weight(row, tensors), weight)
        found = read_input(row, tensors, seen[row["name"]].numpy())
        if row["input"]["quantizer"] == "asq":
            # numpy adds channel means in another order, so the factor differs in its last digits.
            np.testing.assert_allclose(found, inputs, rtol=1e-5)
        else:
            assert np.array_equal(found, inputs)


@pytest.mark.parametrize(
    ("scheme", "root", "options"),
    [
        ("pot", 1, {}),
        ("post", 2, {}),
        ("post", 2, {"post": {"sqrt_half": "45/64"}}),
        ("root+lsq", 3, {}),
    ],
)
def test_powers_are_told_as_signs_and_exponents(scheme, root, options, tmp_path):
    model, policy, summary = trained(SCHEMES[scheme], options)
    description = write_package(tmp_path, model, policy, summary)
    weight = description["layers"][1]["weight"]
    assert weight["root"] == root
    f = Fraction(weight["sqrt_half"]) if "sqrt_half" in weight else 2 ** (-1 / root)
    assert ("sqrt_half" in weight) == bool(options)
    table = load_file(tmp_path / "tensors.safetensors")[weight["table"]]
    expected = [
        float(s * Fraction(1, 2 ** (e // root)) * f ** (e % root))
        for s, e in zip(weight["signs"], weight["exponents"], strict=True)
    ]
    assert table.tolist() == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 9), st.data())
def test_packing_is_undone_and_leaves_no_gaps(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert len(packed) == packed_bytes(len(codes), bits) == math.ceil(len(codes) * bits / 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    assert int.from_bytes(packed.numpy().tobytes(), "little") == stream


def test_every_entry_of_the_description_is_explained(tmp_path):
    """Names speak for themselves, or stand under `fields`; lists of words are the reading."""
    model, policy, summary = trained(SCHEMES["asq_post"], {"post": {"sqrt_half": "45/64"}})
    about = {"name": "mine", "options": {"n": 3}}
    description = write_package(tmp_path, model, policy, summary, samples=INPUTS[:2], task=about)
    assert description["task"] == about
    explained = {name.strip() for key in description["fields"] for name in key.split(",")}
    plain = {"schema", "reading", "fields", "tensors_sha256", "total", "provenance", "vectors"}
    assert set(description) <= explained | plain
    row = description["layers"][1]
    plain = {"name", "kind", "is_float", "weight", "input", "output_shape"}
    assert {f"layers.{key}" for key in set(row) - plain} <= explained
    for part in ("weight", "input"):
        plain = {"quantizer", "options", "shape"}
        assert {f"{part}.{key}" for key in set(row[part]) - plain} <= explained
    told = " ".join(description["reading"])
    for word in ("least significant first", "row-major", "little-endian", "codes.<k>"):
        assert word in told


def test_test_vectors_hold_codes_and_outputs_of_the_exported_network(written, tmp_path):
    model, policy, summary, _, _ = written
    description = write_package(tmp_path, model, policy, summary, samples=INPUTS[:3])
    assert description["vectors"]["samples"] == 3
    held = load_file(tmp_path / "vectors.safetensors")
    assert {"inputs", "outputs"} < set(held)
    rows = {row["name"]: row for row in description["layers"] if not row["is_float"]}
    assert {key for key in held if ".codes." in key} == {f"{name}.codes.0" for name in rows}
    for name, row in rows.items():
        codes = held[f"{name}.codes.0"]
        assert codes.shape == (3, *row["input_shape"])
        assert row["input"]["lowest"] <= codes.min() <= codes.max() <= row["input"]["highest"]
    inputs, outcome = read_vectors(tmp_path)
    assert torch.equal(inputs, INPUTS[:3])
    loaded = load_package_(network(), tmp_path)
    agreement = compare(loaded, lambda _: outcome, [inputs])
    assert agreement.is_verified
    assert agreement.codes.ties == agreement.codes.largest_logit_error == 0


def test_damaged_vectors_are_refused(tmp_path):
    model, policy, summary = trained(SCHEMES["lsq"])
    write_package(tmp_path / "without", model, policy, summary)
    assert read_vectors(tmp_path / "without") is None
    write_package(tmp_path, model, policy, summary, samples=INPUTS[:3])
    (tmp_path / "vectors.safetensors").write_bytes(b"other")
    with pytest.raises(StorageError, match=r"vectors.safetensors is not the file"):
        read_vectors(tmp_path)


def test_packing_in_parts_is_packing_at_once(monkeypatch):
    codes = torch.randint(0, 8, (1000,), generator=torch.Generator().manual_seed(0))
    whole = pack(codes, 3)
    monkeypatch.setattr("adq_search.export._packing._PART", 64)
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 1000), codes)


def test_a_package_is_not_replaced(tmp_path):
    model, policy, summary = trained(SCHEMES["lsq"])
    write_package(tmp_path, model, policy, summary)
    with pytest.raises(StorageError, match="holds a package already"):
        write_package(tmp_path, model, policy, summary)


def test_the_policy_must_be_the_networks_own(tmp_path):
    model, policy, summary = trained(SCHEMES["lsq"])
    other = Policy.of(dict.fromkeys(policy.names, SCHEMES["lsq"]))
    with pytest.raises(PolicyError, match="other layers are quantized"):
        write_package(tmp_path, model, other, summary)


def _damage(folder, what):
    if what == "tensors":
        file = folder / "tensors.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif what == "missing":
        (folder / "tensors.safetensors").unlink()
    elif what == "json":
        (folder / "package.json").write_text("{")
    elif what == "edited":
        content = json.loads((folder / "package.json").read_text())
        del content["layers"][1]["weight"]["table"]
        (folder / "package.json").write_text(json.dumps(content))
    else:
        (folder / "package.json").write_text('{"schema": "adq_search.package/0"}')


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("tensors", "not the file that its description was written for"),
        ("missing", "cannot be read"),
        ("json", "is damaged: line 1"),
        ("edited", "was edited: 'table' is missing"),
        ("schema", "no package of schema 'adq_search.package/1'"),
    ],
)
def test_a_damaged_package_is_refused(what, match, tmp_path):
    model, policy, summary = trained(SCHEMES["lsq"])
    write_package(tmp_path, model, policy, summary)
    _damage(tmp_path, what)
    with pytest.raises(StorageError, match=match):
        load_package_(network(), tmp_path)


def test_another_network_is_refused(tmp_path):
    model, policy, summary = trained(SCHEMES["lsq"])
    write_package(tmp_path, model, policy, summary)
    other = network()
    other[1] = nn.Identity()
    with pytest.raises(PolicyError, match="of another network: 1\\."):
        load_package_(other, tmp_path)


class Training(nn.Module):
    """A network with a head that only training uses."""

    def __init__(self):
        super().__init__()
        self.body, self.extra = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)


def test_a_layer_that_never_runs_goes_along_as_it_is(tmp_path):
    torch.manual_seed(0)
    model, inputs = Training().eval(), torch.randn(9, 6)
    summary = trace(model, inputs)
    policy = Policy.of({"body": SCHEMES["post"], "extra": FLOAT})
    apply_policy_(model, policy, inputs)
    write_package(tmp_path, model, policy, summary)
    loaded = load_package_(Training(), tmp_path)
    assert torch.equal(loaded(inputs), model(inputs))
    assert torch.equal(loaded.extra.weight, model.extra.weight)


def test_a_layer_that_never_runs_is_not_exported_quantized(tmp_path):
    model, inputs = Training().eval(), torch.randn(9, 6)
    summary = trace(model, inputs)
    policy = Policy.of(dict.fromkeys(("body", "extra"), SCHEMES["post"]))
    apply_policy_(model, policy)
    with pytest.raises(PolicyError, match="'extra' never runs"):
        write_package(tmp_path, model, policy, summary)


def test_a_quantizer_without_a_form_is_refused(tmp_path, monkeypatch):
    model, policy, summary = trained(SCHEMES["post"])
    monkeypatch.delitem(WEIGHT_FORMS, "post")
    with pytest.raises(StorageError, match="weight quantizer 'post' has no form.*WEIGHT_FORMS"):
        write_package(tmp_path, model, policy, summary)
    monkeypatch.undo()
    monkeypatch.delitem(INPUT_FORMS, "lsq")
    with pytest.raises(StorageError, match="input quantizer 'lsq' has no form.*INPUT_FORMS"):
        write_package(tmp_path, model, policy, summary)
