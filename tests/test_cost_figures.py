"""Area, stored and moved bits, operations of the paper, cycles and latency, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torchvision import models

from adq_search.cli import main
from adq_search.errors import CostError
from adq_search.hardware import (
    cost,
    layer_cost,
    load_hardware,
    precision_key,
    signature_of,
    total_of,
)
from adq_search.hardware.datapaths import Codebook, CodebookBins
from adq_search.hardware.input_stages import SCALE_BYTES, asq
from adq_search.integer import _factor
from adq_search.integer._fixed import CARRIER_BITS, MULTIPLIER_BITS, SUM_BITS
from adq_search.integer.words import LEVEL_BITS
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.prior import check_budgets, cost_range
from adq_search.space import SearchSpace
from adq_search.tracing import trace


@pytest.fixture(scope="module")
def network():
    """A 3x3 convolution, a depthwise one, a pointwise one, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),  # 32x8x8 outputs of 27 MACs
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),  # of 9 MACs
        nn.Conv2d(32, 40, 1, bias=False),  # 40x8x8 of 32 MACs
        nn.Flatten(),
        nn.Linear(2560, 10, bias=False),
    )


@pytest.fixture(scope="module")
def summary(network):
    return trace(network, torch.zeros(1, 3, 8, 8))


POLICY = Policy.of(
    {
        "0": LayerPrecision(8, 8, "lsq"),
        "1": LayerPrecision(4, 3, "lsq"),
        "2": LayerPrecision(4, 4, "post"),
        "4": LayerPrecision(3, 4, "adq", ema_momentum=0.9),
    }
)


def test_the_four_figures_by_hand(summary):
    report = cost(summary, POLICY)
    first, depthwise, pointwise, last = report.layers

    assert [c.datapath for c in report.layers] == ["uniform", "uniform", "post_dual", "codebook"]
    # W = 8 + 8 + 5, 4 + 3 + 4, then P = 4 + 3 and W = 8 + 5, then 8 + 4 + 12
    assert [c.accumulator_bits for c in report.layers] == [21, 11, 13, 24]
    assert [c.product_bits for c in report.layers] == [16, 7, 7, 12]
    assert first.area_ge == pytest.approx(5.80 * 64 + 11.33 * 21 - 8)
    assert depthwise.area_ge == pytest.approx(5.80 * 12 + 11.33 * 11 - 8)
    assert pointwise.area_ge == pytest.approx(1.62 * 7 * 3 + 19.23 * 13 + 8)
    # a table of 8 words of 8 bits beside the multiplier
    assert last.area_ge == pytest.approx(6.7566 * 32 + 11.7942 * 24 - 49.9924 + 2.1486 * 8 * 8**0.5)
    assert [c.activation_bits for c in report.layers] == [1536, 6144, 8192, 10240]
    assert first.stored_bits == 864 * 8 + 33 * 32
    total = report.total
    assert total.largest_area_ge == first.area_ge
    macs = [c.macs for c in report.layers]
    assert total.mean_area_ge == pytest.approx(
        sum(m * c.area_ge for m, c in zip(macs, report.layers)) / sum(macs)
    )
    assert total.activation_bits == sum([1536, 6144, 8192, 10240])
    assert total.stored_bits == 8 * total.memory_bytes


def test_operations_of_the_paper_and_of_unrolled_multipliers(summary):
    first, depthwise, pointwise, last = cost(summary, POLICY).layers

    assert first.qops == first.macs / 4  # Eq. 15
    assert depthwise.qops == depthwise.macs / 8  # Eq. 16, the wider operand's 4 bits
    assert first.ebops == first.bops == first.macs * 64
    assert pointwise.ebops == pointwise.macs * 4  # one power of two: the input's bits
    assert last.ebops == last.macs * 8 * 4  # level words of 8 bits, not codes of 3


def test_cycles_of_an_array_by_hand(summary):
    """16 rows of output positions, 16 columns of channels, 128 bits a cycle, 500 MHz."""
    report = cost(summary, POLICY)
    first, depthwise, pointwise, last = report.layers

    assert first.cycles == 4 * 2 * 27  # 64 positions, 32 channels
    assert first.utilisation == pytest.approx(1.0)
    assert depthwise.cycles == 4 * 32 * 9  # a group has one channel: one column works
    assert depthwise.utilisation == pytest.approx(1 / 16)
    assert pointwise.cycles == 4 * 3 * 32  # 40 channels fill two and a half columns' worth
    assert pointwise.utilisation == pytest.approx(40 / 48)
    assert last.cycles == 2560  # one position: one row works
    assert last.utilisation == pytest.approx(10 / 256)
    total = report.total
    assert total.cycles == sum(c.cycles for c in report.layers)
    assert total.utilisation == pytest.approx(total.macs / (total.cycles * 256))
    assert total.latency_us == pytest.approx(total.cycles / 500)


