"""Time how long a trial stands still to save itself, and how long it takes to go on.

Usage: python results/checkpoints/run.py [--repeats N]

In every round each network is saved and taken up once, in turn. Writes times.csv (a row a network
and round), times.md (medians and spread) and run.json. Weights are random: they do not change the
time.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision

from adq_search.checkpoint import TrainingCheckpoint
from adq_search.convert import apply_policy_
from adq_search.job import TrainingSettings
from adq_search.policy import LayerPrecision, Policy
from adq_search.provenance import provenance
from adq_search.tasks.networks import resnet20
from adq_search.tracing import parametric_layers

HERE = Path(__file__).parent
SEED = 0
NETWORKS = {
    "resnet20": (resnet20, 32),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 224),
    "resnet50": (torchvision.models.resnet50, 224),
}
POLICY = LayerPrecision(4, 4, "adq", 0.9)
EVERY_S = TrainingSettings().checkpoint_every_s


class Training:
    """A network as it is after a step: every parameter has its momentum."""

    def __init__(self, name, folder):
        torch.manual_seed(SEED)
        factory, size = NETWORKS[name]
        self.network = factory()
        policy = Policy.uniform(tuple(parametric_layers(self.network)), POLICY)
        inputs = torch.randn(4, 3, size, size)
        apply_policy_(self.network, policy, inputs)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)
        self.network.train()(inputs).sum().backward()
        self.optimizer.step()
        self.generator = torch.Generator().manual_seed(SEED)
        self.checkpoint = TrainingCheckpoint(folder / f"{name}.safetensors", {"policy": name})

    def save(self):
        parts = (self.network, self.optimizer, self.generator)
        self.checkpoint.after_epoch(*parts, losses=[1.0], steps=1)

    def take_up(self):
        self.checkpoint.restore_(self.network, self.optimizer, self.generator)


def seconds(function):
    """Return wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(repeats):
    """Yield a row a network and round; a first round warms up and is not counted."""
    with tempfile.TemporaryDirectory(dir=HERE) as folder:  # on the disk that results lie on
        trainings = {name: Training(name, Path(folder)) for name in NETWORKS}
        for repeat in range(-1, repeats):
            for name, training in trainings.items():
                (save_s, save_cpu_s), (take_up_s, take_up_cpu_s) = (
                    seconds(training.save),
                    seconds(training.take_up),
                )
                if repeat >= 0:
                    yield {
                        "network": name,
                        "round": repeat,
                        "file_bytes": training.checkpoint.file.stat().st_size,
                        "save_s": save_s,
                        "save_cpu_s": save_cpu_s,
                        "take_up_s": take_up_s,
                        "take_up_cpu_s": take_up_cpu_s,
                    }


def in_ms(values):
    low, high = min(values), max(values)
    return f"{1e3 * statistics.median(values):.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"


def table(rows):
    """Return medians and spread, and the largest share of training that saving takes."""
    lines = [
        "| network | file, MB | save, ms | of it processor, ms | take up, ms | share of training |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in NETWORKS:
        own = [row for row in rows if row["network"] == name]
        save, cpu, take_up = (
            [row[key] for row in own] for key in ("save_s", "save_cpu_s", "take_up_s")
        )
        share = statistics.median(save) / EVERY_S
        lines.append(
            f"| {name} | {own[0]['file_bytes'] / 1e6:.1f} | {in_ms(save)} | {in_ms(cpu)} "
            f"| {in_ms(take_up)} | {share:.2%} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(race(chosen.repeats))
    with (HERE / "times.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "times.md").write_text(table(rows))
    (HERE / "run.json").write_text(json.dumps(provenance(seed=SEED), indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
