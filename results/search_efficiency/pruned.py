"""What FrontPruner saves: on the simulator with samplers, and on recorded curves of digits.

Usage: python results/search_efficiency/pruned.py [--seeds N] [--trials N] [--only PROBLEM]

Simulator: each sampler runs a number of trials to the end, and once more with the pruner until it
has spent half of those epochs. Forest: the same on digits, after the job's own seeds, where a
forest fitted to measured_digits.csv answers for training, with noise; the training losses that the
pruner sees are those of the recorded trial of nearest KL, which flatters it. Recorded: the trials
of measured_digits.csv in random orders, each stopped or not by their training loss. All compare
the hypervolume of what finished; condemned trials that were spared tell the rate of false stops.
Writes pruned.csv, pruned.md and pruned.json; with --only, the rows of that problem alone are new.
"""

import argparse
import csv
import json
import statistics
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import torch
from samplers import FEW

from adq_search.distill import Teacher
from adq_search.guide import additive_costs
from adq_search.hardware import cost_table
from adq_search.job import read_job
from adq_search.pareto import hypervolume
from adq_search.plan import plan
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_pruner import FrontPruner
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.prior import propose_seeds
from adq_search.provenance import provenance
from adq_search.session import measure_sensitivity
from adq_search.simulator import published_problem, read_table
from adq_search.teacher import make_teacher

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DIRECTIONS = ("maximize", "minimize")
#: Of the logarithm of a KL that the forest answers with.
NOISE = 0.1
SETTINGS = {
    "none": None,
    "rungs 1 to 5, 0.6": {"rungs": (1, 2, 3, 4, 5), "confidence": 0.6},
    "rungs 1 to 5, 0.8": {"rungs": (1, 2, 3, 4, 5), "confidence": 0.8},
    "rungs 1 to 5, 0.9": {"rungs": (1, 2, 3, 4, 5), "confidence": 0.9},
}


def simulated(sampler, setting, seed, n_epochs):
    """Run a study until its epochs are spent, and return its figures."""
    problem = published_problem(seed=seed)
    study = optuna.create_study(directions=DIRECTIONS, sampler=FEW[sampler](problem, seed))
    pruner = FrontPruner(**SETTINGS[setting], seed=seed) if SETTINGS[setting] else None
    space = {p.name: distribution(p) for p in problem.space.parameters}
    finished, spent = [], 0
    while spent < n_epochs:
        trial = study.ask(space)
        policy = problem.space.policy_of(trial.params)
        found = problem.measure(policy, seed=seed)
        for epoch, kl in enumerate(found.curve, start=1):
            spent += 1
            if pruner is not None and pruner.should_stop(trial, epoch, kl, known=[found.cost]):
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            trial.set_user_attr("kl", found.kl)
            study.tell(trial, (found.accuracy, found.cost))
            finished.append(policy)
    return problem.share_of_hypervolume(finished), len(study.trials), spent, pruner, study


class Forest:
    """Digits with a forest for training: KL to the teacher against energy."""

    def __init__(self, planned, table):
        teacher = Teacher(make_teacher(planned.task, seed=planned.job.search.seed), planned.task)
        prior = measure_sensitivity(planned, teacher)
        costs = additive_costs(cost_table(planned.summary, planned.space, planned.hardware))
        found = propose_seeds(
            planned.space, planned.summary, prior, "energy_pj", planned.hardware, n=8
        )
        self.planned, self.table, self.space = planned, table, planned.space
        self.seeds = [*planned.space.uniform_policies().values(), *(s.policy for s in found)]
        self.known = {"space": planned.space, "prior": prior, "costs": costs}
        kls = [table.measure(p).kl for p in table.policies]
        self.reference = (np.log(max(kls)), planned.cost_range("energy_pj")[1])

    def sampler(self, name, seed):
        if name == "guide":
            return PolicySampler(objectives=("kl", "energy_pj"), seed=seed, **self.known)
        return FEW[name](None, seed)


def grown(forest, sampler, setting, seed, n_epochs):
    """Search on the forest until the epochs are spent, and return the figures."""
    study = optuna.create_study(
        directions=("minimize", "minimize"), sampler=forest.sampler(sampler, seed)
    )
    for policy in forest.seeds:
        study.enqueue_trial(forest.space.params_of(policy))
    pruner = FrontPruner(**SETTINGS[setting], seed=seed) if SETTINGS[setting] else None
    space = {p.name: distribution(p) for p in forest.space.parameters}
    rng = np.random.default_rng(seed)
    points, spent = [], 0
    while spent < n_epochs:
        trial = study.ask(space)
        policy = forest.space.policy_of(trial.params)
        found = forest.table.measure(policy)
        kl = found.kl * float(np.exp(NOISE * rng.standard_normal()))
        energy = forest.planned.totals(policy)["energy_pj"]
        is_seed = trial.number < len(forest.seeds)  # these always finish, as in a job
        for epoch, loss in enumerate(found.scores, start=1):
            spent += 1
            is_over = pruner is not None and pruner.should_stop(trial, epoch, loss, known=[energy])
            if is_over and not is_seed:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            trial.set_user_attr("kl", kl)
            study.tell(trial, (kl, energy))
            points.append((np.log(found.kl), energy))
    volume = hypervolume(points, ("minimize", "minimize"), forest.reference)
    return volume, len(study.trials), spent, pruner, study


