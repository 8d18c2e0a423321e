"""Trials per hour of this version against an older one, and where a trial's time goes.

Usage: python results/trials_per_hour/run.py OLD [--repeats N] [--jobs NAME ...] [--trials N]
       python results/trials_per_hour/run.py OLD --go-on    (after it was cut off)
       python results/trials_per_hour/run.py --tables       (write the tables of rounds.csv again)

OLD is a folder that holds an installed older version. For commit 83929d4, the one before trials
were made faster:

    git clone . /tmp/old && git -C /tmp/old checkout 83929d4
    pip install --no-deps --target /tmp/old_site /tmp/old
    python results/trials_per_hour/run.py /tmp/old_site

Contestants are warm worker processes with one thread. In every round each contestant measures the
same random policies of the job's space, in turn: calibration, training, batch-norm re-estimation,
evaluation, files. Epochs are equal. A finished round is appended to rounds.csv at once; rates.md,
phases.md and run.json follow it, in the folder of the processor's instructions (`avx2`, `avx512`).
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
from typing import NamedTuple

HERE = Path(__file__).parent
SEED = 0
TARGET, TARGET_SHARE = 4.0, 0.85
#: Trials of a round: on two cores digits' rounds take two minutes, mnist5k's seven.
TRIALS = {"digits": 16, "mnist5k": 8}


class Contestant(NamedTuple):
    """Who measures: which version, with how many processes and networks a pass, and what."""

    is_old: bool = False
    processes: int = 1
    per_pass: int = 1
    is_float: bool = False
    precision: str = "float32"


CORES = os.cpu_count() or 1
BEFORE = "before, 1 worker"
CONTESTANTS = {
    BEFORE: Contestant(is_old=True),
    "now, 1 worker": Contestant(),
    f"now, {CORES} workers": Contestant(processes=CORES),
    "now, 1 worker, 8 networks a pass": Contestant(per_pass=8),
    f"now, {CORES} workers, 8 networks a pass": Contestant(processes=CORES, per_pass=8),
    f"now, {CORES} workers, bfloat16": Contestant(processes=CORES, precision="bfloat16"),
    "floor: now, 1 worker, nothing quantized": Contestant(is_float=True),
    f"floor: now, {CORES} workers, nothing quantized": Contestant(is_float=True, processes=CORES),
}

PURE = ("forward and loss", "backward", "optimizer")
#: What belongs to which phase, by module and name; what is in no other phase is "all else".
PLACES = {
    "data": ["tasks._base.TensorPart.batches"],
    "teacher": ["distill.Teacher.logits"],
    "conversion and calibration": ["trial._student", "trial.Stack"],
    "forward and loss": ["training.distillation_loss"],  # and the call of the network in training
    "backward": ["torch.Tensor.backward"],
    "optimizer": ["torch.optim.SGD.step", "torch.optim.SGD.zero_grad"],
    "rest of training": ["trial.fit", "trial.fit_stack"],
    "batch-norm re-estimation": ["trial.reestimate_batch_norm_"],
    "evaluation": ["trial.evaluate", "trial.measure_health"],
    "files": ["session.write_json", "session.write_atomic", "session.weights_of"],
}
PHASES = (*PLACES, "all else")


def contestants_here():
    """Names of those that this processor has the arithmetic for."""
    from adq_search.training import multiplies_bfloat16  # noqa: PLC0415

    can_half = multiplies_bfloat16()
    return [name for name, c in CONTESTANTS.items() if can_half or c.precision == "float32"]


class Clock:
    """Seconds by phase; a phase within another one is taken off the outer one."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self._open = []  # of each open phase: name, start, seconds of phases within it

    def begin(self, name):
        self._open.append([name, time.perf_counter(), 0.0])

    def end(self):
        name, start, within = self._open.pop()
        spent = time.perf_counter() - start
        self.seconds[name] += spent - within
        if self._open:
            self._open[-1][2] += spent

    @contextmanager
    def phase(self, name):
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def watch(self, owner, name, phase):
        """Put a function's time into a phase."""
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

        def timed_training(network, *args, **kwargs):
            hooks = (
                network.register_forward_pre_hook(lambda *_: self.begin("forward and loss")),
                network.register_forward_hook(lambda *_: self.end()),
            )
            with self.phase(phase):
                outcome = original(network, *args, **kwargs)
            for hook in hooks:
                hook.remove()
            return outcome

        kinds = {"batches": timed_steps, "fit": timed_training, "fit_stack": timed_training}
        setattr(owner, name, kinds.get(name, timed))


