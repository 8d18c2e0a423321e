"""`adq-search export` and `verify`: what a user gets out of a run's folder, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from adq_search.cli import main
from adq_search.export import load_package_, run_onnx
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.policy import LayerPrecision, Policy, load_policy, save_policy
from adq_search.session import prepare
from adq_search.training import evaluate

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
    assert "4 of 4 layers agree on 30 samples" in said


def test_an_onnx_export_is_verified_code_by_code(session, cli, tmp_path):
    pytest.importorskip("onnxruntime")
    words = [session.folder, "--policy", hash_of(session, "lsq"), "--format", "onnx"]
    code, _, _ = cli("export", *words, "--out", tmp_path)
    assert code == 0
    code, said, _ = cli("verify", tmp_path, "--task", "tests.tiny:make")
    assert code == 0
    assert "30 of 30 predictions agree" in said
    rows = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    # 30 samples; inputs of 1x4x4, 4x4x4, 6x2x2 and 24.
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "480", "0", "0"],
        ["3", "1,920", "0", "0"],
        ["5", "720", "0", "0"],
        ["8", "720", "0", "0"],
    ]
    inputs, targets, _ = next(session.plan.task.validation.batches(100))
    found = run_onnx(tmp_path / "model.onnx", inputs)
    policy = Policy.from_json(json.loads((tmp_path / "package.json").read_text())["policy"])
    measured = session.result_of(policy)
    assert float((found.argmax(1) == targets).float().mean()) == pytest.approx(measured.accuracy)
    code, _, err = cli("export", *words, "--out", tmp_path)
    assert code == 2
    assert "holds an export already" in err


def test_verify_ends_with_1_where_the_graph_computes_something_else(session, cli, tmp_path):
    onnx = pytest.importorskip("onnx")
    words = [session.folder, "--policy", hash_of(session, "lsq"), "--format", "onnx"]
    cli("export", *words, "--out", tmp_path)
    file = tmp_path / "model.onnx"
    model = onnx.load(file)
    (scale,) = (c for c in model.graph.initializer if c.name == "8/weight/scale")
    negated = -onnx.numpy_helper.to_array(scale)
    scale.CopyFrom(onnx.numpy_helper.from_array(negated, scale.name))
    onnx.save(model, file)
    code, said, _ = cli("verify", tmp_path, "--task", "tests.tiny:make")
    assert code == 1
    assert "30 of 30 predictions agree" not in said


def test_qonnx_is_written_for_schemes_that_onnx_does_not_have(session, cli, tmp_path):
    pytest.importorskip("onnxscript")
    words = ["export", session.folder, "--policy", hash_of(session, "post"), "--out", tmp_path]
    code, _, err = cli(*words, "--format", "onnx")
    assert code == 2
    assert "quantized by 'post'. Use `--format qonnx`" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []
    code, _, _ = cli(*words, "--format", "qonnx")
    assert code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "model.onnx",
        "package.json",
        "tensors.safetensors",
    ]
    code, said, _ = cli("verify", tmp_path, "--task", "tests.tiny:make")
    assert code == 0
    assert "model.onnx is QONNX" in said
    assert "4 of 4 layers agree" in said


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


def test_verify_needs_an_export_and_its_own_task(session, cli, tmp_path):
    code, _, err = cli("verify", tmp_path, "--task", "tests.tiny:make")
    assert code == 2
    assert "There is no package file" in err
    cli("export", session.folder, "--policy", hash_of(session, "lsq"), "--out", tmp_path)
    code, _, err = cli("verify", tmp_path, "--task", "digits")
    assert code == 2
    assert "does not fit the network" in err


def test_an_integer_graph_of_post_is_verified_code_by_code(session, cli, tmp_path):
    pytest.importorskip("onnxruntime")
    chosen = hash_of(session, "post")
    words = [session.folder, "--policy", chosen, "--format", "integer", "--out", tmp_path]
    assert cli("export", *words)[0] == 0
    code, said, _ = cli("verify", tmp_path, "--task", "tests.tiny:make")
    assert code == 0
    assert "30 of 30 predictions agree" in said
    rows = [line.split("│")[2:4] for line in said.splitlines() if line.startswith("│")]
    assert [int(n.replace(",", "")) for n, _ in rows] == [480, 1920, 720, 720]
    assert all(int(different) == 0 for _, different in rows)