def test_a_slow_memory_holds_the_array_back(summary):
    here = layer_cost(
        summary["4"], LayerPrecision(8, 8, "lsq"), (), load_hardware("post_asic_45nm")
    )
    edge = load_hardware("memory_bound_edge")
    there = layer_cost(summary["4"], LayerPrecision(8, 8, "lsq"), (), edge)

    assert here.cycles == 2560
    assert there.cycles == math.ceil(there.stored_bits / 32) > 2 * 2560
    assert there.weight_memory_pj == pytest.approx(here.weight_memory_pj * 65)
    assert there.compute_pj == here.compute_pj


def test_depthwise_layers_of_mobilenet_fill_one_column():
    summary = trace(models.mobilenet_v2(), torch.zeros(1, 3, 224, 224))
    policy = Policy.uniform(summary.names, LayerPrecision(4, 4, "lsq"))

    report = cost(summary, policy)

    depthwise = [c for c, i in zip(report.layers, summary.layers) if i.groups > 1]
    assert len(depthwise) == 17
    assert all(c.utilisation <= 1 / 16 for c in depthwise)
    assert max(c.utilisation for c in report.layers) > 0.9
    assert report.extrapolated == ()  # nine terms were measured too


def test_widths_are_those_of_the_integer_network():
    """One truth: what `adq_search.integer` computes with is what is charged."""
    operators = load_hardware("post_asic_45nm").operators
    assert operators.requantize == MULTIPLIER_BITS == 8 * SCALE_BYTES
    assert (asq.ADAPTER_BITS, asq.VALUE_BITS) == (_factor.WEIGHT_BITS, _factor.VALUE_BITS)
    assert asq.FACTOR_BITS == _factor.FACTOR_BITS
    assert asq.RECIPROCAL_BITS == SUM_BITS
    assert operators.carrier == CARRIER_BITS
    assert Codebook().level_bits == CodebookBins().level_bits == LEVEL_BITS


OWN = """
extends: post_asic_45nm
name: mine
description: measured
latency_table: {file: mine.csv, source: our board}
"""


def own_hardware(tmp_path, rows, text=OWN):
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "mine.csv").write_text("\n".join(rows) + "\n")
    return str(tmp_path / "mine.yaml")


def full_table(summary, unit="us"):
    rows = [f"signature,unit,{precision_key(FLOAT)},W8A8 lsq"]
    return rows + [
        f"{signature_of(layer)},{unit},{300 * (i + 1)},{10 * (i + 1)}"
        for i, layer in enumerate(summary.layers)
    ]


def test_a_latency_table_is_a_cost(summary, tmp_path):
    path = own_hardware(tmp_path, full_table(summary))
    policy = Policy.uniform(summary.names, LayerPrecision(8, 8, "lsq"), ends=FLOAT)

    assert cost(summary, policy, path).total.latency_us == 300 + 20 + 30 + 1200
    in_cycles = own_hardware(tmp_path, full_table(summary, "cycles"))
    assert cost(summary, policy, in_cycles).total.latency_us == pytest.approx(1550 / 500)


def test_signatures_tell_shapes_apart(summary):
    assert signature_of(summary["1"]) == "conv2d w32x1x3x3 g32 i32x8x8 o32x8x8"
    assert len({signature_of(layer) for layer in summary.layers}) == 4
    assert precision_key(LayerPrecision(3, 4, "adq", 0.9)) == "W3A4 adq"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda rows: [r.replace(",20", ",") for r in rows], "line 3.*cell is empty",
                     id="hole"),
        pytest.param(lambda rows: [r.replace(",20", "") for r in rows], "line 3.*cell is empty",
                     id="short row"),
        pytest.param(lambda rows: [r.replace(",20", ",-20") for r in rows], "positive.*'-20'",
                     id="negative"),
        pytest.param(lambda rows: [r.replace(",20", ",much") for r in rows], "positive.*'much'",
                     id="word"),
        pytest.param(lambda rows: [r.replace(",us,", ",ms,") for r in rows], "us or cycles.*'ms'",
                     id="unit"),
        pytest.param(lambda rows: [*rows, rows[-1]], "stands twice", id="twice"),
        pytest.param(lambda rows: rows[:1], "needs the columns", id="nothing"),
    ],
)  # fmt: skip
def test_a_damaged_latency_table_is_refused(summary, tmp_path, change, message):
    path = own_hardware(tmp_path, change(full_table(summary)))

    with pytest.raises(CostError, match=message):
        load_hardware(path)