def serve(name, folder, per_pass, precision):
    """Measure the policies that come in, a list a line; answer with seconds by phase."""
    import torch  # noqa: PLC0415

    import adq_search.session  # noqa: PLC0415
    from adq_search.cli._spaces import find_job  # noqa: PLC0415
    from adq_search.plan import plan  # noqa: PLC0415
    from adq_search.policy import Policy  # noqa: PLC0415

    try:
        from adq_search.own_process import set_up_process  # noqa: PLC0415
    except ImportError:  # an older version set threads alone
        torch.set_num_threads(1)
    else:
        set_up_process(1)
    job = find_job(name)[0].with_search(prior=None, seed=SEED)
    if per_pass > 1:
        job = job.with_training(networks_per_pass=per_pass)
    if precision != "float32":  # an older version knows no other
        job = job.with_training(precision=precision)
    session = adq_search.session.prepare(plan(job), Path(folder) / "session")

    def measure(policies):
        for kept in ("trials", "weights", "checkpoints"):
            shutil.rmtree(session.folder / kept, ignore_errors=True)
        if per_pass == 1:
            session.measure(policies[0])
        else:
            session.measure_together(policies)

    clock = Clock()
    for phase, places in PLACES.items():
        for place in places:
            *path, function = place.split(".")
            owner = torch if path[0] == "torch" else adq_search
            for part in path[1:] if path[0] == "torch" else path:
                owner = getattr(owner, part)
            if hasattr(owner, function):  # an older version has no stacks
                clock.watch(owner, function, phase)
    print("ready", flush=True)
    for line in sys.stdin:
        policies = [Policy.from_json(content) for content in json.loads(line)]
        clock.seconds.clear()
        cpu_s = time.process_time()
        with clock.phase("all else"):
            for i in range(0, len(policies), per_pass):
                measure(policies[i : i + per_pass])
        print(json.dumps({**clock.seconds, "cpu": time.process_time() - cpu_s}), flush=True)


def start(job, name, old, folder):
    """Start the processes of a contestant, each ready to measure."""
    contestant = CONTESTANTS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if contestant.is_old:
        environment["PYTHONPATH"] = str(old)
    processes = []
    for i in range(contestant.processes):
        own = Path(folder) / f"{name}-{i}"
        own.mkdir()
        options = [str(own), str(contestant.per_pass), contestant.precision]
        command = [sys.executable, __file__, "--serve", job, *options]
        process = subprocess.Popen(
            command, env=environment, cwd=own, text=True, stdin=subprocess.PIPE, stdout=-1
        )
        while process.stdout.readline().strip() != "ready":
            if process.poll() is not None:
                raise SystemExit(f"{name} on {job} ended with {process.returncode}.")
        processes.append(process)
    return processes


