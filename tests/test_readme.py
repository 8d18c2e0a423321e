"""What the README shows is what runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adq_search.policy import LayerPrecision, Policy, save_policy

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"<!-- runs in tests/test_readme.py -->\n```(\w+)\n(.*?)```", README, re.DOTALL)


def block(containing):
    (found,) = [text for _, text in BLOCKS if containing in text]
    return found


def test_three_lines_apply_a_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    w4 = LayerPrecision(4, 4, "lsq")
    save_policy(Policy.of({"0": w4, "2": w4}), "policy.json")
    names = {"network": network, "calibration_batch": torch.randn(16, 4)}
    exec(block("load_policy"), names)
    assert network[0].is_quantized
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    assert len(names["adq_search"].quantized_layers(network)) == 2


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    (tmp_path / "mytask.py").write_text(block("def make("))
    (tmp_path / "job.yaml").write_text(block("mytask:make"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_bring_your_own_network_and_data(own_task):
    command = [sys.executable, "-m", "adq_search.cli", "run", "job.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (own_task / "results" / "job" / "report.html").exists()


@pytest.mark.slow
def test_a_search_in_ones_own_optuna_script(own_task):
    (own_task / "script.py").write_text(block("create_study"))
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[" in done.stdout


def test_every_marked_block_is_run_here():
    assert len(BLOCKS) == 4
