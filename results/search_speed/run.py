"""Time the default job as a whole process, with one worker and with two, in turn.

Usage: python results/search_speed/run.py [REPEATS]

Writes speed.csv (a row a run) and speed.md (medians, ratios and their spread).
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def timed_run(workers):
    """Return the figures of one run, the import of torch and the start of workers included."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "digits"
        command = [sys.executable, "-m", "adq_search.cli", "run"]
        command += ["--out", str(folder), "--workers", str(workers)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - start
        front = json.loads((folder / "front.json").read_text())
        run = json.loads((folder / "run.json").read_text())
    seconds = front["seconds"]
    training_s = seconds["teacher"] + seconds["training"]
    return {
        "workers": workers,
        "trials": front["counts"]["complete"],
        "wall_s": wall_s,
        "teacher_s": seconds["teacher"],
        "prior_s": seconds["prior"],
        "trials_s": seconds["trials"],
        "training_s": training_s,
        "overhead": 1.0 - training_s / wall_s if workers == 1 else float("nan"),
        "commit": run["commit"],
        "torch": run["versions"]["torch"],
    }


def main(repeats=5):
    rows = []
    for repeat in range(repeats):
        for workers in (1, 2):
            rows.append({"repeat": repeat, **timed_run(workers)})
            print(rows[-1], flush=True)
    with (HERE / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "speed.md").write_text(summary(rows))
    print(summary(rows))


def summary(rows):
    one = [r for r in rows if r["workers"] == 1]
    two = [r for r in rows if r["workers"] == 2]
    speedups = [a["wall_s"] / b["wall_s"] for a, b in zip(one, two, strict=True)]
    overheads = [100 * r["overhead"] for r in one]
    lines = ["| figure | median | min | max | runs |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, values in (
        ("wall seconds, one worker", [r["wall_s"] for r in one]),
        ("wall seconds, two workers", [r["wall_s"] for r in two]),
        ("two workers are faster by", speedups),
        ("not training, % of the wall time of one worker", overheads),
    ):
        cells = [
            name,
            *(f"{f(values):.2f}" for f in (statistics.median, min, max)),
            str(len(values)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    made = f"\n{one[0]['trials']} trials, torch {one[0]['torch']}, commit {one[0]['commit']}.\n"
    return "\n".join(lines) + "\n" + made


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
