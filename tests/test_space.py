from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from adq_search import search_spaces
from adq_search.errors import SpaceError
from adq_search.job import load_job
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.space import Parameter, SearchSpace, parse_space
from adq_search.tasks import task_names
from adq_search.tasks.networks import resnet20, small_resnet
from adq_search.tracing import ModelSummary, trace


def _network() -> nn.Sequential:
    block = nn.Sequential()
    for i in range(3):
        block.add_module(f"conv{i}", nn.Conv2d(4, 4, 3, padding=1))
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(1, 4, 3))
    net.add_module("block", block)
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(4, 3))
    return net


SUMMARY: ModelSummary = trace(_network(), torch.zeros(1, 1, 8, 8))
INNER = ("block.conv0", "block.conv1", "block.conv2")
DEFAULT = {"weight_bits": [2, 3, 4, 8], "input_bits": [2, 4], "schemes": ["lsq", "adq"]}


def _space(**content: Any) -> SearchSpace:
    return SearchSpace.from_spec({"default": DEFAULT, **content}, SUMMARY)


def _choices(space: SearchSpace, layer: str) -> set[LayerPrecision]:
    return {p for g in space.groups if layer in g.layers for p in g.choices}


def test_default_pins_first_and_last_at_8_bits() -> None:
    space = _space()
    pinned = {g.name: g.pinned for g in space.groups if g.pinned}
    assert pinned == {
        "stem": LayerPrecision(8, 8, "lsq"),
        "head": LayerPrecision(8, 8, "lsq"),
    }
    assert [g.name for g in space.groups] == list(SUMMARY.names)


def test_nothing_is_pinned_when_the_file_says_so() -> None:
    assert all(g.pinned is None for g in _space(pinned={}).groups)


@pytest.mark.parametrize(
    ("pinned", "layer", "expected"),
    [
        pytest.param({"block.conv1": "float"}, "block.conv1", FLOAT, id="float"),
        pytest.param({"block.*": 4}, "block.conv2", LayerPrecision(4, 4, "lsq"), id="pattern"),
        pytest.param(
            {"block.*": 4, "block.conv2": 8},
            "block.conv2",
            LayerPrecision(8, 8, "lsq"),
            id="exact name before pattern",
        ),
        pytest.param(
            {"*1": 3, "block.*": 4, "block.conv2": 8},
            "block.conv1",
            LayerPrecision(3, 3, "lsq"),
            id="patterns in file order",
        ),
        pytest.param({"s*": 4, "first": 8}, "stem", LayerPrecision(8, 8, "lsq"), id="end first"),
        pytest.param(
            {
                "block.conv0": {
                    "weight_bits": 3,
                    "input_bits": 5,
                    "scheme": "adq",
                    "ema_momentum": 0,
                }
            },
            "block.conv0",
            LayerPrecision(3, 5, "adq", 0.0),
            id="written out",
        ),
    ],
)
def test_pins(pinned: dict[str, Any], layer: str, expected: LayerPrecision) -> None:
    assert _choices(_space(pinned=pinned), layer) == {expected}


def test_rules_override_key_by_key_in_written_precedence() -> None:
    space = _space(
        layers={
            "block.*": {"weight_bits": [4], "input_bits": [8]},
            "*1": {"weight_bits": [3], "schemes": ["post"]},
            "block.conv0": {"weight_bits": [2]},
        }
    )
    by_name = {g.name: g for g in space.groups}
    rules = {
        name: (by_name[name].weight_bits, by_name[name].input_bits, by_name[name].schemes)
        for name in INNER
    }
    assert rules == {
        "block.conv0": ((2,), (8,), ("lsq", "adq")),  # exact, then block.*
        "block.conv1": ((4,), (8,), ("post",)),  # block.* stands before *1
        "block.conv2": ((4,), (8,), ("lsq", "adq")),
    }


def test_two_quantizer_dimensions() -> None:
    rule = {
        "weight_bits": [2, 4],
        "input_bits": [4],
        "weight_quantizers": ["lsq", "post", "adq"],
        "input_quantizers": ["lsq", "asq"],
    }
    space = SearchSpace.from_spec({"default": rule, "share": {"all": ["block.*"]}}, SUMMARY)
    assert [p.name for p in space.parameters] == [
        "all.weight_bits",
        "all.weight_quantizer",
        "all.input_quantizer",
    ]
    schemes = {p.scheme for p in _choices(space, "block.conv0")}
    assert schemes == {"lsq", "asq", "post", "asq_post", "adq+lsq", "adq+asq"}
    assert space.n_policies == 12


