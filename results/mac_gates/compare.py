"""Our ratios beside a 45 nm synthesis, QKeras' regression and FINN's LUT formula."""

import csv
from math import ceil, log2
from statistics import mean

from netlist import gate_equivalents

#: Names of the same circuits in `data/mac_gates_45nm.csv`.
NAMES_45NM = {
    "uniform": "uniform",
    "pot": "pot",
    "post_dual": "post_dual",
    "post_broadcast": "post_bcast",
    "post_table": "post_lut",
    "post_literal": "post_paper",
    "codebook": "codebook8",
    "codebook_bins": "bins",
}
#: yosys' own transistor counts (`stat -tech cmos`) over four, to see what the weights decide.
TRANSISTORS = {
    "NOT": 0.5, "NAND": 1.0, "NOR": 1.0, "AND": 1.5, "OR": 1.5, "ANDNOT": 1.5, "ORNOT": 1.5,
    "AOI3": 1.5, "OAI3": 1.5, "MUX": 3.0, "XOR": 3.0, "XNOR": 3.0, "DFF": 4.0, "RESET": 1.0,
    "CLOCK_GATE": 5.0,
}  # fmt: skip
FAN_IN = 576


def qkeras_ge(b_a, b_w, width):
    """QKeras' regression of synthesised MACs, in gates (hardware notes, 1.2)."""
    return 7.705 * b_a * b_w + 13.762 * width - 92.16


def finn_lut(b_a, b_w, n):
    """LUTs of one more multiply-accumulate in FINN: PE = SIMD = 1, without its fixed 300."""
    alpha = log2(n) + b_w + b_a - 1  # unsigned inputs
    width = ceil(alpha + log2(1 + 2**-alpha) + 1)
    bits = b_w + b_a
    return 1.1 * ((2 * ceil(bits / 6) - 1) * bits + bits + width)


def read_45nm(path):
    """Rows of the 45 nm synthesis by (kind, b_a, b_w, f, W)."""
    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["unit"] == "pe"]
    return {
        (r["kind"], int(r["b_a"]), int(r["b_w"]), int(r["f"]), int(r["W"])): (
            float(r["ge_total"]),
            float(r["e_zero_delay_fJ"]),
        )
        for r in rows
    }


def comparison(table, measured):
    """Rows of ratios to the uniform 8x8 unit, each source to its own; N = 576."""
    table = [r for r in table if r["kind"] in NAMES_45NM and r["n"] == FAN_IN]
    table = [r for r in table if r["level_bits"] in (None, 8)]
    anchor = next(r for r in table if (r["kind"], r["b_a"], r["b_w"]) == ("uniform", 8, 8))
    anchor_45 = measured[_key(anchor)]
    found = []
    for row in table:
        other = measured.get(_key(row))
        is_uniform = row["kind"] == "uniform"
        if other is None and not is_uniform:
            continue
        a, w = row["b_a"], row["b_w"]
        found.append(
            {
                "kind": row["kind"],
                "b_a": a,
                "b_w": w,
                "f": row["f"],
                "W": row["W"],
                "ge": row["ge_total"],
                "area": row["ge_total"] / anchor["ge_total"],
                "area_transistors": _transistors(row) / _transistors(anchor),
                "area_45nm": other and other[0] / anchor_45[0],
                "area_qkeras": qkeras_ge(a, w, row["W"]) / qkeras_ge(8, 8, anchor["W"])
                if is_uniform
                else None,
                "lut_finn": finn_lut(a, w, FAN_IN) / finn_lut(8, 8, FAN_IN) if is_uniform else None,
                "energy": row["energy"] / anchor["energy"],
                "energy_45nm": other and other[1] / anchor_45[1],
            }
        )
    return found


def _key(row):
    return NAMES_45NM[row["kind"]], row["b_a"], row["b_w"], row["f"], row["W"]


def _transistors(row):
    return gate_equivalents(row["cells"], TRANSISTORS)[0]


def within_kind(rows):
    """By kind: mean of our ratio over the other source's, and its smallest and largest."""
    pairs = (
        ("area", "area_45nm"),
        ("area_transistors", "area_45nm"),
        ("energy", "energy_45nm"),
        ("area", "area_qkeras"),
        ("area", "lut_finn"),
    )
    found = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for ours, theirs in pairs:
            ratios = [r[ours] / r[theirs] for r in rows if r["kind"] == kind and r[theirs]]
            if ratios:
                found.append(
                    {"kind": kind, "ours": ours, "theirs": theirs, "rows": len(ratios),
                     "mean": mean(ratios), "min": min(ratios), "max": max(ratios)}
                )  # fmt: skip
    return found


def markdown(rows, columns):
    """A table; numbers with two digits, what a source does not have as a dash."""
    lines = [f"| {' | '.join(columns)} |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        lines.append(f"| {' | '.join(_text(row[c]) for c in columns)} |")
    return "\n".join(lines) + "\n"


def _text(cell):
    if cell is None:
        return "–"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
