"""Measured latencies: a CSV of layer signatures by precisions.

Format: the first column is `signature`, the second `unit` (`us` or `cycles`), every other column a
precision as policies print it without momentum (`W8A8 lsq`, `float`). A row is a layer's shape, a
cell its time for one sample. A cell must not be empty: a row or column that was not measured as a
whole is left out.

    signature,unit,float,W8A8 lsq
    conv2d w64x64x3x3 g1 i64x56x56 o64x56x56,us,812.4,301.9
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from adq_search.errors import CostError, did_you_mean
from adq_search.policy import LayerPrecision
from adq_search.tracing import LayerInfo

_HEAD = ["signature", "unit"]


def signature_of(layer: LayerInfo) -> str:
    """Return what two layers share that take the same time: kind, weights, groups, shapes."""
    weight, inputs, outputs = (
        "x".join(map(str, shape))
        for shape in (layer.weight_shape, layer.input_shape, layer.output_shape)
    )
    return f"{layer.kind} w{weight} g{layer.groups} i{inputs} o{outputs}"


def precision_key(precision: LayerPrecision) -> str:
    """Return the column of a precision: as it prints, without momentum."""
    if precision.is_float:
        return precision.scheme
    return f"W{precision.weight_bits}A{precision.input_bits} {precision.scheme}"


def read_latencies(path: Path, clock_mhz: float | None) -> dict[str, dict[str, float]]:
    """Return microseconds by signature and precision.

    Args:
        path: The CSV.
        clock_mhz: Clock that turns cycles into microseconds; None where there is none.

    Raises:
        CostError: The file is missing, has a hole, a number that is not positive, a row twice,
            another unit, or cycles without a clock.
    """
    what = f"latency table {path}"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        msg = f"The {what} cannot be read: {error.strerror}. Check the path."
        raise CostError(msg) from error
    if not rows or rows[0][:2] != _HEAD or len(rows[0]) < 3 or len(rows) < 2:
        msg = f"The {what} needs the columns signature, unit and one for each precision, and a row."
        raise CostError(msg)
    precisions = rows[0][2:]
    found: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows[1:], start=2):
        signature, unit = row[0], row[1] if len(row) > 1 else ""
        where = f"The {what}, line {number} ({signature})"
        if signature in found:
            msg = f"{where}: the signature stands twice. Keep one of the rows."
            raise CostError(msg)
        cells = dict(zip(precisions, [*row[2:], *[""] * len(precisions)], strict=False))
        found[signature] = {
            precision: _microseconds(text, unit, clock_mhz, f"{where}, {precision}")
            for precision, text in cells.items()
        }
    return found


def latency_us(
    layer: LayerInfo,
    precision: LayerPrecision,
    latencies: Mapping[str, Mapping[str, float]],
    hardware: str,
) -> float:
    """Return the measured microseconds of a layer.

    Raises:
        CostError: The table has no such row or cell, with the layer's name.
    """
    signature, key = signature_of(layer), precision_key(precision)
    remedy = "Measure it (results/latency_cpu/run.py shows how), or take it out of the space."
    if signature not in latencies:
        msg = (
            f"The latency table of hardware '{hardware}' has no row for layer '{layer.name}' "
            f"({signature}). {remedy}"
        )
        raise CostError(msg)
    row = latencies[signature]
    if key not in row:
        msg = (
            f"The latency table of hardware '{hardware}' has no column '{key}', which layer "
            f"'{layer.name}' asks for. {remedy} {did_you_mean(key, row)}"
        )
        raise CostError(msg)
    return row[key]


def _microseconds(text: str, unit: str, clock_mhz: float | None, where: str) -> float:
    if unit not in {"us", "cycles"}:
        msg = f"{where}: the unit must be us or cycles, but is '{unit}'. Mend the row."
        raise CostError(msg)
    if not text.strip():
        msg = f"{where}: the cell is empty. Measure it, or leave the row or the column out."
        raise CostError(msg)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0.0):
        msg = f"{where}: a latency must be a positive number, but is '{text}'. Mend the cell."
        raise CostError(msg)
    if unit == "us":
        return value
    if clock_mhz is None:
        msg = f"{where}: cycles need a clock. Give `array.clock_mhz` in the hardware file."
        raise CostError(msg)
    return value / clock_mhz
