"""`adq-search sensitivity`, from the command line to its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from adq_search.cli._app import app
from adq_search.errors import SensitivityError, StorageError

SPACE = str(Path(__file__).parent / "tiny.yaml")


def run(folder, *arguments):
    command = ["sensitivity", "--task", "tests.tiny:make", "--space", SPACE, "--out", str(folder)]
    return CliRunner().invoke(app, [*command, *arguments])


def test_it_prints_and_saves_table_and_picture(tmp_path):
    result = run(tmp_path, "--estimator", "kl")
    assert result.exit_code == 0, result.output
    assert "predicted loss increase, kl: weights alone, nats" in result.output
    rows = list(csv.DictReader((tmp_path / "kl.csv").open()))
    # two searched groups: lsq takes 4 x 3, post 2 or 4 x 3, adq 4 x 3; two pinned at 8 bits
    assert {r["group"] for r in rows} == {"0", "3", "5", "8"}
    assert len([r for r in rows if r["group"] == "0"]) == 1
    for row in rows:
        parts = [float(row[f"{p}_loss_increase"]) for p in ("weights", "inputs", "both")]
        assert parts[2] == pytest.approx(parts[0] + parts[1], rel=1e-4)
        assert float(row["both_standard_error"]) > 0
    content = json.loads((tmp_path / "kl.json").read_text())
    assert content["estimator"] == "kl"
    assert content["provenance"]["seed"] == 0
    picture = ET.fromstring((tmp_path / "kl.svg").read_text())
    cells = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert len(cells) == len(content["weights"]) + len(content["inputs"])
    assert any(cell.startswith("3, lsq at 2 bits: ") for cell in cells)


def test_a_second_call_reads_what_was_measured(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "fisher.csv").read_text()
    stored = (tmp_path / "fisher.samples.json").stat().st_mtime_ns
    assert run(tmp_path).exit_code == first.exit_code == 0
    assert (tmp_path / "fisher.csv").read_text() == before
    assert (tmp_path / "fisher.samples.json").stat().st_mtime_ns == stored


def test_other_samples_are_refused(tmp_path):
    run(tmp_path)
    result = run(tmp_path, "--samples", "10")
    assert isinstance(result.exception, StorageError)
    assert "something else: data" in str(result.exception)


def test_settings_reach_the_estimator(tmp_path):
    run(tmp_path, "--estimator", "fisher_output", "--joint", "--labels", "data")
    content = json.loads((tmp_path / "fisher_output.json").read_text())
    assert content["both"]
    signature = json.loads((tmp_path / "fisher_output.samples.json").read_text())["signature"]
    assert "source='data'" in signature["estimator"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--estimator", "fischer"], "Did you mean 'fisher'"),
        (["--estimator", "hessian", "--joint"], "'hessian' has no setting 'joint'"),
        (["--labels", "date"], "no labels 'date'. Did you mean 'data'"),
        (["--estimator", "lsq_steps", "--time-budget", "0.0001"], "2 samples at least"),
    ],
    ids=["estimator", "setting", "labels", "budget"],
)
def test_mistakes_are_said(tmp_path, arguments, text):
    result = run(tmp_path, *arguments)
    assert isinstance(result.exception, SensitivityError)
    assert text in str(result.exception)
