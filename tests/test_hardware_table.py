"""The operator table: its figures, and what is said of a damaged one."""

from __future__ import annotations

from importlib import resources

import pytest

from adq_search.errors import CostError
from adq_search.hardware import hardware_names, load_hardware, parse_hardware


def test_an_unknown_hardware_model_gets_the_nearest_name():
    assert "post_asic_45nm" in hardware_names()
    with pytest.raises(CostError, match=r"no hardware model 'post_asic'.*Did you mean 'post_asic_"):
        load_hardware("post_asic")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("unit: fJ/bit^2", "unit: pJ/bit^2", "'multiply' in fJ.*is in pJ", id="unit"),
        pytest.param("  look_up:", "  look_down:", "'look_up' in factor.*missing", id="gone"),
        pytest.param(
            "  add: ",
            "  addd: {value: 1, unit: fJ, source: x}\n  add: ",
            "'addd' that no formula uses.*mean 'add'",
            id="unknown",
        ),
        pytest.param("value: 5.59", "value: much", "multiply.value: Input should", id="word"),
        pytest.param("anchor:", "anchr:", "damaged: anchor: Field required", id="field"),
        pytest.param("anchor:", "anchor: [", "must be YAML", id="not yaml"),
    ],
)
def test_a_damaged_table_is_refused(old, new, message):
    folder = resources.files("adq_search.hardware")
    text = folder.joinpath("post_asic_45nm.yaml").read_text(encoding="utf-8")
    assert old in text

    with pytest.raises(CostError, match=message):
        parse_hardware("mine", text.replace(old, new, 1))


def test_the_table_holds_horowitz_figures():
    model = load_hardware("post_asic_45nm")

    assert model.pj_per_fj == pytest.approx(0.3 / 651.92)  # anchor: 5.59 * 64 + 11.66 * 26 - 9 fJ
    assert model.operators.memory_read == 20 / 64
    assert model.operators.add * 32 == pytest.approx(100)  # Horowitz: 0.1 pJ for 32 bit
    assert model.float_mac_pj == pytest.approx(4.6)
