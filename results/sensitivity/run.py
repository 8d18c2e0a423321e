"""Measure how well each estimator ranks policies, and how long a front of seeds takes.

Usage: python results/sensitivity/run.py [--policies N] [--only-seeds]

1. `policies.csv`: N random policies of the digits space, trained by the default recipe, and their
   KL from the teacher; beside them the 60 trials of results/digits_default.
2. `rank.csv`: Spearman's rank correlation of each estimator's prediction with that KL, with a 95 %
   bootstrap interval, and the seconds the estimate took.
3. `seeds.csv`: seconds for a whole front of seeds for ResNet-50, and for the best policy under two
   budgets, from a table of made-up scores (they do not change the time).
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from adq_search.distill import Teacher
from adq_search.hardware import load_hardware
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.prior import (
    allocate,
    cost_range,
    lagrangian_sweep,
    propose_seeds,
    rank_correlation,
)
from adq_search.provenance import provenance
from adq_search.sensitivity import Labels, SensitivityTable, make_estimator, sensitivity_table
from adq_search.space import SearchSpace
from adq_search.teacher import make_teacher
from adq_search.tracing import trace
from adq_search.trial import run_trial

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SEED = 0
REPEATS = 5
ESTIMATORS = {
    "fisher": ("fisher", {}),
    "fisher, drawn labels": ("fisher", {"labels": Labels(exact_classes=0)}),
    "fisher, data labels": ("fisher", {"labels": Labels("data")}),
    "fisher_output": ("fisher_output", {}),
    "fisher_output, joint": ("fisher_output", {"joint": True}),
    "hessian": ("hessian", {}),
    "kl": ("kl", {}),
    "kl, joint": ("kl", {"joint": True}),
    "lsq_steps": ("lsq_steps", {}),
}


def random_policy(space, rng):
    """Return a policy whose bits come from a random stretch, so that policies differ in size."""
    stretches = {}
    for what in ("weight_bits", "input_bits"):
        low, high = sorted(rng.choice([2, 3, 4, 6, 8], size=2))
        stretches[what] = (low, high)
    precisions = {}
    for group in space.groups:
        if group.pinned is None:
            allowed = [
                p
                for p in group.choices
                if stretches["weight_bits"][0] <= p.weight_bits <= stretches["weight_bits"][1]
                and stretches["input_bits"][0] <= p.input_bits <= stretches["input_bits"][1]
            ]
            precisions[group.name] = allowed[rng.integers(len(allowed))]
    return space.policy_from(precisions)


def measured_policies(planned, teacher, n):
    """Train n random policies; return (policy, kl) of those that completed."""
    rng = np.random.default_rng(SEED)
    job, found = planned.job, []
    for i in range(n):
        policy = random_policy(planned.space, rng)
        costs = planned.totals(policy)
        result, _ = run_trial(policy, planned.task, teacher, job.training, costs, seed=SEED)
        if result.kl is not None:
            found.append((policy, result.kl))
        print(f"policy {i + 1}/{n}: kl {result.kl}", flush=True)
    return found


def recorded_policies(planned):
    """Return (policy, kl) of the trials of results/digits_default."""
    found = []
    with (ROOT / "results" / "digits_default" / "trials.csv").open() as file:
        for row in csv.DictReader(file):
            params = {p.name: row[f"param.{p.name}"] for p in planned.space.parameters}
            typed = {
                p.name: params[p.name] if p.kind == "categorical" else int(params[p.name])
                for p in planned.space.parameters
            }
            if row["kl"]:
                found.append((planned.space.policy_of(typed), float(row["kl"])))
    return found


def interval(predicted, kls):
    """Return a 95 % bootstrap interval of the rank correlation."""
    rng = np.random.default_rng(SEED)
    draws = []
    for _ in range(1000):
        at = rng.integers(len(kls), size=len(kls))
        draws.append(rank_correlation([predicted[i] for i in at], [kls[i] for i in at]))
    return np.nanquantile(draws, [0.025, 0.975])


def rank(planned, teacher, sets):
    """Yield a row an estimator and set of policies."""
    n = planned.job.search.prior_samples
    batch = next(planned.task.train.batches(n, seed=SEED))
    for label, (name, settings) in ESTIMATORS.items():
        start = time.perf_counter()
        table = sensitivity_table(
            make_estimator(name, **settings),
            teacher.network,
            batch.inputs,
            batch.targets,
            planned.space,
            seed=SEED,
        )
        seconds = time.perf_counter() - start
        for which, policies in sets.items():
            predicted = [table.predict(policy) for policy, _ in policies]
            kls = [kl for _, kl in policies]
            low, high = interval(predicted, kls)
            row = {
                "estimator": label,
                "policies": which,
                "n": len(kls),
                "spearman": round(rank_correlation(predicted, kls), 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
                "seconds": round(seconds, 2),
            }
            print(row, flush=True)
            yield row


def seed_times():
    """Yield seconds of a whole front of seeds for ResNet-50, and of two budgets at once."""
    hardware = load_hardware("post_asic_45nm")
    summary = trace(torchvision.models.resnet50(), torch.zeros(1, 3, 224, 224))
    rule = {
        "weight_bits": [2, 3, 4, 6, 8],
        "input_bits": [2, 3, 4, 6, 8],
        "schemes": ["lsq", "asq", "post", "adq"],
        "ema_momenta": [0.9, 0.99],
        "scheme_weight_bits": {"post": [3, 4]},
    }
    space = SearchSpace.from_spec({"default": rule}, summary)
    rng = np.random.default_rng(SEED)
    scores = {"weights": {}, "inputs": {}}
    for part, quantizers in (
        ("weights", ("lsq", "post", "adq")),
        ("inputs", ("lsq", "asq", "n2uq")),
    ):
        for layer in space.names:
            for quantizer in quantizers:
                scale = 10.0 ** rng.uniform(-5, -1)
                for bits in (2, 3, 4, 6, 8):
                    scores[part][layer, quantizer, bits] = scale * 4.0 ** (2 - bits)
    table = SensitivityTable("made up", scores["weights"], scores["inputs"])
    budgets = {}
    for name in ("weight_bytes", "energy_pj"):
        low, high = cost_range(space, summary, name, hardware)
        budgets[name] = low + 0.4 * (high - low)
    tasks = {
        "whole Lagrangian front": lambda: lagrangian_sweep(
            space, summary, table, "energy_pj", hardware
        ),
        "30 seeds spread over it": lambda: propose_seeds(
            space, summary, table, "energy_pj", hardware, n=30
        ),
        "best policy under two budgets": lambda: [
            allocate(space, summary, table, budgets, hardware)
        ],
        "10 seeds near two budgets": lambda: propose_seeds(
            space, summary, table, "energy_pj", hardware, n=10, budgets=budgets
        ),
    }
    for round_ in range(REPEATS):
        for label, work in tasks.items():
            start = time.perf_counter()
            n = len(work())
            seconds = time.perf_counter() - start
            yield {
                "round": round_,
                "task": label,
                "layers": len(summary),
                "policies_in_space": f"{space.n_policies:.3g}",
                "found": n,
                "seconds": round(seconds, 3),
            }


def write_csv(name, rows):
    rows = list(rows)
    with (HERE / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def write_tables(ranks, times):
    """Write the tables of README.md."""
    lines = [
        "| estimator | policies | n | Spearman | 95 % interval | seconds |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    lines += [
        f"| {r['estimator']} | {r['policies']} | {r['n']} | {float(r['spearman']):.3f} | "
        f"{float(r['low']):.3f} to {float(r['high']):.3f} | {float(r['seconds']):.1f} |"
        for r in ranks
    ]
    lines += [
        "",
        "| ResNet-50 | found | median seconds | min | max |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label in dict.fromkeys(r["task"] for r in times):
        own = [r for r in times if r["task"] == label]
        seconds = [float(r["seconds"]) for r in own]
        lines.append(
            f"| {label} | {own[0]['found']} | {statistics.median(seconds):.2f} | "
            f"{min(seconds):.2f} | {max(seconds):.2f} |"
        )
    (HERE / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--policies", type=int, default=40)
    arguments.add_argument("--only-seeds", action="store_true", help="Keep rank.csv as it is.")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    made = provenance(seed=SEED)  # of the tree before files in it change
    by_file = {"seeds.csv": made}
    if options.only_seeds:
        by_file = json.loads((HERE / "provenance.json").read_text()) | by_file
        ranks = list(csv.DictReader((HERE / "rank.csv").open()))
    else:
        by_file |= {"policies.csv": made, "rank.csv": made}
        planned = plan(read_job(ROOT / "search_spaces" / "digits.yaml"))
        teacher = Teacher(make_teacher(planned.task, seed=SEED), planned.task)
        fresh = measured_policies(planned, teacher, options.policies)
        write_csv(
            "policies.csv",
            ({"policy_hash": p.hash, "kl": kl, **planned.space.params_of(p)} for p, kl in fresh),
        )
        sets = {"random": fresh, "default job": recorded_policies(planned)}
        ranks = write_csv("rank.csv", rank(planned, teacher, sets))
    times = write_csv("seeds.csv", seed_times())
    write_tables(ranks, times)
    (HERE / "provenance.json").write_text(json.dumps(by_file, indent=2) + "\n")


if __name__ == "__main__":
    main()