def test_what_the_table_lacks_is_named_before_training(summary, tmp_path):
    spec = {"default": {"weight_bits": [4, 8], "input_bits": [8], "schemes": ["lsq"]}}
    space = SearchSpace.from_spec(spec, summary)
    precision = LayerPrecision(8, 8, "lsq")
    short = own_hardware(tmp_path, full_table(summary)[:3])

    with pytest.raises(CostError, match=r"no row for layer '2' \(conv2d w40x32x1x1 g1.*Measure it"):
        layer_cost(summary["2"], precision, (), load_hardware(short))
    with pytest.raises(CostError, match=r"no column 'W4A8 lsq', which layer '1' asks for"):
        check_budgets(space, summary, {}, own_hardware(tmp_path, full_table(summary)))
    with pytest.raises(CostError, match=r"`1` asks for 3 bits"):
        check_budgets(
            SearchSpace.from_spec({"default": {**spec["default"], "weight_bits": [2, 3]}}, summary),
            summary,
            {},
            "uniform_asic_45nm",
        )


def test_a_run_on_hardware_that_lacks_bits_ends_before_training(tmp_path, monkeypatch, capsys):
    space = tmp_path / "space.yaml"
    space.write_text(
        "task: tests.tiny:make\n"
        "space: {default: {weight_bits: [2, 3, 4], input_bits: [4], schemes: [lsq]}}\n"
        "training: {epochs: 1, batch_size: 10}\n"
        "search: {trials: 2, hardware: uniform_asic_45nm}\n"
    )
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["adq-search", "run", str(space), "--out", str(out)])

    with pytest.raises(SystemExit) as stop:
        main()

    assert stop.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "asks for 3 bits (`weight_bits`), but hardware 'uniform_asic_45nm' has 2, 4, 8." in told
    assert "Take 3 out of the space's `weight_bits`" in told
    assert not list(out.rglob("trials.csv"))


def test_a_policy_file_is_priced(summary, tmp_path, monkeypatch, capsys):
    path = tmp_path / "policy.json"
    network = trace(models.get_model("squeezenet1_1"), torch.zeros(1, 3, 64, 64))
    policy = Policy.uniform(network.names, LayerPrecision(4, 4, "asq"))
    path.write_text(json.dumps(policy.to_json()))
    words = "cost --model torchvision:squeezenet1_1 --input 3x64x64 --json --policy"
    monkeypatch.setattr("sys.argv", ["adq-search", *words.split(), str(path)])

    with pytest.raises(SystemExit) as stop:
        main()

    assert stop.value.code in (None, 0)
    content = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in content["layers"]] == list(network.names)
    assert content["total"] == total_of(cost(network, policy))


def test_hardware_without_array_has_no_cycles(summary, tmp_path):
    path = own_hardware(
        tmp_path, [], "extends: post_asic_45nm\nname: mine\ndescription: x\narray: null\n"
    )
    report = cost(summary, POLICY, path)

    assert report.total.cycles is None
    assert not {"cycles", "utilisation", "latency_us"} & set(total_of(report))
    assert "cycles" not in json.dumps(report.to_json())
    spec = {"default": {"weight_bits": [2, 4], "input_bits": [4], "schemes": ["lsq"]}}
    space = SearchSpace.from_spec(spec, summary)
    with pytest.raises(CostError, match="no figure 'cycles': it needs an `array`"):
        cost_range(space, summary, "cycles", path)


@pytest.mark.parametrize("name", ["mean_area_ge", "cycles", "latency_us", "stored_bits", "qops"])
def test_a_search_may_limit_the_new_figures(summary, name):
    spec = {"default": {"weight_bits": [2, 4], "input_bits": [4], "schemes": ["lsq", "post"]}}
    space = SearchSpace.from_spec(spec, summary)

    low, high = cost_range(space, summary, name, "post_asic_45nm")

    for bits, bound in ((2, low), (4, high)):
        inner = LayerPrecision(bits, 4, "lsq")
        policy = Policy.uniform(summary.names, inner, ends=LayerPrecision(8, 8, "lsq"))
        value = total_of(cost(summary, policy))[name]
        assert low * (1 - 1e-12) <= value <= high * (1 + 1e-12)
        if bits == 2:
            assert value == pytest.approx(bound)


def test_the_command_prints_the_datapaths(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "220")
    words = "cost --model torchvision:resnet18 --input 3x224x224 --uniform W4A4 --scheme post"
    monkeypatch.setattr("sys.argv", ["adq-search", *words.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out
    assert stop.value.code in (None, 0)
    assert "post_dual" in out
    assert "utilisation" in out
    monkeypatch.setattr("sys.argv", ["adq-search", *words.split(), "--json"])
    with pytest.raises(SystemExit):
        main()
    content = json.loads(capsys.readouterr().out)
    assert content["layers"][1]["datapath"] == "post_dual"
    assert content["total"]["largest_area_ge"] > content["total"]["mean_area_ge"] > 0
