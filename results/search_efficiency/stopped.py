"""When does the stop rule end a search, and what has it got by then? On the simulator.

Usage: python results/search_efficiency/stopped.py [--seeds N] [--trials N]

Each sampler runs all trials on the published-sensitivity problem. After each trial the rule is
asked as `adq_search.stopping.settled` asks it, with the known noise of a measured KL; the first yes
is where the search would have ended. Rows go to stopped.csv as a search is done: started again with
the same number of trials, it goes on. Writes stopped.md and stopped.json too.
"""

import argparse
import csv
import json
import statistics
import warnings
from pathlib import Path

import numpy as np
import optuna
from samplers import FEW

from adq_search.job import StopSettings
from adq_search.plugins.optuna_objective import distribution
from adq_search.provenance import provenance
from adq_search.simulator import published_problem
from adq_search.stopping import growth_and_error

HERE = Path(__file__).parent
FILE = HERE / "stopped.csv"
DIRECTIONS = ("maximize", "minimize")
PATIENCES = (10, 20, 40)
ERRORS = StopSettings().errors
N_DRAWS = 200


def searched(sampler, seed, trials):
    """Return the problem, the policies in order, and what was measured of them."""
    problem = published_problem(seed=seed)
    study = optuna.create_study(directions=DIRECTIONS, sampler=FEW[sampler](problem, seed))
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


def rows_of(sampler, seed, trials):
    """Search, and return a row for each patience."""
    problem, policies, found = searched(sampler, seed, trials)
    whole = problem.share_of_hypervolume(policies)
    rows = []
    for patience, n in ends_of(problem, found, seed).items():
        row = {"sampler": sampler, "seed": seed, "patience": patience, "of": trials, "trials": n}
        row["hypervolume"] = problem.share_of_hypervolume(policies[:n])
        rows.append({**row, "hypervolume_of_all": whole})
    return rows


def summary(rows):
    """Return what stopped.md says."""
    n_seeds, (trials,) = len({r["seed"] for r in rows}), {r["of"] for r in rows}
    lines = [
        f"Where the stop rule (growth below {ERRORS:g} standard errors) ends searches of {trials} "
        "trials, and the share of the true hypervolume then and in the end; median (min to max) "
        f"of {n_seeds} seeds. Saved: trials of all seeds. Lost: the median of what each seed lost.",
        "",
        "| sampler | patience | ends after | saved | hypervolume then | in the end | lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for sampler, patience in dict.fromkeys((r["sampler"], r["patience"]) for r in rows):
        here = [r for r in rows if (r["sampler"], r["patience"]) == (sampler, patience)]
        n, then, end = (
            [float(r[name]) for r in here]
            for name in ("trials", "hypervolume", "hypervolume_of_all")
        )
        saved = 1.0 - statistics.fmean(n) / int(trials)
        lost = [b - a for a, b in zip(then, end, strict=True)]
        lines.append(
            f"| {sampler} | {patience} | {cell(n, 0)} | {100 * saved:.0f} % | {cell(then, 4)} | "
            f"{cell(end, 4)} | {cell(lost, 4)} |"
        )
    return "\n".join(lines) + "\n"


def cell(values, digits):
    """Return median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def read_rows(trials):
    """Return the rows measured before, none where those searches had other lengths."""
    rows = list(csv.DictReader(FILE.open(newline=""))) if FILE.exists() else []
    return rows if all(r["of"] == str(trials) for r in rows) else []


def main(seeds, trials):
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = read_rows(trials)
    done = {(r["sampler"], int(r["seed"])) for r in rows}
    if not done:
        FILE.unlink(missing_ok=True)
    for sampler in FEW:
        for seed in range(seeds):
            if (sampler, seed) in done:
                continue
            found = rows_of(sampler, seed, trials)
            with FILE.open("a", newline="") as out:
                writer = csv.DictWriter(out, found[0], lineterminator="\n")
                if out.tell() == 0:
                    writer.writeheader()
                writer.writerows(
                    {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
                    for row in found
                )
            print(found[-1], flush=True)
        text = summary(read_rows(trials))
        (HERE / "stopped.md").write_text(text)
        (HERE / "stopped.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    main(**vars(parser.parse_args()))
