"""Time a training step of K networks stacked into one, each under a policy of its own.

Usage: python results/many_policies/run.py [--repeats N] [--jobs NAME ...] [--threads N]

Sixteen random policies of each job's own space; for each K they are trained in 16 / K stacks. In
every round each contestant takes one step (forward, distillation loss, backward, optimizer), in
turn. Writes steps.csv (a row a job, K and round), steps.md (medians and spread) and run.json.
"""

import argparse
import csv
import json
import random
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from adq_search.cli._spaces import find_job
from adq_search.convert import apply_policy_
from adq_search.distill import Teacher, distillation_loss
from adq_search.layout import fast_layout
from adq_search.norms import fused_norms
from adq_search.plan import plan
from adq_search.provenance import provenance
from adq_search.stacking import Stack
from adq_search.training import _parameter_groups

HERE = Path(__file__).parent
SEED = 0
N_POLICIES = 16
SIZES = (1, 2, 4, 8, 16)
N_WARM = 2


def draw(space, chance):
    """Return a random policy of a space."""
    values = {
        p.name: chance.choice(list(p.values))
        if p.kind == "categorical"
        else chance.randrange(p.low, p.high + 1, p.step or 1)
        for p in space.parameters
    }
    return space.policy_of(values)


def stepper(network, batch, answers, settings, until):
    """Return a function that takes one training step, as `fit` does, and returns its seconds."""
    until.enter_context(fused_norms(network))
    inputs = batch.inputs.to(memory_format=fast_layout(network, batch.inputs[:1]))
    optimizer = torch.optim.SGD(
        _parameter_groups(network, settings),
        lr=1e-4,
        momentum=settings.momentum,
        nesterov=True,
        fused=True,
    )

    def step():
        start = time.perf_counter()
        logits = network(inputs)
        losses = [
            distillation_loss(own, batch.targets, answers, settings.distillation)
            for own in (logits if logits.ndim == 3 else [logits])
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def race(name, repeats):
    """Yield a row a round and K for one job."""
    planned = plan(find_job(name)[0])
    settings, task = planned.job.training, planned.task
    torch.manual_seed(SEED)
    teacher = Teacher(task.make_network(), task)
    chance = random.Random(SEED)
    policies = [draw(planned.space, chance) for _ in range(N_POLICIES)]
    calibration = task.calibration(settings.calibration_samples, seed=SEED)
    batch = next(task.train.batches(settings.batch_size, seed=SEED))
    answers = teacher.logits(batch)

    def student(policy):
        network = task.make_network()
        network.load_state_dict(teacher.network.state_dict())
        return apply_policy_(network, policy, calibration).train()

    with ExitStack() as until:
        steppers = {}
        for size in SIZES:
            networks = [student(policy) for policy in policies]
            groups = [networks[i : i + size] for i in range(0, N_POLICIES, size)]
            whole = [group[0] if size == 1 else Stack(group) for group in groups]
            steppers[size] = [stepper(net, batch, answers, settings, until) for net in whole]
        for repeat in range(-N_WARM, repeats):
            for size, steps in steppers.items():
                spent = sum(step() for step in steps) / N_POLICIES
                if repeat >= 0:
                    yield {"job": name, "networks": size, "repeat": repeat, "network_step_s": spent}


def summary(rows):
    lines = [
        "| job | networks a pass | ms a network and step, median (min to max) | times faster |",
        "| --- | ---: | ---: | ---: |",
    ]
    for job, size in dict.fromkeys((r["job"], r["networks"]) for r in rows):
        own, one = (
            [r["network_step_s"] * 1e3 for r in rows if (r["job"], r["networks"]) == (job, k)]
            for k in (size, 1)
        )
        ratios = [a / b for a, b in zip(one, own, strict=True)]
        lines.append(
            f"| {job} | {size} | {statistics.median(own):.1f} ({min(own):.1f} to {max(own):.1f}) "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--jobs", nargs="+", default=["digits", "mnist5k"])
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    made = provenance(seed=SEED)  # of the tree before files in it change
    rows = [row for name in asked.jobs for row in race(name, asked.repeats)]
    with (HERE / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "run.json").write_text(json.dumps({**made, "threads": asked.threads}, indent=2) + "\n")
    (HERE / "steps.md").write_text(summary(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
