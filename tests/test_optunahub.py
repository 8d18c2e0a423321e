"""The OptunaHub packages load as OptunaHub loads them, and their examples run."""

import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

optunahub = pytest.importorskip("optunahub")

REGISTRY = Path(__file__).parent.parent / "plugins" / "optunahub" / "package"
PACKAGES = ["samplers/adq_policy", "pruners/adq_front", "benchmarks/adq_quantization"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_what_the_registry_asks_for(package):
    folder = REGISTRY / package
    assert {"__init__.py", "README.md", "LICENSE", "example.py"} <= {
        f.name for f in folder.iterdir()
    }
    front = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(), re.DOTALL)
    keys = {line.split(":")[0] for line in front[1].splitlines()}
    assert keys == {"author", "title", "description", "tags", "optuna_versions", "license"}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_readme_names_is_loaded(package):
    module = optunahub.load_local_module(package, registry_root=str(REGISTRY))
    text = (REGISTRY / package / "README.md").read_text()
    (names,) = re.findall(r"## Class or Function Names\n\n((?:- \w+\n)+)", text)
    for name in re.findall(r"- (\w+)", names):
        assert callable(getattr(module, name))


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_its_example_runs(package):
    example = REGISTRY / package / "example.py"
    done = subprocess.run(
        [sys.executable, example], cwd=REGISTRY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_benchmark_states_its_budget_as_a_constraint():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    module = optunahub.load_local_module(PACKAGES[2], registry_root=str(REGISTRY))
    problem = module.Problem(budget=0.4)
    study = optuna.create_study(directions=problem.directions)
    study.optimize(problem, n_trials=10)
    for trial in study.trials:
        assert trial.constraints["cost"] == pytest.approx(trial.values[1] - 0.4)
    assert 0.0 < problem.share_of_hypervolume(study) < 1.0