def test_a_rule_may_give_one_of_the_two_quantizer_lists() -> None:
    space = SearchSpace.from_spec(
        {
            "default": {
                "weight_bits": [2, 4],
                "input_bits": [4],
                "weight_quantizers": ["lsq", "post"],
                "input_quantizers": ["lsq"],
            },
            "layers": {"block.conv1": {"weight_quantizers": ["pot"]}},
        },
        SUMMARY,
    )
    assert {p.scheme for p in _choices(space, "block.conv1")} == {"pot"}


@pytest.mark.parametrize(
    ("values", "raw", "suffix"),
    [
        pytest.param([2, 3, 4], (2, 3, 4), "weight_bits", id="even steps: the value"),
        pytest.param([8, 4], (4, 8), "weight_bits", id="two values: the value"),
        pytest.param([2, 3, 4, 8], (0, 1, 2, 3), "weight_bits_index", id="uneven: the index"),
    ],
)
def test_ordinal_parameters(values: list[int], raw: tuple[int, ...], suffix: str) -> None:
    space = _space(
        default={"weight_bits": values, "input_bits": [4], "schemes": ["lsq"]},
        share={"all": ["*"]},
    )
    (parameter,) = space.parameters
    assert parameter.name == f"all.{suffix}"
    assert tuple(range(parameter.low, parameter.high + 1, parameter.step)) == raw
    assert [parameter.decode(r) for r in raw] == sorted(values)
    assert [parameter.encode(v) for v in sorted(values)] == list(raw)


def test_momentum_is_a_parameter_only_beside_a_codebook() -> None:
    momenta = {"ema_momenta": [0.999, 0.9, 0.99]}
    space = _space(default={**DEFAULT, **momenta}, layers={"block.conv0": {"schemes": ["lsq"]}})
    names = {p.name for p in space.parameters}
    assert "block.conv1.ema_momentum_index" in names
    assert not any(n.startswith("block.conv0.ema") for n in names)
    assert {p.ema_momentum for p in _choices(space, "block.conv1")} == {None, 0.9, 0.99, 0.999}


def test_inactive_momentum_changes_no_policy_and_counts_once() -> None:
    space = _space(
        default={**DEFAULT, "ema_momenta": [0.9, 0.99]},
        share={"all": ["*"]},
    )
    points = [
        dict(zip((p.name for p in space.parameters), raw, strict=True))
        for raw in itertools.product(*(map(p.encode, p.values) for p in space.parameters))
    ]
    policies = {space.policy_of(point) for point in points}
    assert len(points) == 4 * 2 * 2 * 2
    assert space.n_policies == len(policies) == 4 * 2 * (1 + 2)


def test_momentum_defaults_where_a_codebook_needs_one() -> None:
    assert {p.ema_momentum for p in _choices(_space(), "block.conv0")} == {None, 0.99}


def test_host_names_carry_no_slash() -> None:
    assert not any("/" in p.name for p in _space().parameters)


_BITS = st.lists(st.integers(2, 8), min_size=1, max_size=7, unique=True)
_MOMENTA = st.lists(st.sampled_from([0.0, 0.5, 0.9, 0.99]), min_size=1, max_size=4, unique=True)
_SCHEMES = st.lists(
    st.sampled_from(["lsq", "asq", "post", "asq_post", "pot", "adq", "adq+lsq"]),
    min_size=1,
    unique=True,
)


@st.composite
def _specs(draw: st.DrawFn) -> dict[str, Any]:
    rule: dict[str, Any] = {"weight_bits": [2, 8], "input_bits": draw(_BITS)}
    if draw(st.booleans()):
        rule["schemes"] = [*draw(_SCHEMES)]
    else:
        quantizers = st.lists(st.sampled_from(["lsq", "post", "adq"]), min_size=1, unique=True)
        rule["weight_quantizers"] = draw(quantizers)
        rule["input_quantizers"] = draw(
            st.lists(st.sampled_from(["lsq", "asq", "n2uq"]), min_size=1, unique=True)
        )
    if any("adq" in q for q in rule.get("schemes", rule.get("weight_quantizers"))):
        rule["ema_momenta"] = draw(_MOMENTA)
    spec = {"default": rule, "pinned": draw(st.sampled_from([{}, {"first": 8, "last": "float"}]))}
    if draw(st.booleans()):
        spec["share"] = {"tail": ["block.conv[12]"]}
    if draw(st.booleans()):
        spec["layers"] = {"block.*": {"weight_bits": draw(_BITS)}}
        if not spec["pinned"]:
            return spec
        spec["layers"]["block.conv0"] = {"weight_bits": [2, 4]}
    return spec


