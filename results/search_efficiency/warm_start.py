"""Does a short warm trial rank policies as a long cold one does, and better than a short cold one?

Usage: python results/search_efficiency/warm_start.py [--seeds N] [--policies N]

Per seed, policies of digits in a fixed order: every other one drawn at random, the rest an earlier
one with three layers drawn anew, as in a search that closes in. Each is trained cold for LONG
epochs (twice, with two seeds: how well a long trial ranks as another does is the best to be hoped
for), and for each length in SHORT cold and warm. A warm trial begins from the nearest warm trial
before it of the same length, the first one from the teacher. Rows go to warm_start.csv as a seed is
done: started again, it goes on with the next seed. Writes warm_start.md and warm_start.json too.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from adq_search.distill import Teacher
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.provenance import provenance
from adq_search.teacher import make_teacher
from adq_search.trial import run_trial, weights_of
from adq_search.warm_start import Donor, distance, nearest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILE = HERE / "warm_start.csv"
SHORT = (1, 2)
LONG = 8
N_CHANGED = 3


def drawn(space, n, seed):
    """Return distinct policies: random ones, and neighbours of earlier ones, in turn."""
    rng = np.random.default_rng(seed)
    searched = [g for g in space.groups if g.pinned is None]
    chosen = {}
    while len(chosen) < n:
        if len(chosen) % 2 and chosen:
            row = dict(list(chosen.values())[rng.integers(len(chosen))])
            moved = rng.choice(len(searched), N_CHANGED, replace=False)
        else:
            row = {g.name: g.choices[0] for g in space.groups}
            moved = range(len(searched))
        for i in moved:
            group = searched[i]
            row[group.name] = group.choices[rng.integers(len(group.choices))]
        chosen[space.policy_from(row)] = row
    return list(chosen)


def measured(planned, teacher, policy, epochs, seed, donor=None):
    settings = planned.job.training.model_copy(update={"epochs": epochs})
    return run_trial(policy, planned.task, teacher, settings, {}, donor=donor, seed=seed)


def rows_of(planned, teacher, n, seed):
    """Yield one row a policy."""
    donors = {epochs: {} for epochs in SHORT}
    for order, policy in enumerate(drawn(planned.space, n, seed)):
        row = {"seed": seed, "order": order, "policy": policy.hash}
        runs = {f"long_{s}": measured(planned, teacher, policy, LONG, 100 + s)[0] for s in (0, 1)}
        for epochs in SHORT:
            runs[f"cold_{epochs}"], _ = measured(planned, teacher, policy, epochs, seed)
            near = nearest(policy, donors[epochs])
            donor = None if near is None else donors[epochs][near]
            warm, network = measured(planned, teacher, policy, epochs, seed, donor)
            if warm.state == "complete":
                total = epochs + warm.epochs_before
                donors[epochs][policy] = Donor(policy, weights_of(network), total)
            runs[f"warm_{epochs}"] = warm
            row[f"distance_{epochs}"] = "" if near is None else distance(policy, near)
            row[f"epochs_before_{epochs}"] = warm.epochs_before
        for name, result in runs.items():
            row |= {f"{name}.kl": result.kl, f"{name}.accuracy": result.accuracy}
            row[f"{name}.train_s"] = result.train_s
        yield row


def summary(rows):
    """Return what warm_start.md says."""
    seeds = sorted({r["seed"] for r in rows})
    arms = [f"{kind}_{epochs}" for epochs in SHORT for kind in ("cold", "warm")] + ["long_1"]
    lines = [
        f"Spearman's rank correlation with a cold trial of {LONG} epochs (its KL to the teacher "
        "and its accuracy), over the policies of a seed: median (min to max) of "
        f"{len(seeds)} seeds of {len(rows) // len(seeds)} policies. Trials at chance or not finite "
        "are left out. The "
        "last column is the correlation of a policy's place in the order with how much better it "
        "ranks than in the long trial: what earlier donors gave to later policies.",
        "",
        "| trial | KL | accuracy | median KL, nats | gain by order |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for arm in arms:
        figures = {"kl": [], "accuracy": [], "level": [], "order": []}
        for seed in seeds:
            here = [r for r in rows if r["seed"] == seed and r[f"{arm}.kl"] and r["long_0.kl"]]
            kl = [float(r[f"{arm}.kl"]) for r in here]
            long_kl = [float(r["long_0.kl"]) for r in here]
            figures["kl"].append(spearmanr(kl, long_kl)[0])
            pairs = zip(*((r[f"{arm}.accuracy"], r["long_0.accuracy"]) for r in here), strict=True)
            figures["accuracy"].append(spearmanr(*([float(x) for x in side] for side in pairs))[0])
            figures["level"].append(statistics.median(kl))
            gained = np.argsort(np.argsort(long_kl)) - np.argsort(np.argsort(kl))
            figures["order"].append(spearmanr([int(r["order"]) for r in here], gained)[0])
        kind, epochs = arm.split("_")
        name = (
            f"cold, {LONG} epochs, another seed" if kind == "long" else f"{kind}, {epochs} epochs"
        )
        cells = [
            f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in figures.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(seeds, policies):
    made = provenance(seed=0)  # of the tree before files in it change
    torch.set_num_threads(1)
    planned = plan(read_job(ROOT / "search_spaces" / "digits.yaml"))
    teacher = Teacher(make_teacher(planned.task, seed=planned.job.search.seed), planned.task)
    done = {r["seed"] for r in csv.DictReader(FILE.open())} if FILE.exists() else set()
    for seed in range(seeds):
        if str(seed) in done:
            continue
        rows = list(rows_of(planned, teacher, policies, seed))
        with FILE.open("a", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            if out.tell() == 0:
                writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )
        print(f"seed {seed} done", flush=True)
        write_summary(made)
    write_summary(made)


def write_summary(made):
    text = summary(list(csv.DictReader(FILE.open())))
    (HERE / "warm_start.md").write_text(text)
    (HERE / "warm_start.json").write_text(json.dumps(made, indent=1) + "\n")
    print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--policies", type=int, default=30)
    main(**vars(parser.parse_args()))
