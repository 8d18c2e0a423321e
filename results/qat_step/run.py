"""Time a training step of quantized networks against float training, everything in turn.

Usage: python results/qat_step/run.py [--threads N] [--rounds N] [--networks NAME ...]
       [--compiled NAME ...] [--no-eager] [--bf16]

In every round each contestant of a network trains one step, in turn, on the same cores; ratios
are taken within rounds. Writes steps.csv (a row a network, contestant and round), kernels.csv,
steps.md, kernels.md, steps.svg and run.json into the folder of this processor's instructions
(`avx2`, `avx512`). Contestants in bfloat16 take part where torch has its arithmetic for the
processor, or with `--bf16`. Brevitas takes part where it is installed
(`pip install brevitas`); `--compiled` adds the float and the LSQ network under torch.compile as a
whole (a minute each to compile). Takes about ten minutes on two cores; weights and data are random.
"""

import argparse
import os
import statistics
import sys
import time

import torch
from contestants import NETWORKS, SCHEMES, Contestant, peak_bytes, variants
from kernels import kernel_table, race_kernels
from measured import OUT, write_made, write_table

from adq_search.provenance import provenance
from adq_search.training import multiplies_bfloat16

SEED = 0
#: Without these glibc gives freed activations back to the system and asks for them again each step.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**28),
}
TARGETS = {name: target for name, (_, target) in SCHEMES.items() if target is not None}
TARGETS |= {f"{name}, bf16": 0.80 for name in ("lsq", "post", "asq", "adq")}
MEMORY_TARGET = 1.15


def race(network, names, rounds):
    """Yield a row a contestant and round."""
    contestants, memory = {}, {}
    for name in names:
        start = time.perf_counter()
        contestants[name] = Contestant(network, name)
        for _ in range(2):
            contestants[name].step()
        memory[name] = peak_bytes(contestants[name])
        print(f"{network}: {name} ready in {time.perf_counter() - start:.0f} s", flush=True)
    for number in range(rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant.step()
            seconds = time.perf_counter() - start
            yield {
                "network": network,
                "contestant": name,
                "round": number,
                "step_s": seconds,
                "peak_bytes": memory[name],
            }


def summary(rows):
    """One dict a network and contestant: medians, spread, ratios within rounds."""
    found = []
    for network in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == network]
        floats = {r["round"]: r for r in own if r["contestant"] == "float"}
        for name in dict.fromkeys(r["contestant"] for r in own):
            mine = [r for r in own if r["contestant"] == name]
            ratios = [r["step_s"] / floats[r["round"]]["step_s"] for r in mine]
            found.append(
                {
                    "network": network,
                    "contestant": name,
                    "ms": 1e3 * statistics.median(r["step_s"] for r in mine),
                    "ratio": statistics.median(ratios),
                    "low": min(ratios),
                    "high": max(ratios),
                    "shortest": min(r["step_s"] for r in mine)
                    / min(r["step_s"] for r in floats.values()),
                    "target": TARGETS.get(name),
                    "memory": mine[0]["peak_bytes"] / floats[0]["peak_bytes"],
                }
            )
    return found


def table(found):
    lines = [
        "| network | contestant | ms a step | against float | spread | shortest steps | target "
        f"| peak memory (target {MEMORY_TARGET:g}) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in found:
        cells = [
            r["network"],
            r["contestant"],
            f"{r['ms']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['low']:.2f} to {r['high']:.2f}",
            f"{r['shortest']:.2f}",
            "" if r["target"] is None else f"{r['target']:.2f}",
            f"{r['memory']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def drawn(found):
    """Bars of the ratio to float training, one block a network; the line is float training."""
    left, scale, row = 190, 150, 18
    widest = max(r["high"] for r in found)
    width = int(left + scale * min(widest, 6.0) + 70)
    parts, y = [], 10
    for network in dict.fromkeys(r["network"] for r in found):
        y += 20
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{network}</text>')
        y += 8
        top = y
        for r in [r for r in found if r["network"] == network]:
            colour = "#0072B2" if r["contestant"].split(",")[0] in SCHEMES else "#999999"
            length = scale * min(r["ratio"], 6.0)
            parts.append(
                f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{r["contestant"]}</text>'
                f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{row - 5}" '
                f'fill="{colour}"/>'
                f'<line x1="{left + scale * min(r["low"], 6.0):.1f}" y1="{y + 8}" '
                f'x2="{left + scale * min(r["high"], 6.0):.1f}" y2="{y + 8}" stroke="#111111"/>'
                f'<text x="{left + length + 6:.1f}" y="{y + 12}">{r["ratio"]:.2f}</text>'
            )
            y += row
        parts.append(
            f'<line x1="{left + scale}" y1="{top}" x2="{left + scale}" y2="{y}" stroke="#D55E00" '
            'stroke-dasharray="4 3"/>'
        )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 20}" width="{width}" '
        f'height="{y + 20}" font-family="Helvetica, Arial, sans-serif" font-size="12">'
        "<title>Time of a training step against eager float training</title>"
        f'<rect width="{width}" height="{y + 20}" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--compiled", nargs="+", default=[], choices=list(NETWORKS))
    parser.add_argument("--no-eager", action="store_true", help="leave out uncompiled quantizers")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 by reference code too")
    asked = parser.parse_args()
    if not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    torch.set_num_threads(asked.threads)
    start = time.perf_counter()
    made = provenance(seed=SEED)  # of the tree before files in it change
    rows = []
    for network in asked.networks:
        names = variants(
            with_compiled=network in asked.compiled,
            with_eager=not asked.no_eager,
            with_bf16=asked.bf16 or multiplies_bfloat16(),
        )
        rows += race(network, names, asked.rounds)
    found = summary(rows)
    kernels = race_kernels(asked.rounds)
    write_table("steps", rows, table(found))
    write_table("kernels", kernels, kernel_table(kernels))
    (OUT / "steps.svg").write_text(drawn(found))
    made |= {"threads": asked.threads, "allocator": ALLOCATOR, "load": os.getloadavg()}
    made["wall_s"] = round(time.perf_counter() - start)
    write_made("run", made)
    print(table(found), kernel_table(kernels), sep="\n")


if __name__ == "__main__":
    main()
