"""Hardware files: their figures, what is said of a damaged one, and a user's own."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import replace
from importlib import resources

import pytest
import yaml

from adq_search.errors import CostError
from adq_search.hardware import (
    _file,
    _latency,
    hardware_names,
    layer_cost,
    load_hardware,
    parse_hardware,
)
from adq_search.policy import LayerPrecision
from adq_search.tracing import LayerInfo

#: A layer of 576 MACs an output, as the measured datapaths were built for.
BLOCK = LayerInfo("conv", "conv2d", (64, 64, 3, 3), 1, (64, 8, 8), (64, 8, 8), 2359296, 36864, 0)


def shipped(name="post_asic_45nm"):
    return resources.files("adq_search.hardware").joinpath(f"{name}.yaml").read_text("utf-8")


def test_an_unknown_hardware_model_gets_the_nearest_name():
    assert {"post_asic_45nm", "uniform_asic_45nm", "memory_bound_edge"} <= set(hardware_names())
    with pytest.raises(CostError, match=r"no hardware model 'post_asic'.*Did you mean 'post_asic_"):
        load_hardware("post_asic")
    with pytest.raises(CostError, match=r"nowhere/mine\.yaml cannot be read: No such file"):
        load_hardware("nowhere/mine.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("unit: fJ/bit^2", "unit: pJ/bit^2", "'multiply' in fJ.*is in pJ", id="unit"),
        pytest.param("    unit: fJ/bit^2\n", "", "'multiply' in fJ.*is in no unit", id="unit-less"),
        pytest.param("  rom_energy:", "  rom:", "'rom_energy' in fJ/bit.*missing", id="gone"),
        pytest.param(
            "  add: ",
            "  addd: {value: 1, unit: fJ, source: x}\n  add: ",
            "'addd' that no formula uses.*mean 'add'",
            id="unknown",
        ),
        pytest.param("value: 5.59", "value: much", "multiply.value': Input should", id="word"),
        pytest.param(
            "value: 5.59", "value: -5.59", r"multiply.value': .*greater.*-5\.59", id="negative"
        ),
        pytest.param("value: 5.59", "value: .nan", "multiply.value': Input should", id="nan"),
        pytest.param("anchor:", "anchr:", "unknown key 'anchr'. Did you mean 'anchor'", id="field"),
        pytest.param("anchor:", "anchor: [", "must be YAML", id="not yaml"),
        pytest.param(
            "{value: 1.36, unit: fJ/bit*stage,",
            "{value: 1.36, unit: GE/bit*stage,",
            "units.pot.*product must be in fJ, but is in GE/bit",
            id="unit of a fit",
        ),
        pytest.param(
            "{value: 16, unit: units,", "{value: 0, unit: units,", "rows.value.*greater", id="rows"
        ),
        pytest.param(
            "fan_in: [4, 9216]", "fan_in: [9216, 4]", r"measured.fan_in': a range runs", id="range"
        ),
        pytest.param(
            "pot: [{unit: pot}", "pot: [{unit: pto}", "`datapaths.pot`: .*mean 'pot'", id="no unit"
        ),
        pytest.param(
            "lsq: [{unit: uniform}]",
            "lsq: [{unit: uniform, level_bits: 8}]",
            "`datapaths.lsq`: .*'uniform' does not take the settings level_bits",
            id="setting",
        ),
        pytest.param(
            "{value: 500, unit: MHz,", "{value: .inf, unit: MHz,", "clock_mhz.value", id="clock"
        ),
        pytest.param("weight: [2, 3,", "weight: [1, 3,", "bits.weight.0.*greater", id="bits"),
        pytest.param(
            'source: "Horowitz, ISSCC 2014: 20 pJ for 64 bit of a 32 KB SRAM"',
            "note: x",
            "unknown key 'operators.memory_read.note'",
            id="source",
        ),
    ],
)
def test_a_damaged_table_is_refused(old, new, message):
    text = shipped()
    assert old in text

    with pytest.raises(CostError, match=message):
        parse_hardware("mine", text.replace(old, new, 1))


@pytest.mark.parametrize("name", hardware_names())
def test_every_number_of_a_shipped_file_has_unit_and_source(name):
    def rows(content):
        for value in content.values():
            if isinstance(value, dict):
                if "value" in value:
                    yield value
                else:
                    yield from rows(value)

    found = list(rows(yaml.safe_load(shipped(name))))

    assert all(row["unit"] and len(row["source"]) >= 10 for row in found)
    assert len(found) >= (60 if name == "post_asic_45nm" else 0)


def test_the_table_holds_horowitz_figures():
    model = load_hardware("post_asic_45nm")

    assert model.pj_per_fj == pytest.approx(0.3 / 651.92)  # anchor: 5.59 * 64 + 11.66 * 26 - 9 fJ
    assert model.operators.memory_read == 20 / 64
    assert model.operators.add * 32 == pytest.approx(100)  # Horowitz: 0.1 pJ for 32 bit
    assert model.float_mac_pj == pytest.approx(4.6)
    assert load_hardware("memory_bound_edge").operators.weight_read == 1300 / 64


def test_own_hardware_is_a_path_and_may_extend_a_shipped_one(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text(
        "extends: post_asic_45nm\nname: mine\ndescription: dearer multipliers\n"
        "units:\n  uniform:\n    energy:\n"
        "      product: {value: 11.18, unit: fJ/bit^2, source: our own synthesis}\n"
    )

    model = load_hardware(str(own))

    assert model.name == "mine"
    assert model.unit("uniform").energy.product == 11.18
    assert model.unit("uniform").energy.accumulator == 11.66
    assert model.unit("pot") == load_hardware("post_asic_45nm").unit("pot")
    assert layer_cost(BLOCK, LayerPrecision(4, 4, "lsq"), (), model).energy_pj > 0
    own.write_text("extends: post_asic_45mn\nname: mine\n")
    with pytest.raises(CostError, match=r"extends 'post_asic_45mn'.*mean 'post_asic_45nm'"):
        load_hardware(str(own))


def indented(text, begin):
    """The indented block of a docstring that begins with some words."""
    lines = text[text.index(f"    {begin}") :].splitlines()
    block = itertools.takewhile(lambda line: line.startswith("    "), lines)
    return textwrap.dedent("\n".join(block)) + "\n"


def test_the_documented_files_are_hardware(tmp_path):
    """The examples in the docstrings of the two formats, as a user would copy them."""
    (tmp_path / "my_chip.yaml").write_text(indented(_file.__doc__, "extends:"))
    (tmp_path / "my_chip.csv").write_text(indented(_latency.__doc__, "signature,unit"))

    model = load_hardware(str(tmp_path / "my_chip.yaml"))

    assert (model.name, model.weight_bits, model.input_bits) == ("my_chip", (4, 8), (8,))
    assert model.operators.weight_read == 1.56
    assert model.unit("uniform").energy.product == 4.9
    assert not model.takes_unlisted
    signature = "conv2d w64x64x3x3 g1 i64x56x56 o64x56x56"
    assert model.latencies == {signature: {"float": 812.4, "W8A8 lsq": 301.9}}
    layer = replace(BLOCK, input_shape=(64, 56, 56), output_shape=(64, 56, 56))
    assert layer_cost(layer, LayerPrecision(8, 8, "lsq"), (), model).latency_us == 301.9


@pytest.mark.parametrize(
    ("path", "message"),
    [
        pytest.param(
            ("units", "pot", "energy", "product"), "units.pot.energy.product", id="number"
        ),
        pytest.param(("units", "pot", "measured"), "units.pot.measured", id="range"),
        pytest.param(("anchor", "value"), "anchor.value", id="anchor"),
        pytest.param(("array", "rows"), "array.rows", id="array"),
    ],
)
def test_a_hole_is_named(path, message):
    content = yaml.safe_load(shipped())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]

    with pytest.raises(CostError, match=message):
        parse_hardware("mine", yaml.safe_dump(content))


def test_a_unit_without_constants_is_told_with_its_layer():
    content = yaml.safe_load(shipped())
    del content["units"]["pot"]
    content["datapaths"]["pot"] = [{"unit": "pot"}]
    model = parse_hardware("mine", yaml.safe_dump(content))

    with pytest.raises(CostError, match=r"layer 'conv'.*no constants for unit 'pot'.*`units`"):
        layer_cost(BLOCK, LayerPrecision(4, 4, "pot"), (), model)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        pytest.param(
            LayerPrecision(3, 4, "lsq"),
            r"`conv` asks for 3 bits \(`weight_bits`\).*_45nm' has 2, 4, 8\. Take 3 out",
            id="weight bits",
        ),
        pytest.param(
            LayerPrecision(4, 3, "lsq"), r"asks for 3 bits \(`input_bits`\)", id="input bits"
        ),
        pytest.param(
            LayerPrecision(4, 4, "post"),
            r"'uniform_asic_45nm' has no datapath for weights of quantizer 'post', which `conv`",
            id="scheme",
        ),
    ],
)
def test_a_layer_that_the_hardware_cannot_run_is_named(precision, message):
    with pytest.raises(CostError, match=message):
        layer_cost(BLOCK, precision, (), load_hardware("uniform_asic_45nm"))
