"""What FrontPruner saves: on the simulator with samplers, and on recorded curves of digits.

Usage: python results/search_efficiency/pruned.py [--seeds N] [--trials N]

Simulator: each sampler runs a number of trials to the end, and once more with the pruner until it
has spent half of those epochs. Recorded: the trials of measured_digits.csv in random orders, each
stopped or not by the pruner, which sees their training loss. Both compare the hypervolume of what
finished; condemned trials that were spared tell the rate of false stops. Writes pruned.csv,
pruned.md and pruned.json.
"""

import argparse
import csv
import json
import statistics
import warnings
from pathlib import Path

import numpy as np
import optuna

from adq_search.job import read_job
from adq_search.pareto import hypervolume
from adq_search.plan import plan
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_pruner import FrontPruner
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.provenance import provenance
from adq_search.simulator import published_problem, read_table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DIRECTIONS = ("maximize", "minimize")
SETTINGS = {
    "none": None,
    "rungs 1 to 5, 0.6": {"rungs": (1, 2, 3, 4, 5), "confidence": 0.6},
    "rungs 1 to 5, 0.8": {"rungs": (1, 2, 3, 4, 5), "confidence": 0.8},
    "rungs 1 to 5, 0.9": {"rungs": (1, 2, 3, 4, 5), "confidence": 0.9},
}
SAMPLERS = {
    "guide": lambda p, s: PolicySampler(
        p.space,
        prior=p.prior,
        costs={"cost": p.cost_rows},
        objectives=("accuracy", "cost"),
        seed=s,
    ),
    "TPE multivariate": lambda _, s: optuna.samplers.TPESampler(multivariate=True, seed=s),
    "random": lambda _, s: optuna.samplers.RandomSampler(seed=s),
}


def simulated(sampler, setting, seed, n_epochs):
    """Run a study until its epochs are spent, and return its figures."""
    problem = published_problem(seed=seed)
    study = optuna.create_study(directions=DIRECTIONS, sampler=SAMPLERS[sampler](problem, seed))
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


def row_of(problem, sampler, setting, seed, figures):
    share, n_trials, spent, pruner, study = figures
    row = {"problem": problem, "sampler": sampler, "pruner": setting, "seed": seed}
    row |= {"hypervolume": share, "trials": n_trials, "epochs": spent}
    stops = pruner.false_stops(study) if pruner else None
    for name in ("n_condemned", "n_spared", "n_on_front"):
        row[name] = getattr(stops, name, "")
    return row


def summary(rows):
    lines = [
        "Medians (min to max) over seeds. Hypervolume: share of the true front's on the "
        "simulator, of that of all recorded trials on digits.",
        "",
        "| problem | sampler | pruner | epochs | trials | hypervolume | false stops |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for key in dict.fromkeys((r["problem"], r["sampler"], r["pruner"], r["budget"]) for r in rows):
        here = [r for r in rows if (r["problem"], r["sampler"], r["pruner"], r["budget"]) == key]
        volume = [r["hypervolume"] for r in here]
        spared = sum(r["n_spared"] or 0 for r in here)
        wrong = sum(r["n_on_front"] or 0 for r in here)
        lines.append(
            f"| {' | '.join(key[:3])} | {statistics.median(r['epochs'] for r in here):.0f} | "
            f"{statistics.median(r['trials'] for r in here):.0f} | "
            f"{statistics.median(volume):.4f} ({min(volume):.4f} to {max(volume):.4f}) | "
            f"{f'{wrong} of {spared} spared' if key[2] != 'none' else ''} |"
        )
    return "\n".join(lines) + "\n"


def main(seeds, trials):
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    full = 9 * trials
    for sampler in SAMPLERS:
        for setting in SETTINGS:
            for budget in (full, full // 2) if setting == "none" else (full // 2,):
                for seed in range(seeds):
                    figures = simulated(sampler, setting, seed, budget)
                    found = row_of("simulator", sampler, setting, seed, figures)
                    rows.append({**found, "budget": budget})
                print(rows[-1], flush=True)
    planned = plan(read_job(ROOT / "search_spaces" / "digits.yaml"))
    table = read_table(HERE / "measured_digits.csv", planned.space)
    costs = [planned.totals(policy)["energy_pj"] for policy in table.policies]
    for setting in SETTINGS:
        for seed in range(4 * seeds):
            found = row_of(
                "digits", "recorded", setting, seed, recorded(table, costs, setting, seed)
            )
            rows.append({**found, "budget": 0})
        print(rows[-1], flush=True)
    whole = next(r["hypervolume"] for r in rows if r["problem"] == "digits")
    for row in rows:
        if row["problem"] == "digits":
            row["hypervolume"] /= whole
    with (HERE / "pruned.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    (HERE / "pruned.md").write_text(summary(rows))
    (HERE / "pruned.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=100)
    main(**vars(parser.parse_args()))
