"""Constants of the cost model, fitted to our circuits and to the 45 nm synthesis together.

Our circuits, brought to the level of the 45 nm rows by one scale a kind, and the 45 nm rows count
half each in the least squares. The scale is the geometric mean of theirs over ours for the
circuits that both have; a kind that they do not have takes the scale of the kind in `SCALE_OF`,
and is fitted to our rows alone.
"""

from math import exp, log
from statistics import mean

import numpy as np
from compare import FAN_IN, NAMES_45NM
from fit import features_of, kind_of, predict

#: Kinds whose constants in `post_asic_45nm.yaml` are made here.
KINDS = (
    *("uniform_2bit", "root3", "root4", "post_table", "post_literal"),
    *("codebook", "codebook_bins", "requantize"),
)
#: Tables take the scale of the unit that they stand beside: it is the tables that differ.
SCALE_OF = {
    "post_table": "post_broadcast",
    "post_literal": "post_broadcast",
    "root3": "post_dual",
    "root4": "post_dual",
    "requantize": "uniform",
}
COLUMNS = {"ge_total": "area", "energy": "energy"}


def derive(table, measured):
    """Return the constants by kind and figure, with scale, and errors against both sources.

    Args:
        table: Our rows.
        measured: Rows of the 45 nm synthesis, as `compare.read_45nm` returns them.
    """
    return {
        kind: {
            figure: _derived(kind, table, measured, column, number)
            for number, (column, figure) in enumerate(COLUMNS.items())
        }
        for kind in KINDS
    }


def _derived(kind, table, measured, column, number):
    shared = _both(SCALE_OF.get(kind, kind), table, measured, number)
    scale = exp(mean(log(theirs / row[column]) for row, theirs in shared))
    ours = [(row, row[column] * scale) for row in table if kind_of(row) == kind]
    theirs = _both(kind, table, measured, number)
    features = features_of(kind, column)
    weights = np.concatenate([np.full(len(s), max(len(s), 1) ** -0.5) for s in (ours, theirs)])
    x = np.array([[f(r) for f in features.values()] for r, _ in ours + theirs])
    y = np.array([value for _, value in ours + theirs])
    coefficients = np.linalg.lstsq(x / y[:, None] * weights[:, None], weights, rcond=None)[0]
    terms = dict(zip(features, (round(float(c), 4) for c in coefficients), strict=True))
    return {
        "scale": round(scale, 4),
        "terms": terms,
        "ours": _errors(kind, terms, column, ours),
        "45nm": _errors(kind, terms, column, theirs),
    }


def _both(kind, table, measured, number):
    """Rows that both syntheses have, with the figure of the other one."""
    found = []
    for row in table:
        if row["kind"] in NAMES_45NM and kind_of(row) == kind and row["n"] == FAN_IN:
            key = NAMES_45NM[row["kind"]], row["b_a"], row["b_w"], row["f"], row["W"]
            if key in measured and row["level_bits"] in (None, 8):
                found.append((row, measured[key][number]))
    return found


def _errors(kind, terms, column, pairs):
    coefficients = list(terms.values())
    errors = [abs(predict(kind, coefficients, row, column) / value - 1.0) for row, value in pairs]
    if not errors:
        return None
    return {
        "rows": len(errors),
        "mape": round(mean(errors), 4),
        "max_error": round(max(errors), 4),
    }
