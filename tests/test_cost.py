"""Costs against figures worked out by hand, published tables and gate-level measurements."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from adq_search.errors import CostError, PolicyError
from adq_search.hardware import (
    COST_NAMES,
    cost,
    layer_cost,
    load_hardware,
    register_datapath,
    register_input_stage,
    total_of,
)
from adq_search.hardware.datapaths import CodebookBins, Uniform, datapaths_of
from adq_search.hardware.input_stages import input_stage_of
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.tasks.networks import resnet20
from adq_search.tracing import LayerInfo, trace

# 5.59 * 8 * 8 + 11.66 * (8 + 8 + 10) - 9 fJ, the anchor MAC: 576 terms carry 10 bits.
ANCHOR_FJ = 651.92
K = 0.3 / ANCHOR_FJ  # pJ for one fJ of the synthesis
R = 12.3902  # fJ of a rescaling, for each bit of the value times each of its 32-bit multiplier


@pytest.fixture(scope="module")
def three_layers():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),  # 4x8x8 outputs of 9 MACs
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False),  # 8x4x4 of 18 MACs
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return trace(network, torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def resnet18():
    return trace(models.resnet18(), torch.zeros(1, 3, 224, 224))


MIXED = Policy.of(
    {
        "0": LayerPrecision(8, 8, "lsq"),
        "2": LayerPrecision(4, 3, "post"),
        "4": LayerPrecision(3, 4, "adq", ema_momentum=0.9),
    }
)


def test_a_uniform_layer_by_hand(three_layers):
    layer = cost(three_layers, MIXED).layers[0]

    assert layer.name == "0"
    assert (layer.weight_bits, layer.input_bits) == (8, 8)
    assert layer.macs == 256 * 9
    assert layer.weight_bytes == 36
    assert layer.overhead_bytes == 4 * 4 + 4  # one step an output channel, one for the input
    assert layer.memory_bytes == 56
    assert layer.bops == 2304 * 64
    # W = 8 + 8 + 4 = 20: 357.76 + 233.2 - 9
    assert layer.compute_pj == pytest.approx(2304 * 581.96 * K)
    assert layer.requantize_pj == pytest.approx(256 * R * 20 * 32 * K)
    assert layer.weight_memory_pj == pytest.approx(56 * 8 * 0.3125)
    assert layer.input_memory_pj == pytest.approx(64 * 8 * 0.3125)
    assert layer.quantizer_pj == 0


def test_a_post_layer_by_hand(three_layers):
    layer = cost(three_layers, MIXED).layers[1]

    assert layer.macs == 128 * 18
    assert layer.weight_bytes == 144 * 4 / 8
    assert layer.overhead_bytes == 8 * 4 + 4
    assert layer.bops == 2304 * 4 * 3
    # 15 levels: exponents 0..6 of sqrt 2, so S = 3, P = 3 + 3, 2 stages, W = 3 + 3 + 1 + 5 = 12:
    # 2.48 * 6 * 3 + 17.32 * 12 + 9
    assert layer.compute_pj == pytest.approx(2304 * 261.48 * K)
    # two accumulators, each with its multiplier, as in the integer network
    assert layer.requantize_pj == pytest.approx(128 * 2 * R * 12 * 32 * K)
    assert layer.weight_memory_pj == pytest.approx(108 * 8 * 0.3125)
    assert layer.input_memory_pj == pytest.approx(256 * 3 * 0.3125)


def test_a_codebook_layer_by_hand(three_layers):
    layer = cost(three_layers, MIXED).layers[2]

    assert layer.macs == 1280
    assert layer.weight_bytes == 1280 * 3 / 8
    # level words of a byte and their scale; thresholds and output scale
    assert layer.overhead_bytes == 7 + 4 + (15 + 1) * 4
    assert layer.bops == 1280 * 3 * 4
    # an 8-bit multiplier whatever the code, W = 8 + 4 + 7 = 19; a table of 8 words of 8 bits
    mac_fj = 6.5312 * 32 + 9.4513 * 19 - 40.945 + 3.844 * 8 * 8**0.5
    assert layer.compute_pj == pytest.approx(1280 * mac_fj * K)
    assert layer.requantize_pj == pytest.approx(10 * R * 19 * 32 * K)
    assert layer.weight_memory_pj == pytest.approx(555 * 8 * 0.3125)
    assert layer.input_memory_pj == pytest.approx(128 * 4 * 0.3125)
    # 4 comparisons of 32 bits for each of 128 inputs, 3.125 fJ a bit
    assert layer.quantizer_pj == pytest.approx(512 * 32 * 3.125e-3)


def test_totals_are_sums_and_averages(three_layers):
    report = cost(three_layers, MIXED)
    total = report.total

    assert total.macs == 2304 + 2304 + 1280
    assert total.weight_bytes == 36 + 72 + 480
    assert total.overhead_bytes == 20 + 36 + 75
    assert total.memory_bytes == 719
    assert total.bops == 147_456 + 27_648 + 15_360
    assert total.energy_pj == pytest.approx(
        2304 * 581.96 * K + 256 * 640 * R * K + 140 + 160
        + 2304 * 261.48 * K + 128 * 768 * R * K + 270 + 240
        + 1280 * 434.6079 * K + 10 * 608 * R * K + 1387.5 + 160 + 51.2
    )  # fmt: skip
    parts = ("compute", "requantize", "weight_memory", "input_memory", "quantizer")
    assert total.energy_pj == pytest.approx(sum(getattr(total, f"{p}_pj") for p in parts))
    assert total.average_bits_inner == 4
    assert total.average_bits_weighted == pytest.approx((36 * 8 + 144 * 4 + 1280 * 3) / 1460)
    assert total.average_bits_layers == 5
    assert report.extrapolated == ()


def test_a_pot_layer_by_hand(three_layers):
    layer = layer_cost(three_layers["2"], LayerPrecision(4, 3, "pot"))

    # exponents 0..6 of 2, so S = 6, P = 3 + 6, 3 stages, W = 3 + 6 + 1 + 5 = 15:
    # 1.36 * 9 * 4 + 13.98 * 15 + 49
    assert layer.compute_pj == pytest.approx(2304 * 307.66 * K)
    assert layer.requantize_pj == pytest.approx(128 * R * 15 * 32 * K)


@pytest.mark.parametrize("scheme", ["lsq", "pot", "post"])
def test_two_bits_are_ternary(three_layers, scheme):
    layer = layer_cost(three_layers["2"], LayerPrecision(2, 3, scheme))

    # no multiplier at all: W = 2 + 3 + 5 = 10, for every quantizer the same unit
    assert layer.compute_pj == pytest.approx(2304 * (4.7172 * 6 + 8.4712 * 10 + 9.6341) * K)
    assert layer.weight_bits == 2
    assert layer.datapath == "uniform"


def test_the_adapter_of_asq_by_hand(three_layers):
    pooled = layer_cost(three_layers["2"], LayerPrecision(4, 3, "asq"))
    flat = layer_cost(three_layers["4"], LayerPrecision(4, 3, "asq"))

    # 4 channels of 8x8: 256 additions of 32 + 6 bits, 4 means; 4 -> 1 of 27-bit values and 24-bit
    # weights, rescaled from 53 bits; a reciprocal; 256 inputs divided, 128 outputs multiplied
    bits = 4 * 38 * 32 + 4 * 27 * 24 + 53 * 32 + 62 * 31 + (256 + 128) * 32 * 31
    assert pooled.quantizer_pj == pytest.approx(256 * 38 * 3.125e-3 + bits * R * K)
    assert pooled.quantizer_ops == 256 + 4 + 5 + 1 + 256 + 128
    assert pooled.overhead_bytes == 8 * 4 + 4 + 3 * 5
    # 128 -> 32 -> 1, nothing to pool
    bits = 128 * 32 * 32 + 4096 * 648 + 32 * 58 * 32 + 32 * 648 + 56 * 32 + 62 * 31 + 138 * 992
    assert flat.quantizer_pj == pytest.approx(bits * R * K)
    assert flat.overhead_bytes == 10 * 4 + 4 + 3 * (128 * 32 + 32 + 32 + 1)


def test_inputs_that_wait_for_their_factor_are_read_twice(three_layers):
    """No input becomes a code before the last of its sample is there: 32-bit values wait."""
    waiting = layer_cost(three_layers["2"], LayerPrecision(4, 3, "asq"))
    direct = layer_cost(three_layers["2"], LayerPrecision(4, 3, "lsq"))

    assert direct.activation_bits == 256 * 3
    assert waiting.activation_bits == 256 * (3 + 32)
    assert waiting.input_memory_pj == pytest.approx(256 * 35 * 0.3125)
    assert waiting.cycles == -(-256 * 35 // 128) > direct.cycles


def test_adapters_of_resnet18_have_the_papers_size(resnet18):
    policy = {
        scheme: Policy.uniform(
            resnet18.names, LayerPrecision(4, 4, scheme), ends=LayerPrecision(8, 8, "lsq")
        )
        for scheme in ("lsq", "asq")
    }
    overhead = {s: cost(resnet18, p).total.overhead_bytes for s, p in policy.items()}

    # methods.md 2.2: 307,091 parameters, here with the integer network's 24 bits each
    assert overhead["asq"] - overhead["lsq"] == 3 * 307_091


def test_floating_point_by_hand(three_layers):
    report = cost(three_layers, Policy.uniform(three_layers.names, FLOAT))
    layer = report.layers[2]

    assert layer.weight_bytes == 1280 * 4
    assert layer.overhead_bytes == 0
    assert layer.bops == 1280 * 1024
    assert layer.energy_pj == pytest.approx(1280 * 4.6 + 5120 * 8 * 0.3125 + 128 * 32 * 0.3125)
    assert report.total.average_bits_weighted == 32
    assert report.extrapolated == ()


@pytest.mark.parametrize(
    ("bits", "gbops"),
    # HAWQ-V3, tables for ResNet-18 (first and last layer at 8 bit), and LIMPQ's convention
    [
        pytest.param(None, 1857.6, id="FP32"),
        pytest.param(8, 116.1, id="W8A8"),
        pytest.param(4, 34.7, id="W4A4"),
        pytest.param(3, 22.8, id="W3A3"),
        pytest.param(2, 14.4, id="W2A2"),
    ],
)
def test_bops_of_resnet18_are_the_published_ones(resnet18, bits, gbops):
    inner = FLOAT if bits is None else LayerPrecision(bits, bits, "lsq")
    ends = FLOAT if bits is None else LayerPrecision(8, 8, "lsq")

    total = cost(resnet18, Policy.uniform(resnet18.names, inner, ends=ends)).total

    assert total.macs == pytest.approx(1.814e9, rel=1e-3)
    assert total.bops / 1e9 == pytest.approx(gbops, rel=5e-3)


@pytest.mark.parametrize(("bits", "mbops"), [(4, 670), (3, 389), (2, 189)])
def test_bops_of_resnet20_are_the_published_ones(bits, mbops):
    summary = trace(resnet20(), torch.zeros(1, 3, 32, 32))
    policy = Policy.uniform(
        summary.names, LayerPrecision(bits, bits, "lsq"), ends=LayerPrecision(8, 8, "lsq")
    )

    assert cost(summary, policy).total.bops / 1e6 == pytest.approx(mbops, rel=5e-3)


#: A layer of 576 MACs an output, as the measured datapaths were built for.
BLOCK = LayerInfo("conv", "conv2d", (64, 64, 3, 3), 1, (64, 8, 8), (64, 8, 8), 2359296, 36864, 0)


@pytest.mark.parametrize(
    ("scheme", "input_bits", "weight_bits", "relative"),
    [
        pytest.param("lsq", 8, 5, 0.73, id="uniform 8x5"),
        pytest.param("lsq", 8, 4, 0.64, id="uniform 8x4"),
        pytest.param("lsq", 4, 4, 0.45, id="uniform 4x4"),
        pytest.param("lsq", 4, 8, 0.66, id="uniform 4x8"),
        pytest.param("post", 8, 4, 0.76, id="post 8x4"),
        pytest.param("post", 4, 4, 0.59, id="post 4x4"),
        pytest.param("pot", 8, 4, 0.81, id="pot 8x4"),
        pytest.param("pot", 4, 4, 0.62, id="pot 4x4"),
        pytest.param("adq+lsq", 8, 4, 1.09, id="codebook 8x4"),
        pytest.param("adq+lsq", 4, 4, 0.76, id="codebook 4x4"),
    ],
)
def test_energies_agree_with_gates(scheme, input_bits, weight_bits, relative):
    """Against single measured datapaths (hardware.md 2.6, column E), not the fits."""
    momentum = 0.9 if scheme.startswith("adq") else None
    layer = layer_cost(BLOCK, LayerPrecision(weight_bits, input_bits, scheme, momentum))
    anchor = layer_cost(BLOCK, LayerPrecision(8, 8, "lsq"))

    assert anchor.compute_pj == pytest.approx(BLOCK.macs * 0.3)
    # POT at 8x4 is the fit's worst point: 10 % below its measurement
    assert layer.compute_pj / anchor.compute_pj == pytest.approx(relative, rel=0.11)


@given(
    weight_bits=st.integers(2, 8),
    input_bits=st.integers(2, 8),
    channels=st.integers(1, 512),
    side=st.integers(1, 32),
    kernel=st.sampled_from([1, 3, 5]),
)
def test_more_bits_never_cost_less(weight_bits, input_bits, channels, side, kernel):
    weight_shape = (16, channels, kernel, kernel)
    macs = 16 * side * side * channels * kernel**2
    info = LayerInfo(
        name="conv",
        kind="conv2d",
        weight_shape=weight_shape,
        groups=1,
        input_shape=(channels, side, side),
        output_shape=(16, side, side),
        macs=macs,
        n_weights=16 * channels * kernel**2,
        n_bias=0,
    )
    here = layer_cost(info, LayerPrecision(weight_bits, input_bits, "lsq"))
    for more in ((weight_bits + 1, input_bits), (weight_bits, input_bits + 1)):
        if max(more) > 8:
            continue
        there = layer_cost(info, LayerPrecision(*more, "lsq"))
        assert there.weight_bytes >= here.weight_bytes
        assert there.memory_bytes >= here.memory_bytes
        assert there.bops > here.bops
        assert there.energy_pj > here.energy_pj


@pytest.mark.parametrize(
    ("options", "weight_bits", "overhead_bytes"),
    [
        pytest.param({}, 4, 36, id="default"),
        pytest.param({"granularity": "tensor"}, 4, 4 + 4, id="one threshold"),
        pytest.param({"levels": "eq17"}, 5, 36, id="17 levels"),
    ],
)
def test_options_of_a_quantizer_count(three_layers, options, weight_bits, overhead_bytes):
    policy = Policy.of(dict(MIXED.layers), {"post": options})

    layer = cost(three_layers, policy).layers[1]

    assert layer.weight_bits == weight_bits
    assert layer.weight_bytes == 144 * weight_bits / 8
    assert layer.overhead_bytes == overhead_bytes


def test_calls_after_the_first_read_and_write_again():
    once = layer_cost(BLOCK, LayerPrecision(4, 4, "asq"))
    twice = layer_cost(
        replace(BLOCK, macs=2 * BLOCK.macs, n_later_inputs=BLOCK.n_inputs),
        LayerPrecision(4, 4, "asq"),
    )

    for part in ("compute_pj", "requantize_pj", "input_memory_pj", "quantizer_pj"):
        assert getattr(twice, part) == pytest.approx(2 * getattr(once, part)), part
    assert twice.memory_bytes == once.memory_bytes


@pytest.mark.parametrize(
    ("weight_bits", "scheme", "fan_in", "is_extrapolated"),
    [
        pytest.param(2, "lsq", 576, False, id="uniform 2"),
        pytest.param(3, "lsq", 576, False, id="uniform 3"),
        pytest.param(2, "post", 576, False, id="post 2"),
        pytest.param(3, "post", 576, False, id="post 3"),
        pytest.param(5, "pot", 576, False, id="pot 5"),
        pytest.param(6, "pot", 576, True, id="pot 6"),
        pytest.param(4, "lsq", 9, False, id="depthwise"),
        pytest.param(4, "lsq", 8, False, id="1x1 of 8 channels"),
        pytest.param(4, "lsq", 4, False, id="smallest"),
        pytest.param(4, "lsq", 3, True, id="smallest less one"),
        pytest.param(4, "lsq", 9217, True, id="largest and one"),
    ],
)
def test_layers_outside_the_measurements_are_named(weight_bits, scheme, fan_in, is_extrapolated):
    info = LayerInfo("fc", "linear", (1, fan_in), 1, (fan_in,), (1,), fan_in, fan_in, 0)

    layer = layer_cost(info, LayerPrecision(weight_bits, 4, scheme))

    assert layer.is_extrapolated == is_extrapolated
    assert layer.energy_pj > 0


def test_the_report_is_json(three_layers):
    report = cost(three_layers, MIXED)

    content = json.loads(json.dumps(report.to_json(), allow_nan=False))

    assert set(content) == {"hardware", "layers", "total", "coverage", "extrapolated"}
    assert content["hardware"] == "post_asic_45nm"
    assert [layer["name"] for layer in content["layers"]] == ["0", "2", "4"]
    assert content["layers"][1]["memory_bytes"] == 108
    assert content["total"]["bops"] == 190_464
    assert content["coverage"] == {"counted": ["0", "2", "4"], "free": ["1", "3"], "unknown": []}
    assert content["extrapolated"] == []
    for figure in ("macs", "weight_bytes", "memory_bytes", "bops", "energy_pj", "compute_pj"):
        parts = [layer[figure] for layer in content["layers"]]
        assert sum(parts) == pytest.approx(content["total"][figure])


def test_cost_names_are_figures_of_the_total(three_layers):
    figures = total_of(cost(three_layers, MIXED))

    assert set(COST_NAMES) <= set(figures)
    assert figures["weight_bytes"] == 588


def test_a_policy_for_another_network_is_refused(three_layers):
    policy = Policy.of({"0": FLOAT, "conv": FLOAT, "4": FLOAT})

    with pytest.raises(PolicyError, match=r"without a precision: 2; .* lacks: conv"):
        cost(three_layers, policy)


def test_a_quantizer_without_figures_is_refused():
    with pytest.raises(CostError, match=r"no datapath for weights of quantizer 'asp'.*Known: adq"):
        datapaths_of("asp", load_hardware("post_asic_45nm"))
    with pytest.raises(CostError, match=r"'asp' has none.*register_input_stage.*mean 'asq'"):
        input_stage_of("asp")


def test_a_second_registration_is_refused():
    with pytest.raises(CostError, match="'uniform' is registered already"):
        register_datapath("uniform")(CodebookBins)
    assert register_datapath("uniform")(Uniform) is Uniform
    with pytest.raises(CostError, match="'n2uq' has its input stage already"):
        register_input_stage("n2uq")(input_stage_of("n2uq"))
