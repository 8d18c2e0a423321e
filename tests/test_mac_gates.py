"""The measured gates: widths, formulas and the shipped cost model against the committed table."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from adq_search.hardware import load_hardware, paper

FOLDER = Path(__file__).parent.parent / "results" / "mac_gates"
UNIFORM_8X8_GE = 657.78  # 5.8 * 64 + 11.33 * 26 - 8
MODULES = (
    "reference",
    "designs",
    "vectors",
    "icarus",
    "netlist",
    "fit",
    "derive",
    "shipped",
    "run",
)


@pytest.fixture(scope="module")
def gates():
    """The scripts of results/mac_gates, which are no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in (*MODULES, "compare"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def table(gates):
    return gates.run.read_table(FOLDER / "mac_gates.csv")


@pytest.fixture(scope="module")
def fitted():
    return json.loads((FOLDER / "fit.json").read_text(encoding="utf-8"))


def test_every_design_has_a_row_that_was_proven(gates, table):
    assert all(row["equivalent"] for row in table)
    assert len(table) == len(gates.designs.all_designs())
    for row, design in zip(table, gates.designs.all_designs()):
        assert row["kind"] == design.kind
        assert row["W"] == (design.width or design.parameters.get("W", row["W"]))
    assert all(row["netlist_vectors"] >= 4096 for row in table)


def test_area_is_the_sum_of_the_weighted_gates(gates, table):
    for row in table:
        total, combinational = gates.netlist.gate_equivalents(row["cells"])
        assert row["ge_total"] == pytest.approx(total, abs=0.05)
        assert row["ge_comb"] == pytest.approx(combinational, abs=0.05)


def test_register_bits_are_the_accumulators(table):
    for row in table:
        if row["accumulators"]:
            assert row["register_bits"] == row["accumulators"] * row["W"]


def test_depthwise_fan_in_and_two_bit_weights_are_there(table):
    kinds = {r["kind"] for r in table if r["n"] == 9}
    assert {"uniform", "pot", "post_dual", "post_broadcast", "codebook", "root3"} <= kinds
    assert kinds <= {r["kind"] for r in table if r["n"] == 4}
    assert {r["b_a"] for r in table if r["kind"] == "uniform" and r["b_w"] == 2} == {2, 3, 4, 6, 8}


def test_widths_are_the_cost_model_s(gates, table):
    answered = [(row, gates.shipped.shipped_mac(row)) for row in table]
    answered = [(row, mac.widths) for row, mac in answered if mac]
    assert {row["kind"] for row, _ in answered} == set(gates.shipped.UNITS)
    for row, widths in answered:
        assert (widths.accumulator, widths.n_accumulators) == (row["W"], row["accumulators"]), row


def test_no_sum_passes_its_accumulator(gates):
    """The largest sum either way, in Python's unbounded integers."""
    for design in gates.designs.all_designs():
        if design.is_mac:
            code = np.arange(2 ** design.inputs["code"])
            top = np.full_like(code, 2 ** design.inputs["a"] - 1)
            inputs = {"a": top, "code": code}
            if "words" in design.inputs:  # the most negative word, then the most positive
                bits = design.parameters["L"]
                inputs["words"] = np.full(
                    len(code), 2 ** (bits - 1) + ((2 ** (bits - 1) - 1) << bits)
                )
            if "a_root" in design.inputs:
                f = design.parameters["F"]
                inputs["a_root"] = gates.reference.root_prepared(top, f, 181)
            added = gates.reference.terms(design, inputs)
            n, width = design.parameters["N"], design.width
            low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
            if design.kind == "codebook_bins":
                low, high = 0, 2**width - 1
            assert low <= n * int(added.min()), design.label
            assert n * int(added.max()) <= high, design.label


@pytest.mark.parametrize("column", ["ge_total", "energy"])
def test_fitted_formulas_hold_within_their_stated_error(gates, table, fitted, column):
    assert set(fitted[column]) == set(gates.fit.FEATURES)
    for kind, stated in fitted[column].items():
        rows = [r for r in table if gates.fit.kind_of(r) == kind]
        errors = [
            abs(gates.fit.predict(kind, stated["coefficients"], r, column) / r[column] - 1.0)
            for r in rows
        ]
        assert len(rows) == stated["rows"]
        assert np.mean(errors) == pytest.approx(stated["mape"], abs=5e-4), kind
        assert max(errors) == pytest.approx(stated["max_error"], abs=1e-3), kind


@pytest.mark.parametrize("column", ["ge_total", "energy"])
def test_shipped_formulas_hold_within_their_stated_error(gates, table, fitted, column):
    """After a change of `hardware/*.yaml`: `python results/mac_gates/run.py --fit-only`."""
    found = gates.shipped.shipped_errors(table)[column]
    assert set(found) == set(fitted["shipped"][column]) == set(gates.shipped.UNITS)
    for kind, parts in fitted["shipped"][column].items():
        assert set(found[kind]) == set(parts)
        for where, stated in parts.items():
            assert found[kind][where]["rows"] == stated["rows"]
            assert found[kind][where]["mape"] <= stated["mape"] + 5e-4, (kind, where)
            assert found[kind][where]["max_error"] <= stated["max_error"] + 1e-3, (kind, where)


@pytest.mark.parametrize(("figure", "column"), [("area", "ge_total"), ("energy", "energy")])
def test_derived_constants_are_shipped(gates, table, figure, column):
    """The datapaths with the shipped file give the errors that derived.json states."""
    derived = json.loads((FOLDER / "derived.json").read_text(encoding="utf-8"))
    hardware, found = load_hardware("post_asic_45nm"), {}
    for row in table:
        kind = gates.fit.kind_of(row)
        if kind == "requantize":
            value = hardware.rescale_fj(row["W"], row["b_w"])
        elif kind in derived:
            mac = gates.shipped.shipped_mac(row)
            value = mac.area_ge if figure == "area" else mac.mac_pj / hardware.pj_per_fj
        else:
            continue
        expected = row[column] * derived[kind][figure]["scale"]
        found.setdefault(kind, []).append(abs(value / expected - 1.0))
    if figure == "area":
        del found["requantize"]  # its area is not charged
    assert set(found) == set(gates.derive.KINDS) - ({"requantize"} if figure == "area" else set())
    for kind, errors in found.items():
        stated = derived[kind][figure]["ours"]
        assert len(errors) == stated["rows"]
        assert np.mean(errors) == pytest.approx(stated["mape"], abs=5e-4), kind
        assert max(errors) == pytest.approx(stated["max_error"], abs=1e-3), kind


#: Mean and largest error of the shipped ratios to the uniform 8x8 unit against the 45 nm rows.
STATED_45NM = {
    "uniform": ((0.033, 0.102), (0.017, 0.064)),
    "pot": ((0.048, 0.090), (0.046, 0.099)),
    "post_dual": ((0.044, 0.059), (0.030, 0.068)),
    "post_broadcast": ((0.044, 0.103), (0.041, 0.090)),
    "post_literal": ((0.084, 0.200), (0.032, 0.107)),
    "post_table": ((0.072, 0.172), (0.057, 0.130)),
    "codebook": ((0.054, 0.097), (0.026, 0.060)),
    "codebook_bins": ((0.046, 0.063), (0.106, 0.156)),
}


@pytest.mark.parametrize("kind", STATED_45NM)
def test_shipped_ratios_hold_against_the_45_nm_rows(gates, kind):
    with (FOLDER / "comparison.csv").open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["kind"] == kind and r["area_45nm"]]
    whole = ("b_a", "b_w", "f")
    found = {"area": [], "energy": []}
    for row in rows:
        numbers = {name: int(row[name]) for name in whole}
        place = {"kind": kind, "n": 576, "level_bits": 8}
        mac = gates.shipped.shipped_mac({**place, **numbers})
        found["area"].append(mac.area_ge / UNIFORM_8X8_GE / float(row["area_45nm"]) - 1.0)
        found["energy"].append(mac.mac_pj / 0.3 / float(row["energy_45nm"]) - 1.0)
    for errors, (mean, largest) in zip(found.values(), STATED_45NM[kind], strict=True):
        assert np.abs(errors).mean() <= mean
        assert np.abs(errors).max() <= largest


