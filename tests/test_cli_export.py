"""`adq-search export` and `verify`: what a user gets out of a run's folder, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adq_search.cli import main
from adq_search.convert import apply_policy_
from adq_search.evaluation import evaluate
from adq_search.export import load_package_, run_onnx, write_integer_onnx
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.policy import LayerPrecision, Policy, load_policy, save_policy
from adq_search.session import prepare

INPUTS = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A run's folder with two trained policies."""
    job = read_job(TINY).with_search(prior=None, seeds=0)
    session = prepare(plan(job), tmp_path_factory.mktemp("run"))
    names = session.plan.summary.names
    ends = LayerPrecision(8, 8, "lsq")
    for inner in (LayerPrecision(4, 4, "lsq"), LayerPrecision(4, 8, "post")):
        policy = Policy.uniform(names, inner, ends=ends)
        session.measure(policy)
        save_policy(policy, session.folder / "policies" / f"{policy.hash}.json")
    return session


@pytest.fixture
def cli(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["adq-search", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def hash_of(session, scheme):
    for file in (session.folder / "policies").glob("*.json"):
        if list(load_policy(file))[1][1].scheme == scheme:
            return file.stem
    raise AssertionError(scheme)


@pytest.mark.parametrize("scheme", ["lsq", "post"])
def test_a_package_has_the_accuracy_and_the_size_of_the_trial(session, cli, tmp_path, scheme):
    chosen = hash_of(session, scheme)
    code, said, _ = cli("export", session.folder, "--policy", chosen[:7], "--out", tmp_path)
    assert code == 0
    loaded = load_package_(session.plan.task.make_network(), tmp_path)
    policy = load_policy(session.folder / "policies" / f"{chosen}.json")
    measured = session.result_of(policy)
    assert evaluate(loaded, session.plan.task.validation).accuracy == measured.accuracy
    description = json.loads((tmp_path / "package.json").read_text())
    charged = measured.cost["weight_bytes"] * 8
    assert description["total"]["weight_bits"] == charged
    assert f"weight codes: {charged:.0f} bits" in said
    assert description["provenance"]["seed"] == 0
    code, said, _ = cli("verify", tmp_path, "--task", "tests.tiny:make")
    assert code == 0
    assert "package by our loader, on its test vectors: 1,024 codes, 0 ties, 0 unexplained" in said
    assert "8 of 8 predictions agree" in said
    assert "integer sums of 4 of 4 layers agree on 30 samples" in said


def table_after(said, title):
    """The rows of the table that a form's verdict stands under."""
    before = said[: said.index(title)].rstrip().splitlines()
    start = max(i for i, line in enumerate(before) if line.startswith("┏"))
    rows = [line.split("│")[1:-1] for line in before[start:] if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def export(cli, session, scheme, form, folder):
    chosen = hash_of(session, scheme)
    return cli("export", session.folder, "--policy", chosen, "--format", form, "--out", folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def exported(cli, session, shelf, tmp_path):
    """Return a function that gives a folder with an export; each is made once."""

    def copy_of(scheme, form):
        made, folder = shelf / f"{scheme}-{form}", tmp_path / "exported"
        if not made.exists():
            assert export(cli, session, scheme, form, made)[0] == 0
        shutil.copytree(made, folder)
        return folder

    return copy_of


@pytest.mark.parametrize(
    ("form", "scheme", "title"),
    [
        ("onnx", "lsq", "ONNX by onnxruntime"),
        ("qonnx", "lsq", "QONNX by qonnx"),
        pytest.param("qonnx", "post", "QONNX by qonnx", marks=pytest.mark.slow),
        ("integer", "lsq", "integer ONNX by onnxruntime"),
        ("integer", "post", "integer ONNX by onnxruntime"),
    ],
)
def test_every_graph_is_verified_layer_by_layer(cli, exported, form, scheme, title):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("qonnx")
    folder = exported(scheme, form)
    assert sorted(f.name for f in folder.iterdir()) == [
        "model.onnx",
        "package.json",
        "tensors.safetensors",
        "vectors.safetensors",
    ]
    code, said, _ = cli("verify", folder, "--task", "tests.tiny:make")
    assert code == 0
    rows = table_after(said, f"{title}: 3,840 codes, 0 ties, 0 unexplained")
    # 30 samples; inputs of 1x4x4, 4x4x4, 6x2x2 and 24.
    assert [row[:2] for row in rows] == [["0", "480"], ["3", "1,920"], ["5", "720"], ["8", "720"]]
    assert {cell for row in rows for cell in row[2:5]} == {"0"}
    if form == "integer":  # outputs of 4x4x4, 6x2x2, 6x2x2 and 3; POST sums each in two banks
        banks = 2 if scheme == "post" else 1
        sums = [f"{30 * n:,}" for n in (64, 24 * banks, 24 * banks, 3)]
        assert [row[5:] for row in rows] == [[n, "0"] for n in sums]
        assert "0 integer sums differ" in said
    assert "30 of 30 predictions agree" in said
    assert said.rstrip().endswith(": verified")


def test_an_onnx_export_has_the_accuracy_of_the_trial_and_is_not_replaced(session, cli, exported):
    pytest.importorskip("onnxruntime")
    folder = exported("lsq", "onnx")
    inputs, targets, _ = next(session.plan.task.validation.batches(100))
    found = run_onnx(folder / "model.onnx", inputs)
    policy = Policy.from_json(json.loads((folder / "package.json").read_text())["policy"])
    measured = session.result_of(policy)
    assert float((found.argmax(1) == targets).float().mean()) == pytest.approx(measured.accuracy)
    code, _, err = export(cli, session, "lsq", "onnx", folder)
    assert code == 2
    assert "holds an export already" in err


def edit(file, name, change):
    """Change one constant of a graph."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(file)
    (constant,) = (c for c in model.graph.initializer if re.fullmatch(name, c.name))
    values = change(onnx.numpy_helper.to_array(constant).copy())
    constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
    onnx.save(model, file)


def first_plus_one(values):
    values.flat[0] += 1
    return values


@pytest.mark.parametrize(
    ("form", "name", "change", "match"),
    [
        # the head with the other sign: every code agrees, no class does
        ("onnx", "8/weight/scale", lambda v: -v, r", 0 unexplained; \d+ of 30 pred"),
        # one step of the second layer a hundredth longer: codes far from any boundary move
        ("onnx", r"3/input_\d+/scale", lambda v: v * 1.01, r" [1-9]\d* unexplained"),
        ("qonnx", r"3/input_\d+/scale", lambda v: v * 1.01, r" [1-9]\d* unexplained"),
        # one word of one weight: its sums are others than int64 arithmetic gives
        ("integer", r"5/input_\d+/bank_0", first_plus_one, r"[1-9]\d* integer sums differ"),
    ],
    ids=["classes", "codes", "codes of qonnx", "sums"],
)
def test_verify_ends_with_1_where_a_graph_computes_something_else(
    cli, exported, form, name, change, match
):
    folder = exported("lsq", form)
    edit(folder / "model.onnx", name, change)
    code, said, _ = cli("verify", folder, "--task", "tests.tiny:make")
    assert code == 1
    assert re.search(rf"{match}.*: NOT verified", said)


def test_verify_holds_a_package_to_the_network_it_was_written_from(cli, exported):
    """A package with another table is whole, and computes something else than its vectors say."""
    folder = exported("lsq", "package")
    tensors = load_file(folder / "tensors.safetensors")
    tensors["layers.3.weight.scale"] = tensors["layers.3.weight.scale"] * 1.5
    save_file(tensors, folder / "tensors.safetensors")
    description = json.loads((folder / "package.json").read_text())
    content = (folder / "tensors.safetensors").read_bytes()
    description["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "package.json").write_text(json.dumps(description))
    code, said, _ = cli("verify", folder, "--task", "tests.tiny:make")
    assert code == 1
    assert re.search(r"test vectors: .* [1-9]\d* unexplained.*: NOT verified", said)
    rows = {row[0]: row for row in table_after(said, "package by our loader")}
    assert rows["3"][4] == "0"  # its input is made before it
    assert rows["5"][4] != "0"


def test_onnx_refuses_what_qonnx_takes(session, cli, tmp_path):
    pytest.importorskip("onnxscript")
    code, _, err = export(cli, session, "post", "onnx", tmp_path)
    assert code == 2
    assert "quantized by 'post'. Use `--format qonnx`" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("policy", "match"),
    [("0" * 16, "has no policy '0000000000000000'"), ("", "Several policies of")],
)
def test_a_policy_is_named_by_enough_of_its_hash(session, cli, tmp_path, policy, match):
    code, _, err = cli("export", session.folder, "--policy", policy, "--out", tmp_path / "out")
    assert code == 2
    assert match in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_is_refused(cli, tmp_path):
    code, _, err = cli("export", tmp_path, "--policy", "1234", "--out", tmp_path / "out")
    assert code == 2
    assert "There is no job file" in err


def test_verify_takes_the_options_of_the_task_from_the_export_or_a_space(cli, tmp_path):
    """A task of 120 samples, of which 40 are validation; the space's has its 30."""
    job = read_job(TINY).with_search(prior=None, seeds=0)
    job = job.model_copy(update={"task_options": {"n": 120}})
    session = prepare(plan(job), tmp_path / "run")
    policy = Policy.uniform(session.plan.summary.names, LayerPrecision(4, 8, "lsq"))
    assert session.measure(policy).state == "complete"
    save_policy(policy, session.folder / "policies" / f"{policy.hash}.json")
    out = tmp_path / "out"
    words = ["export", session.folder, "--policy", policy.hash, "--out", out]
    code, _, err = cli(*words)
    assert code == 0, err
    words = ["verify", out, "--task", "tests.tiny:make"]
    assert "layers agree on 32 samples" in cli(*words)[1]
    assert "layers agree on 7 samples" in cli(*words, "--samples", "7")[1]
    assert "layers agree on 30 samples" in cli(*words, "--space", TINY)[1]
    code, _, err = cli("verify", out, "--task", "digits", "--space", TINY)
    assert code == 2
    assert "is about task 'tests.tiny:make', not 'digits'" in " ".join(err.split())


def test_what_does_not_belong_together_is_one_sentence(cli, exported, tmp_path):
    code, _, err = cli("verify", tmp_path, "--task", "tests.tiny:make")
    assert code == 2
    assert "There is no package file" in err

    folder = exported("lsq", "package")
    code, _, err = cli("verify", folder, "--task", "digits")
    assert code == 2
    assert "was exported from task 'tests.tiny:make', not 'digits'" in " ".join(err.split())

    description = json.loads((folder / "package.json").read_text())
    (folder / "package.json").write_text(json.dumps(description | {"task": None}))
    code, _, err = cli("verify", folder, "--task", "digits")
    assert code == 2
    assert "other layers or shapes than task 'digits' makes" in " ".join(err.split())


def test_a_graph_of_another_network_is_refused(cli, exported):
    pytest.importorskip("onnxruntime")
    folder = exported("lsq", "package")
    torch.manual_seed(0)
    other, inputs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3)), INPUTS
    apply_policy_(other, Policy.uniform(["0", "2"], LayerPrecision(4, 4, "lsq")), inputs)
    write_integer_onnx(folder / "model.onnx", other.eval(), inputs)
    code, _, err = cli("verify", folder, "--task", "tests.tiny:make")
    assert code == 2
    assert "has a layer '2', which the network has not" in " ".join(err.split())

    (folder / "model.onnx").write_bytes(b"no graph")
    code, _, err = cli("verify", folder, "--task", "tests.tiny:make")
    assert code == 2
    assert "cannot be read" in " ".join(err.split())