@settings(max_examples=150, deadline=None)
@given(spec=_specs(), data=st.data())
def test_policy_to_parameters_to_policy_is_the_identity(
    spec: dict[str, Any], data: st.DataObject
) -> None:
    space = SearchSpace.from_spec(spec, SUMMARY)
    chosen = {
        group.name: data.draw(st.sampled_from(group.choices))
        for group in space.groups
        if group.pinned is None
    }
    policy = space.policy_from(chosen)
    params = space.params_of(policy)
    assert set(params) == {p.name for p in space.parameters}
    assert space.policy_of(params) == policy
    for parameter in space.parameters:
        if parameter.kind == "ordinal":
            assert params[parameter.name] in range(
                parameter.low, parameter.high + 1, parameter.step
            )
    assert policy.names == SUMMARY.names


def test_uniform_policies_are_those_every_group_can_take() -> None:
    space = _space(
        default={"weight_bits": [2, 3, 4], "input_bits": [2, 3, 4], "schemes": ["adq", "lsq"]},
        layers={"block.conv1": {"weight_bits": [3, 4]}},
    )
    found = space.uniform_policies()
    assert list(found) == ["uniform W3A3", "uniform W4A4"]
    assert found["uniform W4A4"] == Policy.of(
        {
            "stem": LayerPrecision(8, 8, "lsq"),
            **dict.fromkeys(INNER, LayerPrecision(4, 4, "adq", 0.99)),
            "head": LayerPrecision(8, 8, "lsq"),
        }
    )
    assert all(space.policy_of(space.params_of(p)) == p for p in found.values())


def test_shared_layers_move_together_and_pinned_ones_stay_out() -> None:
    space = _space(share={"all": ["*"]})
    (group,) = (g for g in space.groups if g.pinned is None)
    assert group.name == "all"
    assert group.layers == INNER
    policy = space.policy_from({"all": LayerPrecision(2, 4, "lsq")})
    assert {policy[name] for name in INNER} == {LayerPrecision(2, 4, "lsq")}


def test_options_reach_the_policy() -> None:
    space = _space(default={**DEFAULT, "schemes": ["post"]}, options={"post": {"levels": "eq17"}})
    policy = space.policy_from({name: LayerPrecision(4, 4, "post") for name in INNER})
    assert policy.options_of("post") == {"levels": "eq17"}
    assert space.options_of("post") == {"levels": "eq17"}
    with pytest.raises(SpaceError, match="options are"):
        space.params_of(Policy.of(dict(policy)))


def test_fingerprint_tells_spaces_apart() -> None:
    assert _space().fingerprint == _space().fingerprint
    assert len(_space().fingerprint) == 16
    others = [
        _space(pinned={}),
        _space(layers={"block.conv0": {"weight_bits": [2]}}),
        _space(share={"all": ["*"]}),
    ]
    assert len({s.fingerprint for s in (_space(), *others)}) == 4