def recorded(table, costs, setting, seed):
    """Replay the recorded trials in a random order, and return the figures."""
    study = optuna.create_study(directions=DIRECTIONS)
    pruner = FrontPruner(**SETTINGS[setting], seed=seed) if SETTINGS[setting] else None
    order = np.random.default_rng(seed).permutation(len(table.policies))
    points, spent = [], 0
    for i in order:
        policy = table.policies[i]
        found = table.measure(policy)
        trial = study.ask()
        for epoch, score in enumerate(found.scores, start=1):
            spent += 1
            if pruner is not None and pruner.should_stop(trial, epoch, score, known=[costs[i]]):
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            points.append((found.accuracy, costs[i]))
            study.tell(trial, points[-1])
    reference = (min(table.measure(p).accuracy for p in table.policies), max(costs))
    return hypervolume(points, DIRECTIONS, reference), len(order), spent, pruner, study


def row_of(problem, sampler, setting, seed, figures, budget):
    share, n_trials, spent, pruner, study = figures
    row = {"problem": problem, "sampler": sampler, "pruner": setting, "seed": seed}
    row |= {"hypervolume": share, "trials": n_trials, "epochs": spent}
    stops = pruner.false_stops(study) if pruner else None
    for name in ("n_condemned", "n_spared", "n_on_front"):
        row[name] = getattr(stops, name, "")
    return {**row, "budget": budget}


def summary(rows):
    lines = [
        "Medians (min to max) over seeds. Hypervolume: share of the true front's on the "
        "simulator, of the largest of all runs on the forest, of that of all recorded trials.",
        "",
        "| problem | sampler | pruner | epochs | trials | hypervolume | false stops |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for key in dict.fromkeys((r["problem"], r["sampler"], r["pruner"], r["budget"]) for r in rows):
        here = [r for r in rows if (r["problem"], r["sampler"], r["pruner"], r["budget"]) == key]
        volume = [float(r["hypervolume"]) for r in here]
        spared, wrong = (sum(int(r[n] or 0) for r in here) for n in ("n_spared", "n_on_front"))
        lines.append(
            f"| {' | '.join(key[:3])} | {statistics.median(int(r['epochs']) for r in here):.0f} | "
            f"{statistics.median(int(r['trials']) for r in here):.0f} | "
            f"{statistics.median(volume):.4f} ({min(volume):.4f} to {max(volume):.4f}) | "
            f"{f'{wrong} of {spared} spared' if key[2] != 'none' else ''} |"
        )
    return "\n".join(lines) + "\n"


def rows_of_simulator(seeds, trials):
    for sampler in FEW:
        yield from searched("simulator", sampler, seeds, 9 * trials, simulated)


def rows_of_forest(seeds, trials, planned, table):
    forest = Forest(planned, table)
    epochs = planned.job.training.epochs
    rows = [
        row
        for sampler in FEW
        for row in searched("forest", sampler, seeds, epochs * trials, partial(grown, forest))
    ]
    return shares(rows, max(r["hypervolume"] for r in rows))


def rows_of_records(seeds, planned, table):
    costs = [planned.totals(policy)["energy_pj"] for policy in table.policies]
    rows = [
        row_of("digits", "recorded", setting, seed, recorded(table, costs, setting, seed), 0)
        for setting in SETTINGS
        for seed in range(4 * seeds)
    ]
    return shares(rows, rows[0]["hypervolume"])


def searched(problem, sampler, seeds, epochs, search):
    """Yield a row a seed: all epochs and half of them without the pruner, half of them with it."""
    for setting in SETTINGS:
        for budget in (epochs, epochs // 2) if setting == "none" else (epochs // 2,):
            for seed in range(seeds):
                figures = search(sampler, setting, seed, budget)
                yield row_of(problem, sampler, setting, seed, figures, budget)
            print(problem, sampler, setting, budget, figures[:3], flush=True)


def shares(rows, whole):
    return [{**row, "hypervolume": row["hypervolume"] / whole} for row in rows]


def main(seeds, trials, only):
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    planned = plan(read_job(ROOT / "search_spaces" / "digits.yaml"))
    table = read_table(HERE / "measured_digits.csv", planned.space)
    problems = {
        "simulator": lambda: rows_of_simulator(seeds, trials),
        "forest": lambda: rows_of_forest(seeds, trials, planned, table),
        "digits": lambda: rows_of_records(seeds, planned, table),
    }
    rows = []
    for name, measure in problems.items():
        if only in (None, name):
            rows += [
                {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in measure()
            ]
        else:
            with (HERE / "pruned.csv").open(newline="") as lines:
                rows += [row for row in csv.DictReader(lines) if row["problem"] == name]
    with (HERE / "pruned.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = summary(list(csv.DictReader((HERE / "pruned.csv").open())))
    (HERE / "pruned.md").write_text(text)
    (HERE / "pruned.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--only", choices=["simulator", "forest", "digits"])
    main(**vars(parser.parse_args()))
