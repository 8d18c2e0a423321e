"""Structural formulas fitted to the measured rows by least squares of the relative error."""

import numpy as np

#: Features of each kind's area and energy, in words and as functions of a row. `post_prepare` has
#: none: up to 4 bits it is a table, from 6 on a multiplier, and one line misses both by half.
P = "P (st + 1)"
FEATURES = {
    "uniform": {"b_a b_w": lambda r: r["b_a"] * r["b_w"], "W": lambda r: r["W"]},
    "uniform_2bit": {"b_a": lambda r: r["b_a"], "W": lambda r: r["W"]},
    "pot": {P: lambda r: shift_columns(r, 1), "W": lambda r: r["W"]},
    "post_dual": {P: lambda r: shift_columns(r, 2), "W": lambda r: r["W"]},
    "root3": {P: lambda r: shift_columns(r, 3), "W": lambda r: r["W"]},
    "root4": {P: lambda r: shift_columns(r, 4), "W": lambda r: r["W"]},
    "post_broadcast": {P: lambda r: shift_columns(r, 2), "W": lambda r: r["W"]},
    "post_table": {
        P: lambda r: shift_columns(r, 2),
        "W": lambda r: r["W"],
        "2^b_a (b_a + f)": lambda r: 2 ** r["b_a"] * (r["b_a"] + r["f"]),
    },
    "post_literal": {
        "b_a (st + 1)": lambda r: literal_columns(r),
        "W": lambda r: r["W"],
        "2^b_a b_a 2^(b_w-2)": lambda r: 2 ** r["b_a"] * r["b_a"] * 2 ** (r["b_w"] - 2),
    },
    "codebook": {
        "b_a L": lambda r: r["b_a"] * r["level_bits"],
        "W": lambda r: r["W"],
        "2^(b_w/2) L": lambda r: 2 ** (r["b_w"] / 2) * r["level_bits"],
    },
    "codebook_2bit": {"b_a": lambda r: r["b_a"], "W": lambda r: r["W"]},
    "codebook_bins": {"2^b_w W": lambda r: 2 ** r["b_w"] * r["W"]},
    "constant_multiply": {"rows width": lambda r: rows(r) * r["W"]},
    "threshold_search": {"W": lambda r: r["W"], "b": lambda r: r["b_w"]},
    "requantize": {"W M": lambda r: r["W"] * r["b_w"]},
    "codebook_decode": {"2^b_w L": lambda r: 2 ** r["b_w"] * r["level_bits"]},
}
#: Where the energy grows otherwise than the area: reading another bin moves its lower bits, and
#: every bin has a clock gate.
ENERGY_FEATURES = {
    "codebook_bins": {
        "b_w b_a": lambda r: r["b_w"] * r["b_a"],
        "W": lambda r: r["W"],
        "2^b_w": lambda r: 2 ** r["b_w"],
    },
}
#: Kinds whose formula has no constant.
THROUGH_ZERO = ("requantize",)
HELD_OUT_B_A = 6


def features_of(kind, column):
    """Return the terms of a kind's formula for `ge_total` or `energy`."""
    own = ENERGY_FEATURES.get(kind) if column == "energy" else None
    constant = {} if kind in THROUGH_ZERO else {"1": lambda _: 1.0}
    return (own or FEATURES[kind]) | constant


def kind_of(row):
    """The formula that holds for a row: wired ternary weights need no multiplier array.

    A codebook of two bits whose words come in has the multiplier of the wider ones.
    """
    if row["kind"] == "codebook_loaded":
        return "codebook"
    return f"{row['kind']}_2bit" if is_ternary(row) else row["kind"]


def is_ternary(row):
    return row["kind"] in ("uniform", "codebook") and row["b_w"] == 2


def shift_columns(row, root):
    """P (st + 1): P = b_a + f + S bits of a product's magnitude, st = ceil(log2(S + 1)) stages."""
    shift = (2 ** (row["b_w"] - 1) - 2) // root
    return (row["b_a"] + row["f"] + shift) * (int(shift).bit_length() + 1)


def literal_columns(row):
    """b_a (st + 1): what Eq. 18 shifts has the input's bits alone."""
    shift = (2 ** (row["b_w"] - 1) - 2) // 2
    return row["b_a"] * (shift.bit_length() + 1)


def rows(row):
    """Adders of the constant multiplication: 45 = 5 * 9, 181 = 4 * 45 + 1."""
    return {45: 2, 181: 3}[row["constant"]]


def predict(kind, coefficients, row, column):
    """Value of a fitted formula for one row."""
    values = [feature(row) for feature in features_of(kind, column).values()]
    return float(np.dot(coefficients, values))


def fit_kind(kind, table, column):
    """Fit one kind's formula; return coefficients, errors and the range that they hold for."""
    table = [r for r in table if kind_of(r) == kind]
    coefficients = _solve(kind, table, column)
    errors = _errors(kind, coefficients, table, column)
    found = {
        "terms": list(features_of(kind, column)),
        "coefficients": [round(float(c), 4) for c in coefficients],
        "rows": len(table),
        "mape": round(float(errors.mean()), 4),
        "max_error": round(float(errors.max()), 4),
        "range": {
            name: sorted({r[name] for r in table if r[name] is not None})
            for name in ("b_a", "b_w", "f", "level_bits", "n", "W")
        },
    }
    seen = [r for r in table if r["b_a"] != HELD_OUT_B_A]
    unseen = [r for r in table if r["b_a"] == HELD_OUT_B_A]
    if unseen:
        held = _errors(kind, _solve(kind, seen, column), unseen, column)
        found["held_out"] = {
            "b_a": HELD_OUT_B_A,
            "rows": len(unseen),
            "mape": round(float(held.mean()), 4),
            "max_error": round(float(held.max()), 4),
        }
    return found


def _solve(kind, table, column):
    y = np.array([r[column] for r in table])
    x = np.array([[f(r) for f in features_of(kind, column).values()] for r in table])
    return np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)[0]


def _errors(kind, coefficients, table, column):
    predicted = [predict(kind, coefficients, row, column) for row in table]
    return np.array([abs(p / row[column] - 1.0) for p, row in zip(predicted, table, strict=True)])


def fit_all(table):
    """Formulas of area (GE) and energy (GE switched in a step) of every kind."""
    kinds = [k for k in FEATURES if any(kind_of(r) == k for r in table)]
    return {
        column: {kind: fit_kind(kind, table, column) for kind in kinds}
        for column in ("ge_total", "energy")
    }


def formulas(fits):
    """A Markdown table of all formulas with their errors, area first."""
    lines = [
        "| figure | kind | formula | rows | MAPE | max error | b_a = 6 held out: MAPE, max |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for column, kinds in fits.items():
        for kind, found in kinds.items():
            products = [
                f"{c:.2f}" if term == "1" else f"{c:.2f} {term}"
                for c, term in zip(found["coefficients"], found["terms"], strict=True)
            ]
            held = found.get("held_out")
            cells = [
                {"ge_total": "area, GE", "energy": "energy"}[column],
                kind,
                " + ".join(products).replace("+ -", "− "),
                str(found["rows"]),
                f"{found['mape']:.1%}",
                f"{found['max_error']:.1%}",
                f"{held['mape']:.1%}, {held['max_error']:.1%}" if held else "–",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
