"""Reproduce the paper's tables from the cost model: Table 1, the table of Eq. 18, Fig. 3.

Usage: python results/paper_tables/run.py

Writes table1.csv, product_table.csv, levels.csv, levels.svg and run.json.
"""

import csv
import json
from pathlib import Path

import torch
from torchvision import models

from adq_search.hardware.input_stages import adapter_shapes
from adq_search.hardware.paper import asq_overhead, odd_column, product_table
from adq_search.provenance import provenance
from adq_search.quantizers import WEIGHT_QUANTIZERS
from adq_search.tracing import trace

HERE = Path(__file__).parent
#: arXiv 2504.17263, Table 1: bits -> percent of parameters, percent of compute.
PRINTED = {8: ("2.67", "0.04"), 4: ("5.34", "0.07"), 3: ("7.11", "0.10"), 2: ("10.67", "0.14")}


def main():
    write("table1.csv", table1())
    write("product_table.csv", products())
    rows = levels()
    write("levels.csv", rows)
    (HERE / "levels.svg").write_text(drawn(rows))
    (HERE / "run.json").write_text(json.dumps(provenance(seed=0), indent=2) + "\n")


def write(name, rows):
    with (HERE / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(name, *rows[:4], sep="\n  ")


def table1():
    """Every count that was tried, with the printed columns beside it."""
    network = models.resnet18()
    summary = trace(network, torch.zeros(1, 3, 224, 224))
    n_parameters = sum(p.numel() for p in network.parameters())
    inner = summary.layers[1:-1]
    shapes = [shape for layer in inner for shape in adapter_shapes(layer.in_channels)]
    macs = sum(a * b for a, b in shapes)
    parameters = sum((a + 1) * b for a, b in shapes)
    pooling = sum(layer.n_inputs for layer in inner)
    steps = sum(layer.out_channels for layer in inner)
    every, quantized = summary.macs, sum(layer.macs for layer in inner)
    rows = []
    for column, name, share in (
        ("parameters", "adapters / all parameters", parameters / n_parameters),
        ("parameters", "adapters + steps / all parameters", (parameters + steps) / n_parameters),
        ("compute", "multiplications / all operations", macs / every),
        ("compute", "multiplications and additions / all operations", 2 * macs / every),
        ("compute", "the same with biases / all operations", (macs + parameters) / every),
        ("compute", "the same with pooling / all operations", (2 * macs + pooling) / every),
        ("compute", "multiplications / operations of the 19 layers", macs / quantized),
        ("compute", "multiplications and additions / 19 layers", 2 * macs / quantized),
        ("compute", "the same with biases / 19 layers", (macs + parameters) / quantized),
        ("compute", "the same and channel means / 19 layers", (2 * macs + 3840) / quantized),
    ):
        row = {"column": column, "count": name, "percent_at_8": f"{100 * share:.5f}"}
        for bits, printed in PRINTED.items():
            row[f"ours_{bits}"] = f"{100 * share * 8 / bits:.2f}"
            row[f"paper_{bits}"] = printed[column == "compute"]
        row["agrees"] = all(row[f"ours_{b}"] == row[f"paper_{b}"] for b in PRINTED)
        rows.append(row)
    for bits, printed in PRINTED.items():
        ours = asq_overhead(inner, n_parameters, bits)
        assert (f"{ours.parameters:.2f}", f"{ours.compute:.2f}") == printed, ours
    return rows


def products():
    """The [8, 4] table of 3 bits, literally, with fraction bits, and from one column."""
    rows = []
    for fraction_bits in (0, 4):
        table = product_table(3, 3, fraction_bits=fraction_bits)
        single = odd_column(3, fraction_bits=fraction_bits)
        for a in range(8):
            row = {"fraction_bits": fraction_bits, "A": a}
            row |= {f"W{w}": int(table[a, w]) for w in range(4)}
            row |= {"column": int(single[a]), "column_for_W3": int(single[a] >> 1)}
            rows.append(row)
    return rows


def levels():
    """Level sets of Fig. 3: 4 bits, clipping threshold 1."""
    sets = [("uniform", "15 levels", [k / 7 for k in range(-7, 8)])]
    for kind in ("pot", "post"):
        for option in ("eq17", "b_bit"):
            quantizer = WEIGHT_QUANTIZERS[kind](4, (1, 1), levels=option)
            quantizer.initialize_(torch.ones(1, 1))
            sets.append((kind, option, quantizer.levels().flatten().tolist()))
    return [
        {"quantizer": kind, "levels": name, "index": i, "value": f"{value:.8f}"}
        for kind, name, values in sets
        for i, value in enumerate(values)
    ]


def drawn(rows):
    """Three panels, levels as strokes; below each, the range from 0 to 0.04 magnified."""
    panels = [("uniform", "15 levels"), ("pot", "eq17"), ("post", "eq17")]
    titles = {
        "uniform": "(a) uniform, 15 levels",
        "pot": "(b) POT, Eq. 3, 17 levels",
        "post": "(c) POST, Eq. 17, 17 levels",
    }
    width, left, right = 760, 40, 720
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 360" width="{width}" '
        'height="360" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        "<title>4-bit levels of uniform, POT and POST weights</title>",
        f'<rect width="{width}" height="360" fill="#ffffff"/>',
    ]
    for number, (kind, option) in enumerate(panels):
        top = 30 + 110 * number
        values = [
            float(r["value"]) for r in rows if (r["quantizer"], r["levels"]) == (kind, option)
        ]
        parts.append(f'<text x="{left}" y="{top}" font-weight="bold">{titles[kind]}</text>')
        for low, high, y, name in (
            (-1.0, 1.0, top + 12, "-1 to 1"),
            (0.0, 0.04, top + 50, "0 to 0.04"),
        ):
            parts.append(
                f'<path d="M{left} {y + 22}H{right}" stroke="#6b6b6b"/>'
                f'<text x="{right}" y="{y + 36}" fill="#6b6b6b" font-size="11" '
                f'text-anchor="end">{name}</text>'
            )
            for value in values:
                if low <= value <= high:
                    x = left + (right - left) * (value - low) / (high - low)
                    parts.append(
                        f'<path d="M{x:.1f} {y}V{y + 22}" stroke="#0072B2" stroke-width="2"/>'
                    )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
