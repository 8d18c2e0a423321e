"""Time the default job with one worker and with two, by Optuna and by Ray, in turn.

Usage: python results/scaling/workers.py [--repeats N] [--trials N] [--hosts optuna ray]

Trials an hour are counted from the tenth result on disk to the last: start-up, teacher, prior and
report are the same however many workers there are, and whole runs are told beside it. Overhead is
the time from one result to the next, less what the trial itself took, with one worker: what the
host adds to every trial. Appends to workers.csv (a row a run); writes workers.md and workers.json.
Five repeats with both hosts take about 35 minutes on two quiet cores.
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


def figures(rows, host):
    """Yield each figure of a host with its values, a repeat each."""
    one, two = ([r for r in rows if (r["host"], r["workers"]) == (host, w)] for w in ("1", "2"))
    pairs = list(zip(one, two, strict=True))
    of = float
    yield "trials an hour, one worker", [of(r["trials_per_hour"]) for r in one], None
    yield "trials an hour, two workers", [of(r["trials_per_hour"]) for r in two], None
    speedups = [of(b["trials_per_hour"]) / of(a["trials_per_hour"]) for a, b in pairs]
    yield "two workers over one", speedups, f">= {TARGETS['speed-up']}"
    yield "the same of whole runs", [of(a["wall_s"]) / of(b["wall_s"]) for a, b in pairs], None
    yield "seconds a trial, one worker", [of(r["trial_s"]) for r in one], None
    yield "seconds a trial, two workers", [of(r["trial_s"]) for r in two], None
    limit = f"< {TARGETS['overhead_s']}" if host == "ray" else None
    yield "overhead a trial, one worker (s)", [of(r["overhead_s"]) for r in one], limit


def summary(rows):
    lines = [
        "| host | figure | median | min | max | runs | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for host in dict.fromkeys(r["host"] for r in rows):
        for name, values, target in figures(rows, host):
            cells = [f"{f(values):.3g}" for f in (statistics.median, min, max)]
            cells = [host, name, *cells, str(len(values)), target or ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nThe default job with {rows[0]['trials']} trials.\n"


def main(repeats, trials, hosts):
    made = provenance(seed=0)  # of the tree before files in it change
    file = HERE / "workers.csv"
    for repeat in range(repeats):
        for host in hosts:
            for workers in (1, 2):
                row = {"repeat": repeat, **timed_run(host, workers, trials)}
                print(row, flush=True)
                is_new = not file.exists()
                with file.open("a", newline="") as out:
                    writer = csv.DictWriter(out, row)
                    if is_new:
                        writer.writeheader()
                    writer.writerow(
                        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                    )
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    (HERE / "workers.md").write_text(summary(rows))
    (HERE / "workers.json").write_text(json.dumps(made, indent=1) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--hosts", nargs="+", default=["optuna", "ray"])
    main(**vars(parser.parse_args()))
