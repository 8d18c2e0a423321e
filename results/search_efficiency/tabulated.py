"""Run samplers on digits as recorded: a forest fitted to measured_digits.csv answers for training.

Usage: python results/search_efficiency/tabulated.py [--trials N] [--seeds N]

The forest shares no assumption with the guide, and expects rather than measures: noise of 0.1 is
added to log KL. The objectives are KL to the teacher and energy: accuracy on 400 images is mostly
noise. Every sampler runs after the job's own seeds (uniform policies, and eight of the Fisher
prior), as `adq-search run` does. The Gaussian process, whose proposals take seconds, ends at 40
trials. Writes tabulated.csv, .md, .json and .svg.
"""

import argparse
import csv
import json
import statistics
import warnings
from pathlib import Path

import numpy as np
import optuna
import torch
from figures import colour_of, draw
from samplers import PLAIN

from adq_search.distill import Teacher
from adq_search.guide import additive_costs
from adq_search.hardware import cost_table
from adq_search.job import read_job
from adq_search.pareto import hypervolume
from adq_search.plan import plan
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.prior import propose_seeds
from adq_search.provenance import provenance
from adq_search.session import measure_sensitivity
from adq_search.simulator import read_table
from adq_search.teacher import make_teacher

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARKS = (13, 20, 30, 40, 60, 100)
NOISE = 0.1
MOST = {"GP": 40}
SAMPLERS = PLAIN | {
    "guide": lambda k, s: PolicySampler(seed=s, objectives=("kl", "energy_pj"), **k),
}


def search(name, seed, n_trials, known, seeds, table, energy):
    """Return log KL without noise, and energy, of each trial."""
    space = known["space"]
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=SAMPLERS[name](known, seed)
    )
    for policy in seeds:
        study.enqueue_trial(space.params_of(policy))
    parameters = {p.name: distribution(p) for p in space.parameters}
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(n_trials):
        trial = study.ask(parameters)
        policy = space.policy_of(trial.params)
        expected = table.measure(policy).kl
        kl = expected * float(np.exp(NOISE * rng.standard_normal()))
        trial.set_user_attr("kl", kl)
        study.tell(trial, (kl, energy(policy)))
        points.append((np.log(expected), energy(policy)))
    return points


def main(trials, seeds):
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    made = provenance(seed=0)  # before files change
    planned = plan(read_job(ROOT / "search_spaces" / "digits.yaml"))
    teacher = Teacher(make_teacher(planned.task, seed=planned.job.search.seed), planned.task)
    prior = measure_sensitivity(planned, teacher)
    table = read_table(HERE / "measured_digits.csv", planned.space)
    costs = additive_costs(cost_table(planned.summary, planned.space, planned.hardware))
    known = {"space": planned.space, "prior": prior, "costs": costs}
    proposals = propose_seeds(
        planned.space, planned.summary, prior, "energy_pj", planned.hardware, n=8
    )
    first = [*planned.space.uniform_policies().values(), *(p.policy for p in proposals)]

    def energy(policy):
        return planned.totals(policy)["energy_pj"]

    kls = [table.measure(p).kl for p in table.policies]
    reference = (np.log(max(kls)), planned.cost_range("energy_pj")[1])
    rows = []
    for name in SAMPLERS:
        for seed in range(seeds):
            n_trials = min(trials, MOST.get(name, trials))
            points = search(name, seed, n_trials, known, first, table, energy)
            for n in (m for m in MARKS if m <= n_trials):
                volume = hypervolume(points[:n], ("minimize", "minimize"), reference)
                rows.append({"sampler": name, "seed": seed, "trials": n, "hypervolume": volume})
        print(rows[-1], flush=True)
    best = max(r["hypervolume"] for r in rows)
    marks = sorted({r["trials"] for r in rows})
    lines = [
        f"Hypervolume of log KL (of the forest, without noise) and energy over the largest of all "
        f"runs; median (min to max) of {seeds} seeds; {len(table.policies)} recorded policies, "
        f"{len(planned.space.parameters)} dimensions, {len(first)} seeds first.",
        "",
        f"| sampler | {' | '.join(map(str, marks))} |",
        f"| --- | {' | '.join('---:' for _ in marks)} |",
    ]
    drawn = []
    for name in SAMPLERS:
        cells, columns = [], []
        for mark in marks:
            ours = [
                r["hypervolume"] / best
                for r in rows
                if r["sampler"] == name and r["trials"] == mark
            ]
            if not ours:
                cells.append("–")
                continue
            columns.append(ours)
            cells.append(f"{statistics.median(ours):.3f} ({min(ours):.3f} to {max(ours):.3f})")
        drawn.append((name, colour_of(name), "-", marks[: len(columns)], columns))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    with (HERE / "tabulated.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows({**r, "hypervolume": f"{r['hypervolume'] / best:.5g}"} for r in rows)
    draw(HERE / "tabulated.svg", drawn, x="trials", y="share of the largest hypervolume")
    (HERE / "tabulated.md").write_text("\n".join(lines) + "\n")
    (HERE / "tabulated.json").write_text(json.dumps(made, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    main(**vars(parser.parse_args()))
