"""Trials per hour of this version against an older one, and where a trial's time goes.

Usage: python results/trials_per_hour/run.py OLD [--repeats N] [--jobs NAME ...] [--trials N]

OLD is a folder that holds an installed older version. For commit 83929d4, the one before trials
were made faster:

    git clone . /tmp/old && git -C /tmp/old checkout 83929d4
    pip install --no-deps --target /tmp/old_site /tmp/old
    python results/trials_per_hour/run.py /tmp/old_site

Contestants are warm worker processes with one thread. In every round each contestant measures the
same random policies of the job's space, in turn: calibration, training, batch-norm re-estimation,
evaluation, files. Epochs are equal. Writes rounds.csv, rates.md, phases.md and run.json.
"""

import argparse
import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
SEED = 0
TARGET, TARGET_SHARE = 4.0, 0.85
#: Name: (older version, processes, networks a pass).
CONTESTANTS = {
    "before, 1 worker": (True, 1, 1),
    "now, 1 worker": (False, 1, 1),
    "now, 1 worker, 8 networks a pass": (False, 1, 8),
    "now, 2 workers": (False, 2, 1),
    "now, 2 workers, 8 networks a pass": (False, 2, 8),
}
#: What belongs to which phase, by module and name; what is not named here is training's own.
PHASES = {
    "data": [("tasks._base.TensorPart", "batches")],
    "teacher": [("distill.Teacher", "logits")],
    "conversion and calibration": [("trial", "_student"), ("trial", "Stack")],
    "training": [("trial", "fit"), ("trial", "fit_stack")],
    "batch-norm re-estimation": [("trial", "reestimate_batch_norm_")],
    "evaluation": [("trial", "evaluate"), ("trial", "measure_health")],
    "files": [("session", "write_json"), ("session", "write_atomic"), ("session", "weights_of")],
}


class Clock:
    """Seconds by phase; a phase within another one is taken off the outer one."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self._open = []

    @contextmanager
    def phase(self, name):
        start = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] += spent - self._open.pop()
            if self._open:
                self._open[-1] += spent

    def watch(self, owner, name, phase):
        original = getattr(owner, name)

        def timed(*args, **kwargs):
            with self.phase(phase):
                return original(*args, **kwargs)

        def timed_steps(*args, **kwargs):
            steps = original(*args, **kwargs)
            while True:
                with self.phase(phase):
                    found = next(steps, None)
                if found is None:
                    return
                yield found

        setattr(owner, name, timed_steps if name == "batches" else timed)


def serve(name, folder, n_per_pass):
    """Measure the policies that come in, a list a line; answer with seconds by phase."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    import adq_search.distill  # noqa: PLC0415
    import adq_search.session  # noqa: PLC0415
    import adq_search.tasks._base  # noqa: PLC0415
    import adq_search.trial  # noqa: PLC0415
    from adq_search.cli._spaces import find_job  # noqa: PLC0415
    from adq_search.plan import plan  # noqa: PLC0415
    from adq_search.policy import Policy  # noqa: PLC0415

    job = find_job(name)[0].with_search(prior=None, seed=SEED)
    if n_per_pass > 1:
        job = job.with_training(networks_per_pass=n_per_pass)
    session = adq_search.session.prepare(plan(job), Path(folder) / "session")
    clock = Clock()
    for phase, places in PHASES.items():
        for place, function in places:
            owner = adq_search
            for part in place.split("."):
                owner = getattr(owner, part)
            if hasattr(owner, function):
                clock.watch(owner, function, phase)
    print("ready", flush=True)
    for line in sys.stdin:
        policies = [Policy.from_json(content) for content in json.loads(line)]
        for kept in ("trials", "weights"):
            shutil.rmtree(session.folder / kept, ignore_errors=True)
        clock.seconds.clear()
        with clock.phase("all else"):
            if n_per_pass == 1:
                for policy in policies:
                    session.measure(policy)
            else:
                for i in range(0, len(policies), n_per_pass):
                    session.measure_together(policies[i : i + n_per_pass])
        print(json.dumps(clock.seconds), flush=True)


def start(job, contestant, old, folder):
    """Start the processes of a contestant, each ready to measure."""
    is_old, n_processes, n_per_pass = CONTESTANTS[contestant]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if is_old:
        environment["PYTHONPATH"] = str(old)
    processes = []
    for i in range(n_processes):
        own = Path(folder) / f"{contestant}-{i}"
        own.mkdir()
        command = [sys.executable, __file__, "--serve", job, str(own), str(n_per_pass)]
        process = subprocess.Popen(
            command, env=environment, cwd=own, text=True, stdin=subprocess.PIPE, stdout=-1
        )
        while process.stdout.readline().strip() != "ready":
            if process.poll() is not None:
                raise SystemExit(f"{contestant} on {job} ended with {process.returncode}.")
        processes.append(process)
    return processes