@pytest.mark.parametrize("root", [1, 2, 3, 4])
@pytest.mark.parametrize("b_w", [3, 4, 5])
def test_banks_sum_to_the_real_product(gates, root, b_w):
    """y = 2^-S sum_j 2^(-j/r) E_j is the sum of the inputs times the real weights."""
    rng = np.random.default_rng(b_w)
    kind = {1: "pot", 2: "post_dual", 3: "root3", 4: "root4"}[root]
    design = gates.designs.mac(kind, b_a=8, b_w=b_w, n=9)
    a, code = rng.integers(0, 256, 500), rng.integers(0, 2**b_w, 500)
    banks = gates.reference.terms(design, {"a": a, "code": code}).sum(axis=0)
    shift = (2 ** (b_w - 1) - 2) // root
    found = sum(float(e) * 2.0 ** (-j / root) for j, e in enumerate(banks)) / 2**shift
    zero = 2 ** (b_w - 1) - 1
    expected = 0.0
    for value, word in zip(a, code):
        exponent = int(word) % (zero + 1)
        weight = 0.0 if exponent == zero else 2.0 ** (-exponent / root)
        expected += float(value) * weight * (-1.0 if word > zero else 1.0)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("f", [0, 2, 4])
def test_table_entries_are_rounded_roots(gates, f):
    with localcontext() as context:
        context.prec = 50
        half = Decimal(2).sqrt() / 2
        expected = [int((half * i * 2**f).to_integral_value()) for i in range(256)]
    assert gates.reference.root_half(range(256), f).tolist() == expected
    assert paper.odd_column(8, fraction_bits=f).tolist() == expected