def measure(processes, policies):
    """Return the seconds until all policies are measured, and those of each phase."""
    share = -(-len(policies) // len(processes))
    begin = time.perf_counter()
    for i, process in enumerate(processes):
        process.stdin.write(json.dumps(policies[i * share : (i + 1) * share]) + "\n")
        process.stdin.flush()
    lines = [process.stdout.readline() for process in processes]
    if not all(lines):
        raise SystemExit("A process ended before it answered. Measure the rest with --go-on.")
    answers = [json.loads(line) for line in lines]
    wall_s = time.perf_counter() - begin
    seconds = {f"{k} s": sum(a.get(k, 0.0) for a in answers) for k in ("cpu", *PHASES)}
    return {"wall s": wall_s, **seconds}


def race(job, old, n_trials, rounds):
    """Yield the rows of each round, one a contestant."""
    from adq_search.cli._spaces import find_job  # noqa: PLC0415
    from adq_search.plan import plan  # noqa: PLC0415
    from adq_search.policy import FLOAT, Policy  # noqa: PLC0415

    planned = plan(find_job(job)[0])
    chance = random.Random(SEED)
    drawn = [
        planned.space.policy_of(
            {
                p.name: chance.choice(list(p.values))
                if p.kind == "categorical"
                else chance.randrange(p.low, p.high + 1, p.step or 1)
                for p in planned.space.parameters
            }
        ).to_json()
        for _ in range(n_trials)
    ]
    plain = Policy.uniform([layer.name for layer in planned.summary.layers], FLOAT).to_json()
    with tempfile.TemporaryDirectory() as folder:
        teams = {name: start(job, name, old, folder) for name in contestants_here()}

        def policies_of(name):
            return [plain] * n_trials if CONTESTANTS[name].is_float else drawn

        for name, processes in teams.items():  # the first trials of a process fill its caches
            measure(processes, policies_of(name))
        for number in rounds:
            rows = []
            for name, processes in teams.items():
                found = measure(processes, policies_of(name))
                rate = 3600.0 * n_trials / found["wall s"]
                print(f"{job:8} {name:40} round {number}: {rate:6.0f} trials an hour", flush=True)
                rows.append(
                    {"job": job, "contestant": name, "round": number, "trials": n_trials, **found}
                )
            yield rows
        for processes in teams.values():
            for process in processes:
                process.stdin.close()
                process.wait()


def rates(rows):
    lines = [
        "| job | contestant | trials an hour, median (min to max) | times before "
        "| times before, by processor time | target |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for job, name in dict.fromkeys((r["job"], r["contestant"]) for r in rows):
        own, base = (
            [r for r in rows if (r["job"], r["contestant"]) == pair]
            for pair in ((job, name), (job, BEFORE))
        )
        hourly = [3600 * r["trials"] / r["wall s"] for r in own]
        ratios = [
            [b[column] / a[column] for a, b in zip(own, base, strict=True)]
            for column in ("wall s", "cpu s")
        ]
        lines.append(
            f"| {job} | {name} | {_spread(hourly, 0)} | {_spread(ratios[0], 2)} "
            f"| {_spread(ratios[1], 2)} | {'' if name == BEFORE else f'{TARGET:g}'} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values, digits):
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def phases(rows):
    lines = [
        "Share of a trial's seconds, median. The last column sums forward, loss, backward and "
        f"optimizer: at least {TARGET_SHARE:.0%} is the target.",
        "",
        f"| job | contestant | {' | '.join(PHASES)} | pure training |",
        f"| --- | --- | {' | '.join('---:' for _ in (*PHASES, ''))} |",
    ]
    for job, name in dict.fromkeys((r["job"], r["contestant"]) for r in rows):
        own = [r for r in rows if (r["job"], r["contestant"]) == (job, name)]
        shares = [
            {k: r[f"{k} s"] / sum(r[f"{phase} s"] for phase in PHASES) for k in PHASES} for r in own
        ]
        cells = [statistics.median(s[k] for s in shares) for k in PHASES]
        cells.append(statistics.median(sum(s[k] for k in PURE) for s in shares))
        lines.append(f"| {job} | {name} | {' | '.join(f'{c:.1%}' for c in cells)} |")
    return "\n".join(lines) + "\n"


def read_rounds(file):
    with file.open(newline="") as lines:
        return [
            {k: v if k in ("job", "contestant") else float(v) for k, v in row.items()}
            for row in csv.DictReader(lines)
        ]


def write_tables(folder, rows):
    (folder / "rates.md").write_text(rates(rows))
    (folder / "phases.md").write_text(phases(rows))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", nargs="+", default=["digits", "mnist5k"])
    parser.add_argument("--trials", type=int, help="Trials of a round [16; on mnist5k 8].")
    parser.add_argument("--out", type=Path, help="Folder of the tables [by instruction set].")
    parser.add_argument("--go-on", action="store_true", help="Keep the rounds of rounds.csv.")
    parser.add_argument("--tables", action="store_true", help="Only write the tables again.")
    asked = parser.parse_args()
    from adq_search.provenance import instructions, provenance  # noqa: PLC0415

    asked.out = asked.out or HERE / instructions()
    made = provenance(seed=SEED)  # of the tree before files in it change
    file, kept = asked.out / "rounds.csv", asked.out / "run.json"
    asked.out.mkdir(parents=True, exist_ok=True)
    is_kept = asked.tables or (asked.go_on and file.exists())
    rows = read_rounds(file) if is_kept else []
    if asked.tables:
        write_tables(asked.out, rows)
        return
    if asked.old is None:
        parser.error("name the folder of the older version")
    if not rows:
        file.unlink(missing_ok=True)
    runs = json.loads(kept.read_text()) if rows and kept.exists() else {}
    for job in asked.jobs:
        done = len({r["round"] for r in rows if r["job"] == job})
        n_trials = asked.trials or TRIALS.get(job, 8)
        if done >= asked.repeats:
            continue
        runs[job] = made
        kept.write_text(json.dumps(runs, indent=2) + "\n")
        for new in race(job, asked.old.resolve(), n_trials, range(done, asked.repeats)):
            is_first = not file.exists()
            with file.open("a", newline="") as out:
                writer = csv.DictWriter(out, new[0])
                if is_first:
                    writer.writeheader()
                writer.writerows(new)
            rows += new
            write_tables(asked.out, rows)
    print(rates(rows))
    print(phases(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
