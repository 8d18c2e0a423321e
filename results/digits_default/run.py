"""Run the default job and keep what the README shows of it.

Usage: python results/digits_default/run.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KEPT = ("front.json", "front.svg", "trials.csv", "run.json")


def main():
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "digits"
        command = [sys.executable, "-m", "adq_search.cli", "run", "--out", str(folder)]
        subprocess.run(command, check=True)
        for name in KEPT:
            shutil.copy(folder / name, HERE / name)
    front = json.loads((HERE / "front.json").read_text())
    (HERE / "front.md").write_text(table(front))
    print(table(front))


def table(front):
    """The front and the baselines in Markdown."""
    measured = "policy | validation accuracy | test accuracy | energy | weights | average bits"
    lines = [
        f"| {measured} | integers | origin |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for point in [*front["points"], *front["baselines"]]:
        cost = point["cost"]
        cells = [
            f"`{point['policy_hash'][:8]}`" if point["policy_hash"] else "",
            f"{100 * point['accuracy']:.2f} %",
            f"{100 * point['test_accuracy']:.2f} %",
            f"{cost['energy_pj'] / 1000:.1f} nJ",
            f"{cost['weight_bytes'] / 1024:.1f} KiB",
            f"{cost['average_bits_inner']:.2f}",
            in_integers(point),
            point["origin"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_integers(point):
    """Whether the lowered network is the one that was measured."""
    if point["integer_verified"] is None:
        return "–" if point["policy_hash"] else ""
    said = "same" if point["integer_verified"] else "other"
    return f"{said} on {point['integer_samples']}"


if __name__ == "__main__":
    main()
