"""The command line as a user meets it: exit codes, one sentence for each mistake, main flows."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from adq_search.cli import main
from adq_search.policy import LayerPrecision, Policy, load_policy, save_policy

TINY = Path(__file__).parent / "tiny.yaml"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command in this process; return exit code, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["adq-search", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def merged(old, new):
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def tiny_with(tmp_path, changes):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(merged(yaml.safe_load(TINY.read_text()), changes)))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "adq_search.cli", "run", str(TINY), "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_disk_that_is_full_at_the_end_costs_no_trial(cli, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "report.html"))

    with monkeypatch.context() as full:
        full.setattr("adq_search.results.write_results", refuse)
        code, _, err = cli("run", TINY, "--trials", 2, "--out", folder)
    assert code == 2
    assert "No space left on device" in err
    assert "--resume" in err
    assert "Traceback" not in err
    measured = {f.name: f.read_text() for f in (folder / "trials").glob("*.json")}
    assert len(measured) == 2
    code, said, err = cli("run", TINY, "--trials", 2, "--out", folder, "--resume")
    assert code == 0, err
    assert {f.name: f.read_text() for f in (folder / "trials").glob("*.json")} == measured
    assert (folder / "report.html").exists()


def test_a_run_leaves_everything_behind(finished):
    folder, said = finished
    assert f"report: {folder}/report.html" in said
    assert "trials: 6/6" in said
    front = json.loads((folder / "front.json").read_text())
    assert front["schema"] == "adq_search.front/1"
    assert front["objectives"] == [
        {"name": "accuracy", "direction": "maximize"},
        {"name": "energy_pj", "direction": "minimize"},
    ]
    assert front["points"]
    names = [b["origin"] for b in front["baselines"]]
    assert {"uniform W2A2", "uniform W4A4", "uniform W8A8", "full precision"} == set(names)
    for point in [*front["points"], *front["baselines"]]:
        assert point["test_accuracy"] is not None
        assert {"macs", "weight_bytes", "bops", "energy_pj"} <= set(point["cost"])
        assert (folder / point["weights_file"]).exists()
        if point["policy_hash"]:
            assert (point["integer_verified"], point["integer_samples"]) == (True, 30)
            policy = load_policy(folder / point["policy_file"])
            assert policy.hash == point["policy_hash"]
            assert point["policy_file"] == f"policies/{policy.hash}.json"
            with safe_open(folder / point["weights_file"], "pt") as weights:
                assert "0.weight" in set(weights.keys())
    run = json.loads((folder / "run.json").read_text())
    assert {"command", "versions", "seed", "commit", "fingerprint", "job"} <= set(run)
    assert set(run["fingerprint"]) == {"network", "data", "space", "recipe"}
    trials = (folder / "trials.csv").read_text().splitlines()
    assert len(trials) == 1 + 6


def test_the_report_can_be_rebuilt(finished, cli, tmp_path):
    folder, said = finished
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    code, out, _ = cli("report", folder)
    assert code == 0
    assert (folder / "report.html").read_text() == page
    assert [line for line in said.splitlines() if "W4A4" in line]


def test_a_policy_found_is_trained_longer(finished, cli, tmp_path):
    folder, _ = finished
    point = json.loads((folder / "front.json").read_text())["points"][0]
    file = folder / point["policy_file"]
    words = ("train", "--policy", file, "--task", "tests.tiny:make", "--epochs", 3)
    code, out, err = cli(
        *words, "--out", tmp_path / "t", "--teacher", folder / "teacher.safetensors"
    )
    assert code == 0, err
    result = json.loads((tmp_path / "t" / "result.json").read_text())
    assert result["policy_hash"] == point["policy_hash"]
    assert result["epochs"] == 3
    assert 0.0 <= result["test_accuracy"] <= 1.0
    assert load_policy(tmp_path / "t" / "policy.json") == load_policy(file)
    code, _, err = cli(*words, "--out", tmp_path / "t")
    assert code == 2
    assert "holds a result already" in err


def test_the_adq_papers_flow_needs_no_search(cli, tmp_path):
    file = tmp_path / "policy.json"
    words = ("allocate", "--task", "tests.tiny:make", "--scheme", "adq", "--out", file)
    code, out, err = cli(*words, "--average-bits", 2.81)
    assert code == 0, err
    policy = load_policy(file)
    inner = [policy[n] for n in ("3", "5")]
    weights = [6 * 4 * 9, 6 * 6]
    average = sum(p.weight_bits * w for p, w in zip(inner, weights)) / sum(weights)
    assert average <= 2.81
    assert all(p.scheme == "adq" and p.ema_momentum == 0.99 for p in inner)
    assert json.loads(file.read_text())["metrics"]["cost"]["average_bits_inner"] == pytest.approx(
        average
    )
    code, out, err = cli(
        "train",
        "--policy",
        file,
        "--task",
        "tests.tiny:make",
        "--epochs",
        2,
        "--out",
        tmp_path / "t",
    )
    assert code == 0, err
    code, _, err = cli(*words, "--average-bits", 1.5)
    assert code == 2
    assert "reaches from 2" in err


def test_cost_prints_layers_and_total_for_programs(cli):
    code, out, _ = cli(
        "cost",
        "--model",
        "torchvision:resnet18",
        "--input",
        "3x224x224",
        "--uniform",
        "W4A4",
        "--json",
    )
    assert code == 0
    content = json.loads(out)
    assert {"macs", "weight_bytes", "bops", "energy_pj"} <= set(content["total"])
    assert len(content["layers"]) == 21
    assert content["total"]["macs"] == 1_814_073_344
    assert content["coverage"]["unknown"] == []


def test_cost_of_a_policy_file_and_for_people(cli, finished):
    folder, _ = finished
    point = json.loads((folder / "front.json").read_text())["points"][0]
    words = ("cost", "--model", "tests.tiny:network", "--input", "1x4x4")
    code, out, _ = cli(*words, "--policy", folder / point["policy_file"], "--json")
    assert code == 0
    assert json.loads(out)["total"]["energy_pj"] == pytest.approx(point["cost"]["energy_pj"])
    code, out, _ = cli(*words, "--uniform", "W4A4", "--scheme", "adq")
    assert code == 0
    assert "average_bits_inner" in out


ONE_POLICY = {"weight_bits": [4], "input_bits": [4], "schemes": ["lsq"], "ema_momenta": None}
BAD_JOBS = {
    "unknown key": ({"spaces": {}}, "unknown key 'spaces'. Did you mean 'space'"),
    "unknown key in a rule": (
        {"space": {"layers": {"3": {"weigth_bits": [2]}}}},
        "'space.layers.3.weigth_bits'. Did you mean 'weight_bits'",
    ),
    "unknown layer": (
        {"space": {"layers": {"conv9": {"weight_bits": [2]}}}},
        "`layers.conv9` touches no layer",
    ),
    "unknown scheme": ({"space": {"default": {"schemes": ["lqs"]}}}, "Did you mean 'lsq'"),
    "bits of nine": ({"space": {"default": {"weight_bits": [9]}}}, "less than or equal to 8"),
    "empty choice": ({"space": {"default": {"weight_bits": []}}}, "at least 1 item"),
    "nothing to search": ({"space": {"default": ONE_POLICY}}, "nothing is left to search"),
    "momentum that touches no layer": (
        {"space": {"default": {"schemes": ["lsq"], "ema_momenta": [0.9, 0.99]}}},
        "ema_momenta",
    ),
    "unknown task": ({"task": "digitz"}, "Did you mean 'digits'"),
    "unknown hardware": ({"search": {"hardware": "post_asic"}}, "Did you mean 'post_asic_45nm'"),
    "impossible budget": ({"search": {"budgets": {"weight_bytes": 3}}}, "reaches from"),
    "unknown budget": ({"search": {"budgets": {"size": 3}}}, "no cost figure 'size'"),
}


@pytest.mark.parametrize(("changes", "match"), BAD_JOBS.values(), ids=BAD_JOBS)
def test_bad_jobs_end_before_any_training(cli, tmp_path, monkeypatch, changes, match):
    monkeypatch.setattr("adq_search.session.make_teacher", None)  # training would fail
    code, out, err = cli("run", tiny_with(tmp_path, changes), "--out", tmp_path / "run")
    assert code == 2, (out, err)
    assert match in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "teacher.safetensors").exists()


COST = ["cost", "--model", "digits"]
RESNET = ["cost", "--model", "torchvision:resnet18"]
W4 = ["--uniform", "W4A4"]
TRAIN = ["train", "--task", "digits", "--out", "x"]
BAD_WORDS = {
    "space": (["run", "digitz"], "Did you mean 'digits'"),
    "file": (["run", "absent.yaml"], "absent.yaml cannot be read"),
    "host": (["run", str(TINY), "--host", "optina"], "Did you mean 'optuna'"),
    "budget": (["run", str(TINY), "--budget", "size"], "written name=amount"),
    "objective": (["run", str(TINY), "--objective", "akkuracy"], "Did you mean 'accuracy'"),
    "folder": (["report", "/nowhere"], "/nowhere"),
    "model": (["cost", "--model", "torchvision:resnet", "--input", "8", *W4], "Did you mean"),
    "shape": ([*RESNET, "--input", "3*8", *W4], "written like 3x224x224"),
    "no shape": ([*RESNET, *W4], "Give --input"),
    "no policy": (COST, "either --policy FILE or --uniform"),
    "uniform": ([*COST, "--uniform", "W4"], "written like W4A4"),
    "bits": ([*COST, "--uniform", "W9A4"], "between 2 and 8"),
    "scheme": ([*COST, *W4, "--scheme", "adqq"], "Did you mean"),
    "hardware": ([*COST, *W4, "--hardware", "x"], "Known: memory_bound_edge, post_asic_45nm"),
    "absent policy": ([*TRAIN, "--policy", "no.json"], "no policy file"),
}


@pytest.mark.parametrize(("words", "match"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_bad_words_get_one_sentence_and_exit_code_two(cli, words, match, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*words)
    assert code == 2, (out, err)
    assert match in err
    assert len(err.strip().splitlines()) == 1


def test_a_policy_that_does_not_fit_is_refused_with_the_difference(cli, tmp_path):
    w4 = LayerPrecision(4, 4, "lsq")
    save_policy(Policy.of({"0": w4, "3": w4, "renamed": w4, "8": w4}), tmp_path / "p.json")
    for words in (
        ("train", "--task", "tests.tiny:make", "--out", tmp_path / "t"),
        ("cost", "--model", "tests.tiny:network", "--input", "1x4x4"),
    ):
        code, _, err = cli(*words, "--policy", tmp_path / "p.json")
        assert code == 2
        assert "without a precision: 5" in err
        assert "the network lacks: renamed" in err


def test_a_storage_of_another_network_is_refused(cli, finished, tmp_path):
    folder, _ = finished
    other = tiny_with(tmp_path, {"task_options": {"n": 120}})
    code, _, err = cli("run", other, "--study", "tiny", "--out", folder, "--resume")
    assert code == 2
    assert "belongs to another job: data differs" in err
