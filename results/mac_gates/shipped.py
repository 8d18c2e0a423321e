"""The formulas of `adq_search.hardware` beside the measured rows: widths, and ratios to 8x8."""

from statistics import mean

from adq_search.hardware import load_hardware
from adq_search.hardware.datapaths import MacJob, make_datapath

HARDWARE = "post_asic_45nm"
#: Kind of a row: weight quantizer, datapath, and the row's columns that are its settings.
#: Where `derive` made the constants from these rows, their errors are no independent check.
UNITS = {
    "uniform": ("lsq", "uniform", {}),
    "pot": ("pot", "pot", {}),
    "post_dual": ("post", "post_dual", {}),
    "post_broadcast": ("post", "post_broadcast", {"fraction_bits": "f"}),
    "post_table": ("post", "post_lut", {"fraction_bits": "f"}),
    "post_literal": ("post", "post_lut_literal", {}),
    "codebook": ("adq", "codebook", {"level_bits": "level_bits"}),
    "codebook_loaded": ("adq", "codebook", {"level_bits": "level_bits"}),
    "codebook_bins": ("adq", "codebook_bins", {}),
    "root3": ("root", "root_accumulators", {}),
    "root4": ("root", "root_accumulators", {}),
}


def shipped_mac(row):
    """The cost model's answer for a row; None where it refuses or has no such datapath.

    One activation is shared by very many outputs. The words of a codebook are wired in: with three
    of them no multiplier is left, which says nothing about a codebook that is loaded.
    """
    if row["kind"] not in UNITS or (row["kind"] == "codebook" and row["b_w"] == 2):
        return None
    quantizer, name, settings = UNITS[row["kind"]]
    job = MacJob(
        layer=row["kind"],
        quantizer=quantizer,
        weight_bits=row["b_w"],
        input_bits=row["b_a"],
        fan_in=row["n"],
        n_sharing=10**9,
        options=_options(row["kind"]),
    )
    datapath = make_datapath(name, {k: row[column] for k, column in settings.items()})
    hardware = load_hardware(HARDWARE)
    return None if datapath.why_not(job, hardware) else datapath.mac(job, hardware)


def _options(kind):
    """The circuit of Eq. 18 has the columns of Eq. 17, one exponent more than b bits can name."""
    if kind.startswith("root"):
        return {"root": int(kind[-1])}
    return {"levels": "eq17"} if kind == "post_literal" else {}


def shipped_errors(table):
    """By kind: how far the shipped ratios to the uniform 8x8 unit lie from the measured ones.

    `inside` are rows of the bits and fan-ins that the shipped figures were fitted to, `outside`
    those that they are carried on to (fan-in 9, two-bit weights and the like).
    """
    anchor = next(
        r for r in table if (r["kind"], r["b_a"], r["b_w"], r["n"]) == ("uniform", 8, 8, 576)
    )
    anchor_mac = shipped_mac(anchor)
    found = {}
    for column, attribute in (("ge_total", "area_ge"), ("energy", "mac_pj")):
        errors = {}
        for row in table:
            mac = shipped_mac(row)
            if mac is None:
                continue
            ours = row[column] / anchor[column]
            theirs = getattr(mac, attribute) / getattr(anchor_mac, attribute)
            where = errors.setdefault(row["kind"], {})
            where.setdefault("inside" if mac.is_measured else "outside", []).append(theirs / ours)
        found[column] = {
            kind: {where: _stated(ratios) for where, ratios in parts.items()}
            for kind, parts in errors.items()
        }
    return found


def _stated(ratios):
    errors = [ratio - 1.0 for ratio in ratios]
    return {
        "rows": len(errors),
        "bias": round(mean(errors), 4),
        "mape": round(mean(abs(e) for e in errors), 4),
        "max_error": round(max(abs(e) for e in errors), 4),
    }
