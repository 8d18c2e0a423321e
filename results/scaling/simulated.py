"""Search the published-sensitivity problem with 1 to 256 parallel workers and heavy-tailed trials.

Usage: python results/scaling/simulated.py [--trials N] [--seeds N]

A worker asks for a policy as soon as its last trial ends; the clock is virtual, the study in
memory. Trial times are drawn from two heavy-tailed laws, by seed and trial number. All searches
are compared at the same number of finished trials: what is asked is how much worse policies are
that were proposed while up to 255 others were still running. The guide runs with and without its
prior, and Optuna's TPE (its constant liar on) beside it. Appends to simulated.csv, so that an
interrupted run goes on; writes simulated.md, simulated.svg and simulated.json.
"""

import argparse
import csv
import heapq
import itertools
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import optuna

from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.provenance import provenance
from adq_search.report.svg import svg_text
from adq_search.simulator import published_problem

HERE = Path(__file__).parent
WORKERS = (1, 4, 16, 64, 256)
#: Hours of a trial. Pareto's law of shape 1.5 has no variance: some trials outlast the search.
TIMES = {
    "lognormal": lambda rng: rng.lognormal(0.0, 1.0),
    "pareto": lambda rng: 1.0 + rng.pareto(1.5),
}
SAMPLERS = {
    "guide": lambda problem, seed: guide_of(problem, seed, problem.prior),
    "guide without prior": lambda problem, seed: guide_of(problem, seed, None),
    "TPE": lambda _, seed: optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, seed=seed
    ),
}
#: Trials finished at which searches are compared; the last is also the end.
EARLY = 100
TARGET = 0.03
TEXTS = ("sampler", "times")
COLORS = {"guide": "#0072B2", "guide without prior": "#009E73", "TPE": "#D55E00"}


def guide_of(problem, seed, prior):
    return PolicySampler(
        problem.space,
        prior=prior,
        costs={"cost": problem.cost_rows},
        objectives=("accuracy", "cost"),
        seed=seed,
    )


def search(sampler, law, workers, seed, n_trials):
    """Return a row for each number of finished trials at which searches are compared."""
    problem = published_problem(seed=seed)
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=SAMPLERS[sampler](problem, seed)
    )
    space = {p.name: distribution(p) for p in problem.space.parameters}
    running, policies, rows = [], [], []
    now = asked_s = 0.0
    while len(policies) < n_trials:
        while len(running) < workers:
            start = time.process_time()
            trial = study.ask(space)
            asked_s += time.process_time() - start
            hours = TIMES[law](np.random.default_rng([seed, trial.number]))
            heapq.heappush(running, (now + hours, trial.number, trial))
        now, _, trial = heapq.heappop(running)
        policies.append(problem.space.policy_of(trial.params))
        found = problem.measure(policies[-1], seed=seed)
        trial.set_user_attr("kl", found.kl)
        study.tell(trial, (found.accuracy, found.cost))
        if len(policies) in (EARLY, n_trials):
            rows.append(
                {
                    "sampler": sampler,
                    "times": law,
                    "workers": workers,
                    "seed": seed,
                    "trials": len(policies),
                    "share": float(problem.share_of_hypervolume(policies)),
                    "distinct": len(set(policies)),
                    "hours": float(now),
                    "suggestion_cpu_ms": 1e3 * asked_s / len(study.trials),
                }
            )
    return rows


