"""Prove the circuits of rtl/, count their gates and switching, fit formulas, compare ratios.

Usage: python results/mac_gates/run.py [--quick] [--workers N] [--out DIR] [--measured CSV]
       python results/mac_gates/run.py --kinds KIND ... [--measured CSV]
       python results/mac_gates/run.py --fit-only [--measured CSV]

Needs `iverilog` and `yosys` (Debian packages). Writes mac_gates.csv (a row a circuit),
run.json (how it was made), fit.json and fit.md (formulas) and, given the 45 nm synthesis as CSV,
comparison.csv, comparison.md and derived.json (constants of the cost model).
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from compare import comparison, markdown, read_45nm, within_kind
from derive import derive
from designs import all_designs, quick_designs
from fit import fit_all, formulas
from icarus import simulate
from netlist import CLOCK_GE, GATE_GE, gate_equivalents, run_lanes, synthesize
from reference import outputs
from shipped import shipped_errors
from vectors import EXHAUSTIVE_BITS, energy_vectors, free_bits, icarus_vectors, single_vectors

from adq_search.provenance import provenance

HERE = Path(__file__).parent
SEED = 0
LANES = 256
STEPS = 64


def measure(design):
    """Prove one circuit and return its row.

    Raises:
        RuntimeError: The circuit and the reference differ.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = icarus_vectors(design, SEED)
        n_icarus = len(inputs[next(iter(design.inputs))])
        found, expected = simulate(design, inputs, Path(scratch)), outputs(design, inputs)
        _demand_equal(design, "Verilog", found, expected)
        netlist = synthesize(design, Path(scratch))
    n_netlist = _prove_netlist(design, netlist)
    moving = energy_vectors(design, SEED, LANES, STEPS)
    first = _starts(design, moving)
    found, energy = run_lanes(netlist, design, moving, first)
    _demand_equal(design, "netlist", found, _expected_lanes(design, moving, first))
    total, combinational = gate_equivalents(netlist.counts)
    p = design.parameters
    return {
        "kind": design.kind,
        "b_a": p.get("B_A"),
        "b_w": p.get("B_W", p.get("M", p.get("B"))),
        "f": p.get("F", 0),
        "level_bits": p.get("L"),
        "constant": p.get("C"),
        "n": p.get("N"),
        "W": design.width or p.get("W") or p.get("WIDTH"),
        "accumulators": len(design.outputs) if design.is_mac else 0,
        "register_bits": netlist.counts.get("DFF", 0),
        "ge_total": round(total, 1),
        "ge_comb": round(combinational, 1),
        "energy": round(energy, 2),
        "depth": netlist.depth,
        "icarus_vectors": n_icarus,
        "netlist_vectors": n_netlist + moving[next(iter(design.inputs))].size,
        "exhaustive": design.kind != "threshold_search" and free_bits(design) <= EXHAUSTIVE_BITS,
        "equivalent": True,
        "cells": netlist.counts,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _prove_netlist(design, netlist):
    """Compare one step from the cleared state for every input, or 4096; return how many."""
    if design.kind == "threshold_search":
        return 0  # the searches that count its switching are compared step by step
    single = single_vectors(design, SEED + 1, n_random=4096)
    lanes = {name: np.asarray(values)[None] for name, values in single.items()}
    found, _ = run_lanes(netlist, design, lanes, [True])
    n = len(single[next(iter(design.inputs))])
    expected = outputs(design, {**single, "first": np.ones(n, dtype=np.int64)})
    _demand_equal(design, "netlist", {k: v[0] for k, v in found.items()}, expected)
    return n


def _starts(design, moving):
    """For every step whether new sums start: N terms each, or the search's first comparison."""
    if "first" in moving:
        return moving["first"][:, 0]
    steps = len(moving[next(iter(design.inputs))])
    return np.arange(steps) % design.parameters.get("N", steps) == 0


def _expected_lanes(design, moving, first):
    lanes = moving[next(iter(design.inputs))].shape[1]
    columns = []
    for lane in range(lanes):
        inputs = {name: moving[name][:, lane] for name in design.inputs}
        columns.append(outputs(design, {**inputs, "first": first.astype(np.int64)}))
    return {name: np.stack([c[name] for c in columns], axis=1) for name in design.outputs}


def _demand_equal(design, what, found, expected):
    for name, values in expected.items():
        if not np.array_equal(found[name], values):
            n_wrong = np.count_nonzero(found[name] != values)
            msg = f"{design.label}: {what} and reference differ in {n_wrong} values of {name}."
            raise RuntimeError(msg)


def read_table(path):
    """Rows of mac_gates.csv with numbers as numbers."""
    texts = ("kind", "cells", "equivalent", "exhaustive")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, text in row.items():
            if name not in texts:
                row[name] = None if text == "" else float(text) if "." in text else int(text)
        row["cells"] = {k: int(n) for k, n in (c.split(":") for c in row["cells"].split())}
        for name in ("equivalent", "exhaustive"):
            row[name] = row[name] == "True"
    return rows


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = " ".join(f"{k}:{n}" for k, n in row["cells"].items())
            writer.writerow({**row, "cells": cells})


def tool_versions():
    """First words of each tool's own version line."""
    found = {}
    for tool in ("yosys", "iverilog"):
        if shutil.which(tool) is None:
            sys.exit(f"This script needs {tool}. Install it: `apt-get install -y yosys iverilog`.")
        done = subprocess.run([tool, "-V"], capture_output=True, text=True, check=True)
        found[tool] = done.stdout.splitlines()[0].split("(")[0].strip()
    return found


def measure_all(designs, workers, path, kept=()):
    """Write rows of all designs as they come, with a line of progress for each."""
    rows = list(kept)
    with ProcessPoolExecutor(workers) as pool:
        for i, row in enumerate(pool.map(measure, designs), 1):
            seconds = row.pop("seconds")
            proven = f"{row['icarus_vectors']} + {row['netlist_vectors']} vectors equal"
            text = f"{designs[i - 1].label}: {row['ge_total']} GE, {proven}, {seconds} s"
            print(f"{i}/{len(designs)} {text}", flush=True)
            rows.append(row)
            write_table(path, rows)


def write_fit(out, table):
    """Write fit.json (how it was made, formulas, errors of the shipped ones) and fit.md."""
    fits = fit_all(table)
    content = {"made": provenance(seed=SEED), **fits, "shipped": shipped_errors(table)}
    _write_json(out / "fit.json", content)
    (out / "fit.md").write_text(formulas(fits))


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_comparison(out, table, measured):
    rows = comparison(table, measured)
    with (out / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    summary = within_kind(rows)
    text = "Our ratio to the uniform 8x8 unit over that of another source, by kind (N = 576):\n\n"
    text += markdown(summary, list(summary[0]))
    text += "\nRatios to the uniform 8x8 unit of the same source; GE and W are ours:\n\n"
    text += markdown(rows, list(rows[0]))
    (out / "comparison.md").write_text(text)
    print(text)
    _write_json(out / "derived.json", {"made": provenance(seed=SEED), **derive(table, measured)})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small circuit of each kind")
    parser.add_argument("--fit-only", action="store_true", help="read mac_gates.csv, no tools run")
    parser.add_argument("--kinds", nargs="+", help="measure these again, keep the other rows")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--measured", type=Path, help="CSV of the 45 nm synthesis")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.fit_only:
        designs, path, kept = all_designs(), out / "mac_gates.csv", []
        if arguments.quick:
            designs = quick_designs()
        elif arguments.kinds:
            designs = [d for d in designs if d.kind in arguments.kinds]
            kept = [r for r in read_table(path) if r["kind"] not in arguments.kinds]
        made = {**provenance(seed=SEED), "tools": tool_versions()}
        measure_all(designs, arguments.workers, path, kept)
        weights = {**GATE_GE, "clock": CLOCK_GE}
        _write_json(out / "run.json", {"made": made, "weights_ge": weights})
    if arguments.quick:
        return
    table = read_table(out / "mac_gates.csv")
    write_fit(out, table)
    print((out / "fit.md").read_text())
    if arguments.measured:
        write_comparison(out, table, read_45nm(arguments.measured))


if __name__ == "__main__":
    main()