def test_a_spec_survives_its_own_dump() -> None:
    spec = parse_space({"default": DEFAULT, "pinned": {"first": 8, "block.conv1": "float"}})
    assert parse_space(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param({"defualt": {}}, "Did you mean 'default'", id="unknown key"),
        pytest.param(
            {"default": {"weight_bit": [2]}}, "Did you mean 'weight_bits'", id="unknown rule key"
        ),
        pytest.param(
            {"default": {"weight_bits": [9]}}, "less than or equal to 8", id="too many bits"
        ),
        pytest.param({"default": {"weight_bits": [1]}}, "greater than or equal to 2", id="1 bit"),
        pytest.param({"default": {"weight_bits": []}}, "at least 1 item", id="empty list"),
        pytest.param({"default": {"weight_bits": [2, 2]}}, "2 is repeated", id="repeated"),
        pytest.param({"default": {"weight_bits": ["4"]}}, "valid integer", id="quoted number"),
        pytest.param({"default": {"ema_momenta": [1.0]}}, "less than 1", id="momentum 1"),
        pytest.param(
            {"default": {"schemes": ["lsq"], "weight_quantizers": ["lsq"]}},
            "not both",
            id="schemes and quantizers",
        ),
        pytest.param({"pinned": {"first": "flaot"}}, "number of bits, 'float'", id="pin text"),
        pytest.param({"pinned": {"first": 9}}, "less than or equal to 8", id="pin bits"),
        pytest.param({"pinned": {"first": {"weight_bits": 8}}}, "needs", id="half a pin"),
        pytest.param([], "mapping|dictionary", id="no mapping"),
    ],
)
def test_a_malformed_file_is_refused(content: Any, match: str) -> None:
    with pytest.raises(SpaceError, match=match):
        parse_space(content)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(
            {"layers": {"blok.conv0": {"weight_bits": [2]}}},
            r"layers\.blok\.conv0` touches no layer.*block\.conv0",
            id="rule without a layer",
        ),
        pytest.param(
            {"layers": {"block": {"weight_bits": [2]}}}, r"Nearest: `block\.\*`", id="a folder"
        ),
        pytest.param(
            {"layers": {"stem": {"weight_bits": [2]}}}, "stem is pinned", id="rule on a pin"
        ),
        pytest.param({"pinned": {"steam": 8}}, r"pinned\.steam` touches no", id="pin"),
        pytest.param({"share": {"a": ["x.*"]}}, r"share\.a` touches no", id="share"),
        pytest.param({"share": {"a": ["stem"]}}, "stem is pinned", id="share a pin"),
        pytest.param(
            {"share": {"a": ["block.*"], "b": ["*conv1"]}},
            r"block\.conv1 is in `share\.a` and `share\.b`",
            id="two groups",
        ),
        pytest.param({"share": {"a/b": ["block.*"]}}, "without slashes", id="slash"),
        pytest.param(
            {"share": {"block.conv0": ["*conv1", "*conv2"]}}, "name of another", id="group name"
        ),
        pytest.param(
            {"share": {"a": ["block.*"]}, "layers": {"*conv1": {"weight_bits": [2]}}},
            "follow one rule",
            id="different rules in a group",
        ),
        pytest.param(
            {"default": {**DEFAULT, "schemes": ["lsk"]}}, "Did you mean 'lsq'", id="unknown scheme"
        ),
        pytest.param(
            {"default": {**DEFAULT, "schemes": ["float"]}}, "cannot be searched", id="float"
        ),
        pytest.param(
            {"default": {**DEFAULT, "schemes": ["lsq", "lsq+lsq"]}}, "same pair", id="same pair"
        ),
        pytest.param(
            {
                "default": {
                    "weight_bits": [2],
                    "input_bits": [2],
                    "weight_quantizers": ["lsk"],
                    "input_quantizers": ["lsq"],
                }
            },
            "quantizer that does not exist.*'lsq'",
            id="unknown quantizer",
        ),
        pytest.param(
            {"default": DEFAULT, "layers": {"block.*": {"weight_quantizers": ["post"]}}},
            "needs `input_quantizers`",
            id="half of the quantizers",
        ),
        pytest.param({"default": {}}, "needs `weight_bits`", id="no bits"),
        pytest.param(
            {"default": {"weight_bits": [2], "input_bits": [4]}}, "needs `schemes`", id="no schemes"
        ),
        pytest.param(
            {"default": {**DEFAULT, "schemes": ["lsq"], "ema_momenta": [0.9]}},
            r"default\.ema_momenta` touches no layer",
            id="momenta without a codebook",
        ),
        pytest.param(
            {"layers": {"*0": {"schemes": ["lsq"], "ema_momenta": [0.9]}}},
            r"layers\.\*0\.ema_momenta` touches no layer",
            id="momenta of a rule without a codebook",
        ),
        pytest.param(
            {"pinned": {"first": {"weight_bits": 4, "input_bits": 4, "scheme": "adq"}}},
            "ema_momentum",
            id="pin without its momentum",
        ),
        pytest.param({"options": {"post": {"levels": "eq17"}}}, "touches no layer", id="options"),
        pytest.param(
            {"options": {"adq": {"quantile_rul": "half"}}}, "quantile_rule", id="unknown option"
        ),
        pytest.param({"pinned": {"*": 8}}, "nothing is left to search", id="all pinned"),
        pytest.param(
            {"default": {"weight_bits": [4], "input_bits": [4], "schemes": ["lsq"]}},
            "nothing is left to search",
            id="one choice",
        ),
    ],
)
def test_a_space_that_does_not_fit_is_refused(content: dict[str, Any], match: str) -> None:
    with pytest.raises(SpaceError, match=match):
        _space(**content)