def read(file):
    """Return the rows that are there already."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [
            {k: v if k in TEXTS else float(v) for k, v in row.items()}
            for row in csv.DictReader(lines)
        ]


def append(file, rows):
    is_new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def drops(rows, sampler, law, workers, n_trials):
    """Return, for each seed, by what part hypervolume falls short of that of one worker."""
    share = {
        (r["workers"], r["seed"]): r["share"]
        for r in rows
        if (r["sampler"], r["times"], r["trials"]) == (sampler, law, n_trials)
    }
    seeds = sorted(s for w, s in share if w == workers)
    return [1.0 - share[workers, s] / share[1, s] for s in seeds]


def finished(rows, n_trials):
    """Return the rows of the searches that every number of workers has run, by sampler and law."""
    searched = {(r["sampler"], r["times"], r["seed"], r["workers"]) for r in rows
                if r["trials"] == n_trials}  # fmt: skip
    found = {}
    for sampler, law in itertools.product(SAMPLERS, TIMES):
        here = [
            r
            for r in rows
            if (r["sampler"], r["times"]) == (sampler, law)
            and all((sampler, law, r["seed"], w) in searched for w in WORKERS)
        ]
        if here:
            found[sampler, law] = here
    return found


def summary(rows, n_trials):
    lines = [
        f"Share of the true hypervolume of the policies tried after {n_trials} finished trials: "
        "median (least to most) of the seeds. A drop compares a seed with itself on one worker: "
        "median (worst). Negative drops are gains.",
        "",
        f"| sampler | times | seeds | workers | share | drop at {n_trials} | drop at {EARLY} | "
        "times sooner | ms a suggestion |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for (sampler, law), searches in finished(rows, n_trials).items():
        here = [r for r in searches if r["trials"] == n_trials]
        alone = {r["seed"]: r["hours"] for r in here if r["workers"] == 1}
        for w in WORKERS:
            mine = [r for r in here if r["workers"] == w]
            share = [r["share"] for r in mine]
            cells = [sampler, law, str(len(mine)), str(w)]
            cells.append(f"{statistics.median(share):.4f} ({min(share):.4f} to {max(share):.4f})")
            for n in (n_trials, EARLY):
                found = drops(searches, sampler, law, w, n)
                cells.append(f"{statistics.median(found):.2%} ({max(found):.2%})")
            cells.append(f"{statistics.median(alone[r['seed']] / r['hours'] for r in mine):.1f}")
            cells.append(f"{statistics.median(r['suggestion_cpu_ms'] for r in mine):.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for (sampler, law), searches in finished(rows, n_trials).items():
        if sampler == "guide":
            found = drops(searches, sampler, law, 64, n_trials)
            verdict = "met" if max(found) <= TARGET else "missed"
            lines.append(
                f"Target, guide, {law} times: a drop of at most {TARGET:.0%} from 1 to 64 workers; "
                f"median {statistics.median(found):.2%}, worst of {len(found)} seeds "
                f"{max(found):.2%}: {verdict}."
            )
    return "\n".join(lines) + "\n"


def drawn(rows, n_trials):
    """Draw the median drop against the number of workers, one line a sampler, Pareto times."""
    width, height, left, top, bottom = 640, 320, 64, 40, 250
    lines = {
        name: [statistics.median(drops(searches, name, law, w, n_trials)) for w in WORKERS]
        for (name, law), searches in finished(rows, n_trials).items()
        if law == "pareto"
    }
    highest = max(TARGET, *(d for row in lines.values() for d in row)) * 1.1
    lowest = min(0.0, *(d for row in lines.values() for d in row))

    def x(workers):
        return left + math.log(workers) / math.log(WORKERS[-1]) * (width - left - 190)

    def y(drop):
        return bottom - (drop - lowest) / (highest - lowest) * (bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        svg_text(left, 22, f"hypervolume lost, {n_trials} finished trials (%)", weight="bold"),
        svg_text(x(16), bottom + 42, "parallel workers, Pareto trial times", anchor="middle"),
        *(svg_text(x(w), bottom + 20, str(w), anchor="middle") for w in WORKERS),
        *(
            f'<line x1="{left}" x2="{x(256):.1f}" y1="{y(d):.1f}" y2="{y(d):.1f}" '
            f'stroke="{"#999999" if d == 0.0 else "#cc0000"}" '
            f'stroke-dasharray="{"" if d == 0.0 else "5 4"}"/>'
            for d in (0.0, TARGET)
        ),
        svg_text(left - 8, y(0.0) + 4, "0", anchor="end"),
        svg_text(left - 8, y(TARGET) + 4, f"{100 * TARGET:g}", anchor="end"),
        svg_text(x(256) + 10, y(TARGET) + 4, "target, to 64 workers"),
    ]
    for name, row in lines.items():
        points = [(x(w), y(d)) for w, d in zip(WORKERS, row, strict=True)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>'
        )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{COLORS[name]}"/>'
                  for a, b in points]  # fmt: skip
        parts.append(svg_text(points[-1][0] + 10, points[-1][1] + 4, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(trials, seeds):
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = HERE / "simulated.csv"
    known = {(r["sampler"], r["times"], r["workers"], r["seed"], r["trials"]) for r in read(file)}
    for sampler, seed, law, workers in itertools.product(SAMPLERS, range(seeds), TIMES, WORKERS):
        if (sampler, law, workers, seed, trials) not in known:
            rows = search(sampler, law, workers, seed, trials)
            append(file, rows)
            print(rows[-1], flush=True)
            write(read(file), trials)
    write(read(file), trials)


def write(rows, n_trials):
    """Write what there is by now; an interrupted run leaves a table of its finished part."""
    if not finished(rows, n_trials):
        return
    (HERE / "simulated.md").write_text(summary(rows, n_trials))
    (HERE / "simulated.svg").write_text(drawn(rows, n_trials))
    (HERE / "simulated.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    main(**vars(parser.parse_args()))