def test_literal_table_is_the_paper_s_eight_by_four(gates):
    a, k = np.meshgrid(np.arange(8), np.arange(4), indexing="ij")
    found = gates.reference.literal(a.ravel(), k.ravel()).reshape(8, 4)
    assert found.tolist() == paper.product_table(3, 3).tolist()
    assert found[7].tolist() == [7, 5, 3, 2]


def test_switching_of_a_known_circuit(gates):
    """A flip-flop that follows its inverted output: it and the inverter change every clock."""
    netlist = gates.netlist.Netlist(
        gates=[("NOT", "d", ["q"])],
        flops=[("q", "d", None, 0)],
        ports={"unused": ["u"], "out": ["q"]},
        depth=1,
    )
    design = SimpleNamespace(inputs={"unused": 1}, outputs={"out": 1})
    still = {"unused": np.zeros((5, 3), dtype=np.int64)}
    out, switched = gates.netlist.run_lanes(netlist, design, still, [True] + [False] * 4)
    assert out["out"][:, 0].tolist() == [1, 0, 1, 0, 1]
    weights = gates.netlist.GATE_GE
    each_clock = weights["NOT"] + weights["DFF"] + weights["RESET"] + gates.netlist.CLOCK_GE
    assert switched == pytest.approx(each_clock)
    assert netlist.counts == {"DFF": 1, "NOT": 1, "RESET": 1}


def test_lanes_come_back(gates):
    codes = np.random.default_rng(0).integers(0, 2**13, 77)
    assert (
        gates.netlist.from_lanes(gates.netlist.to_lanes(codes, 13), 77).tolist() == codes.tolist()
    )


def test_a_wrong_circuit_is_told(gates):
    design = gates.designs.mac("uniform", b_a=3, b_w=3, n=9)
    good = np.arange(8)
    with pytest.raises(RuntimeError, match="uniform B_A=3 .*: netlist and reference differ in 1 "):
        gates.run._demand_equal(design, "netlist", {"acc0": good + (good == 3)}, {"acc0": good})


def needs_tools():
    missing = [tool for tool in ("yosys", "iverilog") if shutil.which(tool) is None]
    reason = f"{' and '.join(missing)} missing: apt-get install -y yosys iverilog"
    return pytest.mark.skipif(bool(missing), reason=reason)


@pytest.mark.slow
@needs_tools()
def test_one_circuit_of_each_kind_is_proven_and_counted_again(gates, tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = gates.run.read_table(tmp_path / "mac_gates.csv")
    assert {r["kind"] for r in rows} == {d.kind for d in gates.designs.all_designs()}
    assert all(r["equivalent"] for r in rows)


@pytest.mark.slow
@needs_tools()
def test_a_broken_multiplier_does_not_pass(gates, tmp_path, monkeypatch):
    broken = tmp_path / "rtl"
    shutil.copytree(FOLDER / "rtl", broken)
    source = (broken / "array_multiply.v").read_text()
    (broken / "array_multiply.v").write_text(source.replace(".carry_in(1'b1)", ".carry_in(1'b0)"))
    monkeypatch.setattr(gates.icarus, "RTL", broken)
    design = gates.designs.mac("uniform", b_a=3, b_w=3, n=9)
    with pytest.raises(RuntimeError, match="Verilog and reference differ"):
        gates.run.measure(design)
