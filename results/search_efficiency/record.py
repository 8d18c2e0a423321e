"""Train policies of a job and record what each measured, epoch by epoch: a table for the simulator.

Usage: python results/search_efficiency/record.py [JOB] [--minutes N] [--seed N]

JOB is a name (`digits`, `mnist5k`) or a job file. Every other policy is drawn at random; the rest
lie along the front of a prior whose losses were multiplied by random factors, so that the table
is dense where searches go. Rows are appended to `measured_JOB.csv`: run it again for more. After
each epoch the network is evaluated as it is, without re-estimated batch norms; the last columns
are the trial's own.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch

from adq_search.convert import apply_policy_, reestimate_batch_norm_
from adq_search.distill import Teacher
from adq_search.evaluation import evaluate
from adq_search.guide import additive_costs, sweep
from adq_search.hardware import cost_table
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.provenance import provenance
from adq_search.session import measure_sensitivity
from adq_search.teacher import make_teacher
from adq_search.training import fit, training_inputs

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COSTS = ("energy_pj", "weight_bytes", "bops")


class Recorder:
    """A monitor that evaluates the network after each epoch."""

    def __init__(self, network, task, teacher):
        self.network, self.task, self.teacher = network, task, teacher
        self.rows = []

    def report(self, epoch, loss):
        found = evaluate(self.network, self.task.validation, self.teacher)
        self.rows.append((loss, found.kl, found.accuracy))

    def should_stop(self):
        return False


def drawn_policies(planned, table, seed):
    """Yield policies: random ones and near-optimal ones in turn."""
    rng = np.random.default_rng(seed)
    groups = planned.space.groups
    width = max(len(g.choices) for g in groups)
    losses = np.full((len(groups), width), np.inf)
    costs = np.zeros((len(groups), width))
    energy = additive_costs(cost_table(planned.summary, planned.space, planned.hardware))[
        "energy_pj"
    ]
    for g, group in enumerate(groups):
        for c, precision in enumerate(group.choices):
            losses[g, c] = sum(table.score(layer, precision) for layer in group.layers)
            costs[g, c] = energy[g][c]
    while True:
        yield [group.choices[rng.integers(len(group.choices))] for group in groups]
        front = sweep(losses * rng.lognormal(0.0, 1.0, losses.shape), costs, rng)
        row = front[rng.integers(len(front))]
        yield [group.choices[c] for group, c in zip(groups, row, strict=True)]


def trained(planned, teacher, policy, seed):
    """Return the figures of one trial, measured as `run_trial` does."""
    task, settings = planned.task, planned.job.training
    torch.manual_seed(seed)
    network = task.make_network()
    network.load_state_dict(teacher.network.state_dict())
    apply_policy_(network, policy, task.calibration(settings.calibration_samples, seed=seed))
    recorder = Recorder(network, task, teacher)
    fit(network, task, settings, teacher=teacher, monitor=recorder, seed=seed)
    reestimate_batch_norm_(network, training_inputs(network, task, settings, seed=seed))
    final = evaluate(network, task.validation, teacher)
    row = {"accuracy": final.accuracy, "loss": final.loss, "kl": final.kl}
    for epoch, (loss, kl, accuracy) in enumerate(recorder.rows, start=1):
        row |= {f"train_loss_{epoch}": loss, f"kl_{epoch}": kl, f"accuracy_{epoch}": accuracy}
    return row


def main(job, minutes, seed):
    torch.set_num_threads(1)
    planned = plan(
        read_job(Path(job) if job.endswith(".yaml") else ROOT / f"search_spaces/{job}.yaml")
    )
    teacher = Teacher(make_teacher(planned.task, seed=planned.job.search.seed), planned.task)
    table = measure_sensitivity(planned, teacher)
    file = HERE / f"measured_{planned.task.name}.csv"
    n_before = sum(1 for _ in file.open()) - 1 if file.exists() else 0
    policies = drawn_policies(planned, table, [seed, n_before])
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        chosen = dict(zip((g.name for g in planned.space.groups), next(policies), strict=True))
        policy = planned.space.policy_from(chosen)
        start = time.perf_counter()
        figures = trained(planned, teacher, policy, planned.job.search.seed)
        totals = planned.totals(policy)
        row = {
            **planned.space.params_of(policy),
            "predicted": table.predict(policy),
            **{name: totals[name] for name in COSTS},
            **figures,
            "wall_s": time.perf_counter() - start,
        }
        is_new = not file.exists()
        with file.open("a", newline="") as out:
            writer = csv.DictWriter(out, row)
            if is_new:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    (HERE / f"measured_{planned.task.name}.json").write_text(
        json.dumps({"job": planned.job.to_plain(), **provenance(seed=seed)}, indent=1)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", nargs="?", default="digits")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
