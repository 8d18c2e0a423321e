"""Time the default job with one worker and with two, by Optuna and by Ray.

Usage: python results/scaling/workers.py [--repeats N] [--trials N] [--hosts optuna ray] [--out DIR]

A repeat runs one worker, two, two, one: what changes steadily in the host's speed weighs as much on
both. A repeat's figure for one worker is the mean of its first and last run, that for two the mean
of the others, and its ratio is that of these means.

Trials an hour are counted from the tenth result on disk to the last: start-up, teacher, prior and
report are the same however many workers there are, and whole runs are told beside it. Overhead is
the time from one result to the next, less what the trial itself took, with one worker: what the
host adds to every trial. Appends to workers.csv (a row a run) in `--out`; writes workers.md and
workers.json. Five repeats with both hosts take about 70 minutes on two quiet cores.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adq_search.provenance import provenance

HERE = Path(__file__).parent
SKIPPED = 10
ORDER = (1, 2, 2, 1)
TARGETS = {"speed-up": 1.8, "overhead_s": 0.5}


def timed_run(host, workers, n_trials):
    """Return the figures of one run of the command line."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "digits"
        command = [sys.executable, "-m", "adq_search.cli", "run", "digits", "--host", host]
        command += ["--out", str(folder), "--workers", str(workers), "--trials", str(n_trials)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - start
        files = sorted((folder / "trials").glob("*.json"), key=lambda f: f.stat().st_mtime_ns)
        ends = [file.stat().st_mtime for file in files]
        own_s = [json.loads(file.read_text())["wall_s"] for file in files]
    n = len(files) - SKIPPED
    span_s = ends[-1] - ends[SKIPPED - 1]
    return {
        "host": host,
        "workers": workers,
        "trials": len(files),
        "wall_s": wall_s,
        "trials_per_hour": 3600.0 * n / span_s,
        "trial_s": statistics.fmean(own_s[SKIPPED:]),
        "overhead_s": workers * span_s / n - statistics.fmean(own_s[SKIPPED:]),
    }


def whole_repeats(rows, host):
    """Return the rows of each repeat of a host that was run to its end."""
    repeats = []
    for row in rows:
        if row["host"] != host:
            continue
        if row["position"] == "0":
            repeats.append([])
        repeats[-1].append(row)
    return [repeat for repeat in repeats if len(repeat) == len(ORDER)]


def figures(rows, host):
    """Yield each figure of a host with its values, a repeat each."""
    repeats = whole_repeats(rows, host)
    if not repeats:
        return

    def of(name, workers):
        return [
            statistics.fmean(float(r[name]) for r in repeat if r["workers"] == str(workers))
            for repeat in repeats
        ]

    one, two = of("trials_per_hour", 1), of("trials_per_hour", 2)
    yield "trials an hour, one worker", one, None
    yield "trials an hour, two workers", two, None
    speedups = [b / a for a, b in zip(one, two, strict=True)]
    yield "two workers over one", speedups, f">= {TARGETS['speed-up']}"
    walls = zip(of("wall_s", 1), of("wall_s", 2), strict=True)
    yield "the same of whole runs", [a / b for a, b in walls], None
    yield "seconds a trial, one worker", of("trial_s", 1), None
    yield "seconds a trial, two workers", of("trial_s", 2), None
    limit = f"< {TARGETS['overhead_s']}" if host == "ray" else None
    yield "overhead a trial, one worker (s)", of("overhead_s", 1), limit


def summary(rows):
    lines = [
        "| host | figure | median | min | max | repeats | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for host in dict.fromkeys(r["host"] for r in rows):
        for name, values, target in figures(rows, host):
            cells = [f"{f(values):.3g}" for f in (statistics.median, min, max)]
            cells = [host, name, *cells, str(len(values)), target or ""]
            lines.append(f"| {' | '.join(cells)} |")
    made_of = "A repeat is four runs: one worker, two, two, one."
    lines += ["", f"The default job with {rows[0]['trials']} trials. {made_of}"]
    return "\n".join(lines) + "\n"


def main(repeats, trials, hosts, out):
    made = provenance(seed=0)  # of the tree before files in it change
    out.mkdir(parents=True, exist_ok=True)
    file = out / "workers.csv"
    for repeat in range(repeats):
        for host in hosts:
            for position, workers in enumerate(ORDER):
                row = {
                    "repeat": repeat,
                    **timed_run(host, workers, trials),
                    "position": position,
                }
                print(row, flush=True)
                append(row, file)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    (out / "workers.md").write_text(summary(rows))
    (out / "workers.json").write_text(json.dumps(made, indent=1) + "\n")
    print(summary(rows))


def append(row, file):
    is_new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, row)
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--hosts", nargs="+", default=["optuna", "ray"])
    parser.add_argument("--out", type=Path, default=HERE)
    main(**vars(parser.parse_args()))