def measure(processes, policies):
    """Return the seconds until all policies are measured, and those of each phase."""
    share = -(-len(policies) // len(processes))
    begin = time.perf_counter()
    for i, process in enumerate(processes):
        part = policies[i * share : (i + 1) * share]
        process.stdin.write(json.dumps(part) + "\n")
        process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for process in processes]
    wall_s = time.perf_counter() - begin
    return wall_s, {k: sum(a.get(k, 0.0) for a in answers) for k in (*PHASES, "all else")}


def race(job, old, repeats, n_trials):
    """Yield a row a contestant and round."""
    from adq_search.cli._spaces import find_job  # noqa: PLC0415
    from adq_search.plan import plan  # noqa: PLC0415

    space = plan(find_job(job)[0]).space
    chance = random.Random(SEED)
    policies = [
        space.policy_of(
            {
                p.name: chance.choice(list(p.values))
                if p.kind == "categorical"
                else chance.randrange(p.low, p.high + 1, p.step or 1)
                for p in space.parameters
            }
        ).to_json()
        for _ in range(n_trials)
    ]
    with tempfile.TemporaryDirectory() as folder:
        teams = {name: start(job, name, old, folder) for name in CONTESTANTS}
        for processes in teams.values():  # the first trials of a process fill its caches
            measure(processes, policies[: 8 * len(processes)])
        for repeat in range(repeats):
            for name, processes in teams.items():
                wall_s, phases = measure(processes, policies)
                rate = 3600.0 * n_trials / wall_s
                print(f"{job:8} {name:36} round {repeat}: {rate:6.0f} trials an hour", flush=True)
                yield {
                    "job": job,
                    "contestant": name,
                    "repeat": repeat,
                    "trials": n_trials,
                    "wall_s": wall_s,
                    **{f"{phase} s": seconds for phase, seconds in phases.items()},
                }
        for processes in teams.values():
            for process in processes:
                process.stdin.close()
                process.wait()


def rates(rows):
    lines = [
        "| job | contestant | trials an hour, median (min to max) | times before | target |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    before = next(name for name, (is_old, _, _) in CONTESTANTS.items() if is_old)
    for job, name in dict.fromkeys((r["job"], r["contestant"]) for r in rows):
        own, base = (
            [3600 * r["trials"] / r["wall_s"] for r in rows if (r["job"], r["contestant"]) == pair]
            for pair in ((job, name), (job, before))
        )
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        lines.append(
            f"| {job} | {name} | {statistics.median(own):.0f} ({min(own):.0f} to {max(own):.0f}) "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {'' if name == before else f'{TARGET:g}'} |"
        )
    return "\n".join(lines) + "\n"


def phases(rows):
    names = [*PHASES, "all else"]
    lines = [
        "Share of a trial's seconds, median. Training: forward, backward and optimizer alone "
        f"(target at least {TARGET_SHARE:.0%}).",
        "",
        f"| job | contestant | {' | '.join(names)} |",
        f"| --- | --- | {' | '.join('---:' for _ in names)} |",
    ]
    for job, contestant in dict.fromkeys((r["job"], r["contestant"]) for r in rows):
        own = [r for r in rows if (r["job"], r["contestant"]) == (job, contestant)]
        totals = [sum(r[f"{name} s"] for name in names) for r in own]
        cells = [
            statistics.median(r[f"{name} s"] / total for r, total in zip(own, totals, strict=True))
            for name in names
        ]
        lines.append(f"| {job} | {contestant} | {' | '.join(f'{c:.1%}' for c in cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", nargs="+", default=["digits", "mnist5k"])
    parser.add_argument("--trials", type=int, default=16)
    asked = parser.parse_args()
    from adq_search.provenance import provenance  # noqa: PLC0415

    rows = []
    for job in asked.jobs:
        rows += race(job, asked.old.resolve(), asked.repeats, asked.trials)
    with (HERE / "rounds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "run.json").write_text(json.dumps(provenance(seed=SEED), indent=2) + "\n")
    (HERE / "rates.md").write_text(rates(rows))
    (HERE / "phases.md").write_text(phases(rows))
    print(rates(rows))
    print(phases(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
