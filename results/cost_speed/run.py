"""Time the cost of 100,000 policies of ResNet-50 on one core.

Usage: OMP_NUM_THREADS=1 python results/cost_speed/run.py [POLICIES] [REPEATS]

Writes speed.csv (a row a run), speed.md (medians) and run.json (command, versions, commit).
"""

import csv
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torchvision import models

from adq_search.hardware import cost, cost_table, layer_cost, total_of
from adq_search.provenance import provenance
from adq_search.space import SearchSpace
from adq_search.tracing import trace

HERE = Path(__file__).parent
SEED = 0
SPEC = {
    "default": {
        "weight_bits": [2, 3, 4, 8],
        "input_bits": [2, 3, 4, 8],
        "schemes": ["lsq", "asq", "post", "asq_post", "adq"],
        "ema_momenta": [0.99],
        "scheme_weight_bits": {"post": [3, 4], "asq_post": [3, 4]},
    }
}
GUIDE = ("energy_pj", "memory_bytes")


def main(n_policies=100_000, repeats=5):
    torch.set_num_threads(1)
    summary = trace(models.resnet50(), torch.zeros(1, 3, 224, 224))
    space = SearchSpace.from_spec(SPEC, summary)
    rows = []
    for repeat in range(repeats):
        layer_cost.cache_clear()
        start = time.perf_counter()
        table = cost_table(summary, space)
        build_s = time.perf_counter() - start
        random = np.random.default_rng(SEED + repeat)
        indices = np.stack(
            [random.integers(0, len(row), n_policies) for row in table.choices], axis=1
        )
        start = time.perf_counter()
        everything = table.totals(indices)
        all_s = time.perf_counter() - start
        start = time.perf_counter()
        two = table.totals(indices, GUIDE)
        two_s = time.perf_counter() - start
        assert all((two[name] == everything[name]).all() for name in GUIDE)
        checked = random.choice(n_policies, 20, replace=False)
        start = time.perf_counter()
        for row in checked:
            chosen = {
                group.name: group.choices[i]
                for group, i in zip(space.groups, indices[row], strict=True)
            }
            slow = total_of(cost(summary, space.policy_from(chosen)))
            assert all(everything[name][row] == value for name, value in slow.items())
        one_by_one_s = (time.perf_counter() - start) / len(checked) * n_policies
        rows.append(
            {
                "repeat": repeat,
                "policies": n_policies,
                "figures": len(everything),
                "build_s": build_s,
                "all_figures_s": all_s,
                "two_figures_s": two_s,
                "one_by_one_s": one_by_one_s,
            }
        )
        print(rows[-1], flush=True)
    with (HERE / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = summary_of(rows, len(summary), sum(len(c) for c in table.choices))
    (HERE / "speed.md").write_text(text)
    made = provenance(seed=SEED) | {"threads": torch.get_num_threads()}
    (HERE / "run.json").write_text(json.dumps(made, indent=2) + "\n")
    print(text)


def summary_of(rows, n_layers, n_choices):
    first = rows[0]
    lines = ["| seconds | median | min | max |", "| --- | ---: | ---: | ---: |"]
    for name, key in (
        ("costs of every choice, once a space", "build_s"),
        (f"totals of {first['policies']:,} policies, {first['figures']} figures", "all_figures_s"),
        (f"totals of {first['policies']:,} policies, {len(GUIDE)} figures", "two_figures_s"),
        ("the same by `cost`, one by one (extrapolated from 20)", "one_by_one_s"),
    ):
        values = [row[key] for row in rows]
        cells = (f"{f(values):.3f}" for f in (statistics.median, min, max))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return (
        "\n".join(lines)
        + f"\n\nResNet-50: {n_layers} layers, {n_choices} choices in all; {len(rows)} runs on one "
        "core; 20 policies of each run compared with `cost`, equal to the last bit.\n"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
