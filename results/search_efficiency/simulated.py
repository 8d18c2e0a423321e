"""Run samplers on the published-sensitivity problem: share of the true hypervolume by trials.

Usage: python results/search_efficiency/simulated.py [--trials N] [--seeds N] [--only SAMPLER ...]

Each sampler runs with each seed of the problem, plain and after the same twelve policies that a
Lagrangian sweep of the prior proposes; "seeds only" is those twelve. Two shares are written: of
the true points of all policies tried, and of those on the front that the noisy measurements show.
The Gaussian process ends at 100 trials: its proposals take seconds. Writes simulated.csv, .md,
.json and .svg; with `--only`, the rows of other samplers stay as they are. The JSON file says for
each sampler how its rows were made.
"""

import argparse
import csv
import json
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from figures import colour_of, draw
from samplers import PLAIN, guided

from adq_search.guide import decisions_of, sweep
from adq_search.pareto import front_indices
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.provenance import provenance
from adq_search.simulator import published_problem

HERE = Path(__file__).parent
MARKS = (12, 24, 50, 60, 100, 200, 240, 400)
N_SEEDS = 12
MOST = {"GP": 100}
TARGETS = {50: 0.98, 400: 0.995}


SAMPLERS = PLAIN | {
    "guide without prior": partial(guided, has_prior=False),
    "guide": guided,
    "guide, space alone": lambda p, s: PolicySampler(p.space, seed=s),
}


def seeds_of(problem):
    """Return twelve policies spread over the logarithm of cost along the prior's front."""
    decisions = decisions_of(problem.space, problem.prior, [problem.cost_rows])
    losses = np.array([d.predicted for d in decisions])
    costs = np.array([d.costs[0] for d in decisions])
    rows = sweep(losses, costs, np.random.default_rng(0))
    position = np.log(problem.cost(rows))
    chosen = []
    for target in np.linspace(position.min(), position.max(), N_SEEDS):
        nearest = np.argsort(np.abs(position - target), kind="stable")
        chosen.append(next(i for i in nearest if i not in chosen))
    groups = problem.space.groups
    return [
        problem.space.policy_from(
            {g.name: g.choices[c] for g, c in zip(groups, rows[i], strict=True)}
        )
        for i in chosen
    ]


def search(name, is_seeded, seed, n_trials):
    """Yield a row for each mark."""
    problem = published_problem(seed=seed)
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=SAMPLERS[name](problem, seed)
    )
    seeds = seeds_of(problem) if is_seeded else []
    for policy in seeds:
        study.enqueue_trial(problem.space.params_of(policy))
    space = {p.name: distribution(p) for p in problem.space.parameters}
    policies, points, seconds = [], [], 0.0
    for n in range(1, n_trials + 1):
        start = time.process_time()
        trial = study.ask(space)
        seconds += time.process_time() - start
        policies.append(problem.space.policy_of(trial.params))
        found = problem.measure(policies[-1], seed=seed)
        trial.set_user_attr("kl", found.kl)
        points.append((found.accuracy, found.cost))
        study.tell(trial, points[-1])
        if n in MARKS:
            front = front_indices(points, ("maximize", "minimize"))
            yield {
                "sampler": name,
                "seeded": is_seeded,
                "seed": seed,
                "trials": n,
                "tried": problem.share_of_hypervolume(policies),
                "shown": problem.share_of_hypervolume([policies[i] for i in front]),
                "distinct": len(set(policies)),
                "suggestion_cpu_ms": 1e3 * seconds / n,
            }


def column(rows, key, mark, what):
    """Return one figure of a sampler at a number of trials, seed by seed."""
    return [r[what] for r in rows if (r["sampler"], r["seeded"], r["trials"]) == (*key, mark)]


def label(key):
    """Return the name of a sampler, plain or seeded."""
    return f"seeds, then {key[0]}" if key[1] else key[0]


def figure(rows):
    """Draw the shares by trials; of the guide's forms, the one that searches use."""
    lines = []
    for key in dict.fromkeys((r["sampler"], r["seeded"]) for r in rows):
        if not key[0].startswith("guide") or key == ("guide", True):
            marks = sorted({r["trials"] for r in rows if (r["sampler"], r["seeded"]) == key})
            columns = [column(rows, key, mark, "tried") for mark in marks]
            lines.append((label(key), colour_of(key[0]), "-" if key[1] else ":", marks, columns))
    draw(HERE / "simulated.svg", lines, x="trials", y="share of the true hypervolume")


def summary(rows, n_seeds):
    """Return a table of medians, smallest and largest over the seeds."""
    marks = sorted({r["trials"] for r in rows})
    lines = [
        f"Share of the true hypervolume of all policies tried, median (min to max) of {n_seeds} "
        "seeds; in the last column, of those on the front that the noisy measurements show.",
        "",
        f"| sampler | {' | '.join(map(str, marks))} | shown at {marks[-1]} |",
        f"| --- | {' | '.join('---:' for _ in marks)} | ---: |",
    ]
    for key in dict.fromkeys((r["sampler"], r["seeded"]) for r in rows):
        cells = []
        for mark in marks:
            tried = column(rows, key, mark, "tried")
            cells.append(
                f"{statistics.median(tried):.3f} ({min(tried):.3f} to {max(tried):.3f})"
                if tried
                else "–"
            )
        shown = column(rows, key, marks[-1], "shown")
        cells.append(f"{statistics.median(shown):.3f}" if shown else "–")
        lines.append(f"| {label(key)} | {' | '.join(cells)} |")
    lines.append("")
    for mark, target in TARGETS.items():
        here = [r for r in rows if r["sampler"] == "guide" and r["trials"] == mark]
        for is_seeded in (False, True):
            ours = [r["tried"] for r in here if r["seeded"] == is_seeded]
            if ours:
                lines.append(
                    f"Target at {mark} trials: {target}; guide{', seeded' if is_seeded else ''}: "
                    f"{statistics.median(ours):.4f}."
                )
    return "\n".join(lines) + "\n"


def earlier_rows(names):
    """Return the rows of samplers other than these, and how those were made."""
    if not (HERE / "simulated.csv").exists():
        return [], {}
    with (HERE / "simulated.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["sampler"] not in names]
    kinds = {"seed": int, "trials": int, "distinct": int}
    kinds |= {"tried": float, "shown": float, "suggestion_cpu_ms": float}
    for row in rows:
        row["seeded"] = row["seeded"] == "True"
        row |= {name: kind(row[name]) for name, kind in kinds.items()}
    made = json.loads((HERE / "simulated.json").read_text())
    return rows, {name: made.get(name, made) for name in {r["sampler"] for r in rows}}


def main(trials, seeds, only):
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows, made = earlier_rows(only)
    for name in only:
        made[name] = provenance(seed=0)
        for is_seeded in (False, True):
            if is_seeded and name in ("random", "guide, space alone"):
                continue
            for seed in range(seeds):
                rows += search(name, is_seeded, seed, min(trials, MOST.get(name, trials)))
            print(name, is_seeded, {k: round(v, 3) for k, v in rows[-1].items() if k == "tried"})
    order = list(SAMPLERS)
    rows.sort(key=lambda r: (order.index(r["sampler"]), r["seeded"], r["seed"], r["trials"]))
    with (HERE / "simulated.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    figure(rows)
    (HERE / "simulated.md").write_text(summary(rows, seeds))
    (HERE / "simulated.json").write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    print(summary(rows, seeds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    main(**vars(parser.parse_args()))
