"""The house itself: imports point down, packages on disk are packages in the wheel."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    {"errors", "progress", "provenance"},
    {"files", "validation", "native", "own_process"},
    {"native_function", "tracing", "pareto", "policy", "parallel", "convolution"},
    {"layout", "quantizers"},
    {"first_layer", "hardware", "global_batch_norm"},
    {"layers"},
    {"convert", "norms", "space_file", "space_rules", "space"},
    {"sensitivity", "tasks", "knapsack", "integer"},
    {"prior", "distill", "guide", "simulator", "stacking", "checkpoint"},
    {"training", "evaluation", "prior_quality", "replicates", "warm_start"},
    {"trial", "teacher", "store"},
    {"donors", "job", "report", "export"},
    {"plan", "following"},
    {"session", "stopping"},
    {"hosting", "leading"},
    {"results"},
    {"status"},
    {"cli", "plugins", "search_spaces", "testing"},
    {"__main__"},
]
ROW = {name: i for i, row in enumerate(ROWS) for name in row}
#: Modules of one row that may import each other in this order: a written part and its resolution.
WITHIN = {
    ("space_rules", "space_file"),
    ("space", "space_file"),
    ("space", "space_rules"),
    ("store", "teacher"),
}


def source_files():
    for folder, prefix in (
        ("adq_search", ""),
        ("plugins", "plugins"),
        ("search_spaces", "search_spaces"),
    ):
        for file in sorted((ROOT / folder).rglob("*.py")):
            relative = file.relative_to(ROOT / folder).with_suffix("")
            room = prefix or relative.parts[0]
            yield file, room


def own_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adq_search"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("adq_search."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize(
    ("file", "room"), list(source_files()), ids=lambda v: v.name if isinstance(v, Path) else v
)
def test_imports_point_down(file, room):
    if room == "__init__":
        return
    assert room in ROW, f"{room} has no row: give it one in ROWS"
    for imported in own_imports(ast.parse(file.read_text())):
        if imported != room and (room, imported) not in WITHIN:
            assert ROW[imported] < ROW[room], f"{room} imports {imported}, which is not below it"


@pytest.mark.parametrize("file", [f for f, _ in source_files()], ids=lambda f: f.name)
def test_no_own_import_inside_a_function(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert not list(own_imports(node)), f"{node.name} hides an import"


def test_the_core_never_imports_what_is_mapped_in():
    for file, room in source_files():
        if room not in {"plugins", "search_spaces"}:
            imported = set(own_imports(ast.parse(file.read_text())))
            assert not imported & {"plugins", "search_spaces"}, file


def test_package_list_is_what_lies_on_disk():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join(["adq_search", *d.relative_to(ROOT / "adq_search").parts])
        for d in [ROOT / "adq_search", *(ROOT / "adq_search").rglob("*")]
        if d.is_dir() and (d / "__init__.py").exists()
    }
    assert set(config["packages"]) == on_disk | {"adq_search.plugins", "adq_search.search_spaces"}


def test_import_is_light():
    """`import adq_search` must not load hosts or plotting."""
    code = (
        "import sys, adq_search; "
        "print([m for m in ('optuna', 'ray', 'plotly', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_source_file_grows_past_four_hundred_lines():
    long = [f.name for f, _ in source_files() if len(f.read_text().splitlines()) > 400]
    assert long == []