def test_parameters_of_another_space_are_refused() -> None:
    space = _space(share={"all": ["*"]})
    params = {"all.weight_bits_index": 0, "all.input_bits": 4, "all.scheme": "lsq"}
    assert space.policy_of(params)["block.conv0"] == LayerPrecision(2, 4, "lsq")
    with pytest.raises(SpaceError, match="takes one of 0, 1, 2, 3, but was given 4"):
        space.policy_of({**params, "all.weight_bits_index": 4})
    with pytest.raises(SpaceError, match=r"missing: all\.scheme; unknown: all\.shceme"):
        space.policy_of({"all.weight_bits_index": 0, "all.input_bits": 4, "all.shceme": "lsq"})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param(
            {"block.conv1": LayerPrecision(5, 4, "lsq")},
            r"block\.conv1 has weight_bits 5",
            id="bits",
        ),
        pytest.param(
            {"block.conv1": LayerPrecision(4, 3, "lsq")},
            r"block\.conv1 has input_bits 3",
            id="input bits",
        ),
        pytest.param({"block.conv1": LayerPrecision(4, 4, "pot")}, "scheme pot", id="scheme"),
        pytest.param({"block.conv1": FLOAT}, "block.conv1 has", id="float"),
        pytest.param(
            {"block.conv1": LayerPrecision(4, 4, "adq", 0.5)}, "ema_momentum 0.5", id="momentum"
        ),
        pytest.param({"stem": LayerPrecision(4, 4, "lsq")}, "stem is pinned at W8A8", id="pin"),
    ],
)
def test_a_policy_outside_the_space_is_named(
    changes: dict[str, LayerPrecision], match: str
) -> None:
    space = _space()
    policy = space.uniform_policies()["uniform W4A4"]
    with pytest.raises(SpaceError, match=match):
        space.params_of(Policy.of({**dict(policy), **changes}))


def test_a_policy_of_another_network_or_group_is_refused() -> None:
    space = _space(share={"pair": ["*conv0", "*conv1"]})
    policy = dict(space.uniform_policies()["uniform W4A4"])
    with pytest.raises(SpaceError, match="network lacks: other"):
        space.params_of(Policy.of({**policy, "other": FLOAT}))
    policy["block.conv1"] = LayerPrecision(2, 4, "lsq")
    with pytest.raises(SpaceError, match=r"block\.conv1 shares its decision with block\.conv0"):
        space.params_of(Policy.of(policy))


def test_a_categorical_parameter_takes_only_its_choices() -> None:
    parameter = Parameter("conv.scheme", "categorical", ("lsq", "adq"))
    assert parameter.decode("adq") == "adq"
    with pytest.raises(SpaceError, match="one of lsq, adq"):
        parameter.decode("pot")


_SHIPPED = {
    "digits": (small_resnet, (1, 8, 8), 10),
    "mnist5k": (small_resnet, (1, 28, 28), 10),
    "cifar10_resnet20": (resnet20, (3, 32, 32), 20),
    "imagenet_resnet18": (models.resnet18, (3, 224, 224), 21),
    "imagenet_resnet34": (models.resnet34, (3, 224, 224), 37),
    "imagenet_mobilenet_v2": (models.mobilenet_v2, (3, 224, 224), 53),
}


def test_the_shipped_spaces_are_all_there() -> None:
    assert search_spaces.names() == sorted(_SHIPPED)
    assert search_spaces.path("digits").is_file()
    with pytest.raises(SpaceError, match="Did you mean 'digits'"):
        search_spaces.path("digit")


@pytest.mark.parametrize("name", _SHIPPED)
def test_a_shipped_space_fits_its_network(name: str) -> None:
    job = load_job(search_spaces.load_text(name), what=name)
    make, shape, n_layers = _SHIPPED[name]
    summary = trace(make(), torch.zeros(1, *shape))
    space = SearchSpace.from_spec(job.space, summary)
    assert len(space.groups) == n_layers
    assert [g.name for g in space.groups if g.pinned] == [summary.names[0], summary.names[-1]]
    assert {"uniform W2A2", "uniform W8A8"} <= set(space.uniform_policies())
    assert job.task in task_names()
