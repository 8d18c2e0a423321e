"""The shipped formulas against our own gates (results/mac_gates), within the stated errors."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from statistics import fmean, median

import pytest

from adq_search.hardware import MacJob, load_hardware
from adq_search.hardware.datapaths import (
    PostBroadcast,
    PostDual,
    PotShift,
    Uniform,
)

ASIC = load_hardware("post_asic_45nm")
TABLE = Path(__file__).parent.parent / "results" / "mac_gates" / "mac_gates.csv"
UNITS = {
    "uniform": ("lsq", {}, lambda row: Uniform()),
    "pot": ("pot", {}, lambda row: PotShift()),
    "post_dual": ("post", {}, lambda row: PostDual()),
    "post_broadcast": ("post", {}, lambda row: PostBroadcast(int(row["f"]))),
}


@cache
def ratios(kind, figure, fan_in, bits):
    """Ours over the shipped formula's, one a circuit; `bits` is a range of weight bits."""
    quantizer, options, make = UNITS[kind]
    found = []
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["kind"] != kind:
                continue
            w, n = int(row["b_w"]), int(row["n"])
            if n != fan_in or not bits[0] <= w <= bits[1]:
                continue
            job = MacJob("pe", quantizer, w, int(row["b_a"]), n, 10**9, options)
            mac = make(row).mac(job, ASIC)
            assert mac.widths.accumulator == int(row["W"]), row
            ours = float(row["energy" if figure == "energy" else "ge_total"])
            found.append(ours / (mac.mac_pj if figure == "energy" else mac.area_ge))
    assert found, (kind, fan_in)
    return tuple(found)


@pytest.mark.parametrize("kind", ["uniform", "pot", "post_dual", "post_broadcast"])
@pytest.mark.parametrize("fan_in", [4, 9])
@pytest.mark.parametrize(
    ("figure", "mean", "worst"), [("energy", 0.08, 0.235), ("area", 0.04, 0.13)]
)
def test_small_fan_ins_follow_the_formulas(kind, fan_in, figure, mean, worst):
    """One scale, taken at fan-in 576, and fan-in 4 and 9 follow, as the hardware file states."""
    scale = median(ratios(kind, figure, 576, (3, 6)))

    errors = [scale / ratio - 1 for ratio in ratios(kind, figure, fan_in, (3, 6))]

    assert abs(fmean(errors)) <= mean
    assert max(map(abs, errors)) <= worst


@pytest.mark.parametrize("kind", ["pot", "post_dual", "post_broadcast"])
def test_two_syntheses_agree_on_the_units_relative_to_each_other(kind):
    """One scale serves the multiplier and the shifters: within 12 % of energy, 7 % of area."""
    energy, area = 0.12, 0.07
    for figure, tolerance in (("energy", energy), ("area", area)):
        here = median(ratios(kind, figure, 576, (3, 5)))
        uniform = median(ratios("uniform", figure, 576, (3, 5)))
        assert here / uniform == pytest.approx(1.0, abs=tolerance)


def test_ternary_weights_need_no_multiplier_in_either_synthesis():
    """At 2 bits the general fit lies above both; the shipped row of its own does not."""
    general = ASIC.unit("uniform").area
    scale = median(ratios("uniform", "area", 576, (3, 6)))
    for fan_in in (4, 9, 576):
        for ratio in ratios("uniform", "area", fan_in, (2, 2)):
            assert scale / ratio == pytest.approx(1.0, abs=0.06)
    ternary = Uniform().mac(MacJob("pe", "lsq", 2, 8, 576, 64, {}), ASIC)
    assert general.at(16, 20) > 1.08 * ternary.area_ge
