"""When does the stop rule end a search, and what has it got by then? On the simulator.

Usage: python results/search_efficiency/stopped.py [--seeds N] [--trials N]

Each sampler runs all trials on the published-sensitivity problem. After each trial the rule is
asked as `adq_search.stopping.settled` asks it, with the known noise of a measured KL; the first yes
is where the search would have ended. Writes stopped.csv, stopped.md and stopped.json.
"""

import argparse
import csv
import json
import statistics
import warnings
from pathlib import Path

import numpy as np
import optuna

from adq_search.job import StopSettings
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.provenance import provenance
from adq_search.simulator import published_problem
from adq_search.stopping import growth_and_error

HERE = Path(__file__).parent
DIRECTIONS = ("maximize", "minimize")
PATIENCES = (10, 20, 40)
ERRORS = StopSettings().errors
N_DRAWS = 200
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


def searched(sampler, seed, trials):
    """Return the problem, the policies in order, and what was measured of them."""
    problem = published_problem(seed=seed)
    study = optuna.create_study(directions=DIRECTIONS, sampler=SAMPLERS[sampler](problem, seed))
    space = {p.name: distribution(p) for p in problem.space.parameters}
    policies, found = [], []
    for _ in range(trials):
        trial = study.ask(space)
        policies.append(problem.space.policy_of(trial.params))
        found.append(problem.measure(policies[-1], seed=seed))
        trial.set_user_attr("kl", found[-1].kl)
        study.tell(trial, (found[-1].accuracy, found[-1].cost))
    return problem, policies, found


def ends_of(problem, found, seed):
    """Return after how many trials the rule ends the search, by patience; all where it does not."""
    values = np.array([(f.accuracy, f.cost) for f in found])
    kls = np.array([f.kl for f in found])
    ends = {}
    for n in range(2 * min(PATIENCES), len(found) + 1):
        z = np.random.default_rng([seed, n]).standard_normal((N_DRAWS, n))
        drawn = np.repeat(values[None, :n], N_DRAWS, axis=0)
        drawn[..., 0] = np.exp(-kls[:n] * np.exp(problem.noise * z))
        _, error = growth_and_error(values[:n], drawn, n, DIRECTIONS)
        for patience in PATIENCES:
            growth, _ = growth_and_error(values[:n], drawn[:1], n - patience, DIRECTIONS)
            if n >= 2 * patience and growth < ERRORS * error:
                ends.setdefault(patience, n)
        if len(ends) == len(PATIENCES):
            break
    return {patience: ends.get(patience, len(found)) for patience in PATIENCES}


def main(seeds, trials):
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for sampler in SAMPLERS:
        for seed in range(seeds):
            problem, policies, found = searched(sampler, seed, trials)
            whole = problem.share_of_hypervolume(policies)
            for patience, n in ends_of(problem, found, seed).items():
                share = problem.share_of_hypervolume(policies[:n])
                rows.append(
                    {"sampler": sampler, "seed": seed, "patience": patience, "trials": n}
                    | {"hypervolume": share, "hypervolume_of_all": whole}
                )
        print(rows[-1], flush=True)
    lines = [
        f"Where the stop rule (growth below {ERRORS:g} standard errors) ends searches of {trials} "
        f"trials, and the share of the true hypervolume then and in the end; median (min to max) "
        f"of {seeds} seeds.",
        "",
        "| sampler | patience | ends after | hypervolume then | hypervolume in the end |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for sampler in SAMPLERS:
        for patience in PATIENCES:
            here = [r for r in rows if (r["sampler"], r["patience"]) == (sampler, patience)]
            cells = []
            for name, digits in (("trials", 0), ("hypervolume", 4), ("hypervolume_of_all", 4)):
                column = [r[name] for r in here]
                low, middle, high = min(column), statistics.median(column), max(column)
                cells.append(f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
            lines.append(f"| {sampler} | {patience} | {' | '.join(cells)} |")
    with (HERE / "stopped.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    (HERE / "stopped.md").write_text("\n".join(lines) + "\n")
    (HERE / "stopped.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    main(**vars(parser.parse_args()))
