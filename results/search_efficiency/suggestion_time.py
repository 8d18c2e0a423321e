"""Time one suggestion at 1,000 trials and 60 dimensions: the guide beside Optuna's samplers.

Usage: python results/search_efficiency/suggestion_time.py [--repeats N]

In every round each sampler answers `study.ask` once for all 60 parameters, in turn, in its own
study with the same 1,000 trials; the trial is then told, so that every round learns one trial
more. Writes suggestion_time.csv (a row a round and sampler), suggestion_time.md and
suggestion_time.json.
"""

import argparse
import csv
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import optuna

from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.provenance import provenance
from adq_search.space import Group, SearchSpace, params_of_group

HERE = Path(__file__).parent
N_GROUPS, N_TRIALS = 15, 1000
TARGET_MS = 10.0


def space_of():
    bits = (2, 3, 4, 6, 8)
    names = [f"layer{i}" for i in range(N_GROUPS)]
    schemes = ("lsq", "adq", "asq")
    groups = [Group(n, (n,), bits, bits, schemes=schemes, ema_momenta=(0.9, 0.99)) for n in names]
    return SearchSpace(tuple(names), tuple(groups))


def finished(space, rows, n, seed):
    """Return n finished trials of random policies."""
    rng = np.random.default_rng(seed)
    distributions = {p.name: distribution(p) for p in space.parameters}
    out = []
    for _ in range(n):
        chosen = [g.choices[rng.integers(len(g.choices))] for g in space.groups]
        params = {}
        for group, precision in zip(space.groups, chosen, strict=True):
            params |= params_of_group(group, precision)
        kl = sum(4.0**-p.weight_bits + 4.0**-p.input_bits for p in chosen)
        kl *= float(np.exp(0.1 * rng.standard_normal()))
        cost = sum(
            r[g.choices.index(p)] for r, g, p in zip(rows, space.groups, chosen, strict=True)
        )
        out.append(
            optuna.create_trial(
                params=params,
                distributions=distributions,
                values=[float(np.exp(-kl)), float(cost)],
                user_attrs={"kl": kl},
            )
        )
    return out


def main(repeats):
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = space_of()
    rows = tuple(
        np.array([float((i + 1) * p.weight_bits * p.input_bits) for p in g.choices])
        for i, g in enumerate(space.groups)
    )
    known = {"costs": {"cost": rows}, "objectives": ("accuracy", "cost")}
    samplers = {
        "random": optuna.samplers.RandomSampler(seed=0),
        "guide": PolicySampler(space, seed=0, **known),
        "guide, space alone": PolicySampler(space, seed=0),
        "TPE multivariate": optuna.samplers.TPESampler(multivariate=True, seed=0),
        "TPE": optuna.samplers.TPESampler(seed=0),
        "NSGA-II": optuna.samplers.NSGAIISampler(seed=0),
    }
    trials = finished(space, rows, N_TRIALS, seed=0)
    studies = {}
    for name, sampler in samplers.items():
        studies[name] = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        studies[name].add_trials(trials)
    distributions = {p.name: distribution(p) for p in space.parameters}
    found = []
    for repeat in range(repeats + 1):
        for name, study in studies.items():
            wall, cpu = time.perf_counter(), time.process_time()
            trial = study.ask(distributions)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            trial.set_user_attr("kl", trials[repeat].user_attrs["kl"])
            study.tell(trial, trials[repeat].values)
            found.append(
                {"round": repeat, "sampler": name, "wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}
            )
    with (HERE / "suggestion_time.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, found[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in found
        )
    lines = [
        f"Milliseconds of one `ask`, {len(distributions)} dimensions, two objectives, {repeats} "
        f"rounds after {N_TRIALS} trials. Reading those trials and the first fit are in `first`.",
        "",
        "| sampler | median | 10 % | 90 % | processor time, median | less random's | first |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    floor = statistics.median(
        r["wall_ms"] for r in found if r["sampler"] == "random" and r["round"]
    )
    for name in studies:
        ours = [r for r in found if r["sampler"] == name]
        wall = [r["wall_ms"] for r in ours[1:]]
        deciles = statistics.quantiles(wall, n=10)
        median = statistics.median(wall)
        figures = [median, deciles[0], deciles[-1]]
        figures += [statistics.median(r["cpu_ms"] for r in ours[1:]), median - floor]
        cells = [f"{f:.1f}" for f in (*figures, ours[0]["wall_ms"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Target: {TARGET_MS:g} ms."]
    (HERE / "suggestion_time.md").write_text("\n".join(lines) + "\n")
    (HERE / "suggestion_time.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=40)
    main(**vars(parser.parse_args()))
