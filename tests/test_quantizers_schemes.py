import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adq_search.errors import PolicyError, QuantizerError
from adq_search.policy import FLOAT, LayerPrecision
from adq_search.quantizers import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    LsqWeight,
    Registry,
    Scheme,
    WeightQuantizer,
    check_options,
    check_precision,
    make_quantizers,
    resolve_scheme,
)


def no_options(quantizer: str) -> dict[str, str]:
    return {}


def test_registries_hold_the_shipped_quantizers():
    assert list(WEIGHT_QUANTIZERS) == ["adq", "lsq", "post", "pot", "root"]
    assert list(INPUT_QUANTIZERS) == ["asq", "lsq", "n2uq"]
    assert all(WEIGHT_QUANTIZERS[name].name == name for name in WEIGHT_QUANTIZERS)
    assert all(INPUT_QUANTIZERS[name].name == name for name in INPUT_QUANTIZERS)


def test_only_adq_has_a_codebook():
    assert [n for n in WEIGHT_QUANTIZERS if WEIGHT_QUANTIZERS[n].has_codebook] == ["adq"]


def test_a_name_stands_once():
    registry: Registry[WeightQuantizer] = Registry("weight quantizer")
    registry.register("mine")(LsqWeight)
    assert registry.register("mine")(LsqWeight) is LsqWeight
    with pytest.raises(
        QuantizerError, match=r"Two weight quantizers are named 'mine': .*LsqWeight"
    ):
        registry.register("mine")(WeightQuantizer)


@pytest.mark.parametrize("name", ["a+b", ""])
def test_a_name_cannot_part_a_scheme(name):
    with pytest.raises(QuantizerError, match="cannot be named"):
        Registry("weight quantizer").register(name)


def test_unknown_quantizer_gets_the_nearest_name():
    with pytest.raises(QuantizerError, match="no weight quantizer 'pist'. Did you mean 'post'"):
        WEIGHT_QUANTIZERS["pist"]


def test_third_parties_register_by_an_entry_point(tmp_path: Path):
    (tmp_path / "strange_quantizer.py").write_text(
        "from adq_search.quantizers import WEIGHT_QUANTIZERS, LsqWeight\n"
        "WEIGHT_QUANTIZERS.register('strange')(LsqWeight)\n"
    )
    info = tmp_path / "strange-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[adq_search.quantizers]\nstrange = strange_quantizer\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from adq_search.quantizers import resolve_scheme\n"
        "print(resolve_scheme('strange+lsq'))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout == "Scheme(name='strange+lsq', weight='strange', input='lsq')\n"


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("lsq", ("lsq", "lsq")),
        ("asq", ("lsq", "asq")),
        ("post", ("post", "lsq")),
        ("asq_post", ("post", "asq")),
        ("pot", ("pot", "lsq")),
        ("adq", ("adq", "n2uq")),
        ("adq+lsq", ("adq", "lsq")),
    ],
)
def test_schemes_pair_quantizers_as_the_papers_do(name, pair):
    assert resolve_scheme(name) == Scheme(name, *pair)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("float", "has no quantizers"),
        ("asq_pots", "no scheme 'asq_pots'. Did you mean 'asq_post'"),
        ("asq+lsq", "no weight quantizer 'asq'"),
        ("lsq+post", "no input quantizer 'post'"),
        ("lsq+", "no input quantizer ''"),
    ],
)
def test_other_schemes_are_refused(name, text):
    with pytest.raises(PolicyError, match=text):
        resolve_scheme(name)


def test_check_precision_accepts_what_is_right():
    check_precision("fc", FLOAT)
    check_precision("fc", LayerPrecision(4, 4, "lsq"))
    check_precision("fc", LayerPrecision(4, 4, "adq", 0.99))


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        (LayerPrecision(4, 4, "lsk"), "Layer 'fc': There is no scheme 'lsk'"),
        (LayerPrecision(4, 4, "adq"), "Layer 'fc': .* needs an ema_momentum"),
        (LayerPrecision(4, 4, "lsq", 0.9), "Layer 'fc': .* has no codebook, .* is 0.9"),
    ],
    ids=["scheme", "momentum missing", "momentum superfluous"],
)
def test_check_precision_names_the_layer(precision, text):
    with pytest.raises(PolicyError, match=text):
        check_precision("fc", precision)


@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        (nn.Conv2d(6, 4, 3, groups=2), (4, 3, 3, 3), (6, -3)),
        (nn.Conv1d(6, 4, 3), (4, 6, 3), (6, -2)),
        (nn.Linear(6, 4), (4, 6), (6, -1)),
    ],
    ids=["conv2d", "conv1d", "linear"],
)
def test_quantizers_know_their_layer(layer, shape, channels):
    weight, inputs = make_quantizers(LayerPrecision(3, 5, "asq_post"), layer, no_options)
    assert (weight.name, weight.bits, weight.weight_shape) == ("post", 3, shape)
    assert (inputs.name, inputs.bits) == ("asq", 5)
    assert (inputs.n_channels, inputs.channel_dim) == channels


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
    ids=["float64", "bfloat16"],
)
def test_quantizers_take_the_layers_dtype_but_float32_at_least(dtype, expected):
    pair = make_quantizers(LayerPrecision(3, 3, "asq"), nn.Linear(3, 2).to(dtype), no_options)
    assert {p.dtype for quantizer in pair for p in quantizer.parameters()} == {expected}


def test_layers_of_another_kind_are_refused():
    with pytest.raises(PolicyError, match="A ReLU cannot be quantized"):
        make_quantizers(LayerPrecision(3, 3, "lsq"), nn.ReLU(), no_options)


def test_options_reach_the_quantizer_that_knows_them():
    options = {"lsq": {"granularity": "tensor"}}
    weight, inputs = make_quantizers(
        LayerPrecision(4, 4, "lsq"), nn.Linear(3, 2), lambda name: options.get(name, {})
    )
    assert weight.options == {"granularity": "tensor"}
    assert inputs.options == {}


@pytest.mark.parametrize(
    ("quantizer", "options", "text"),
    [
        ("lsk", {}, "quantizer 'lsk', which does not exist. Did you mean 'lsq'"),
        ("post", {"level": "eq17"}, "no option 'level'. Did you mean 'levels'"),
        ("post", {"levels": "eq71"}, "cannot be 'eq71'. Did you mean 'eq17'"),
        ("lsq", {"levels": "eq17"}, "no option 'levels'"),
        ("asq", {"levels": "eq17"}, "no option 'levels'. Known: none"),
    ],
    ids=["quantizer", "option", "value", "other quantizer's", "none known"],
)
def test_options_nobody_knows_are_refused(quantizer, options, text):
    with pytest.raises(QuantizerError, match=text):
        check_options(quantizer, options)


def test_options_are_checked_for_both_namesakes():
    check_options("lsq", {"granularity": "channel"})
    check_options("n2uq", {})
