"""Weight bits of single schemes: which policies exist, what a draw becomes, what is warned of."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_search import search_spaces
from adq_search.cli import main
from adq_search.errors import AdqSearchWarning, SpaceError
from adq_search.job import Job, load_job
from adq_search.plan import plan
from adq_search.plugins.optuna_objective import PolicyObjective, directions, result_of
from adq_search.policy import LayerPrecision
from adq_search.session import prepare
from adq_search.space import SearchSpace
from tests.test_space import DEFAULT, INNER, SUMMARY, _choices, _space


def _limited(limits: dict[str, list[int]], **content: Any) -> SearchSpace:
    rule = {"weight_bits": [2, 3, 4, 8], "input_bits": [2, 4], "schemes": ["lsq", "post", "adq"]}
    return _space(default={**rule, "scheme_weight_bits": limits}, **content)


def test_a_scheme_takes_only_the_weight_bits_granted_to_it() -> None:
    space = _limited({"post": [3, 4], "adq+n2uq": [8]}, share={"all": ["*"]})
    taken = {
        scheme: {p.weight_bits for p in _choices(space, "block.conv0") if p.scheme == scheme}
        for scheme in ("lsq", "post", "adq")
    }
    assert taken == {"lsq": {2, 3, 4, 8}, "post": {3, 4}, "adq": {8}}
    assert space.n_policies == 2 * (4 + 2 + 1)


def test_every_draw_of_a_host_becomes_the_nearest_policy_of_the_space() -> None:
    space = _limited({"post": [3, 8], "adq": [4]}, share={"all": ["*"]})
    assert [p.name for p in space.parameters] == [
        "all.weight_bits_index",
        "all.input_bits",
        "all.scheme",
    ]
    bits = {"lsq": [2, 3, 4, 8], "post": [3, 3, 3, 8], "adq": [4, 4, 4, 4]}
    for scheme, expected in bits.items():
        drawn = [
            space.policy_of({"all.weight_bits_index": i, "all.input_bits": 4, "all.scheme": scheme})
            for i in range(4)
        ]
        assert [policy["block.conv0"].weight_bits for policy in drawn] == expected


_BITS = st.lists(st.integers(2, 8), min_size=1, max_size=5, unique=True)


@settings(max_examples=150, deadline=None)
@given(
    bits=_BITS.filter(lambda bits: len(bits) > 1),
    limits=st.dictionaries(st.sampled_from(["lsq", "post", "adq+lsq"]), _BITS, max_size=3),
    data=st.data(),
)
def test_policies_and_parameters_stay_each_others_inverse(
    bits: list[int], limits: dict[str, list[int]], data: st.DataObject
) -> None:
    limits = {s: [*dict.fromkeys([bits[0], *allowed])] for s, allowed in limits.items()}
    rule = {
        "weight_bits": bits,
        "input_bits": [4, 8],
        "schemes": ["lsq", "post", "adq+lsq"],
        "ema_momenta": [0.9, 0.99],
        "scheme_weight_bits": limits,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdqSearchWarning)
        space = _space(default=rule, share={"tail": ["block.conv[12]"]})
    chosen = {
        g.name: data.draw(st.sampled_from(g.choices)) for g in space.groups if g.pinned is None
    }
    policy = space.policy_from(chosen)
    assert space.policy_of(space.params_of(policy)) == policy
    for precision in chosen.values():
        assert precision.weight_bits in limits.get(precision.scheme, bits)
    # Any draw, allowed or not, is a policy of the space, and its bits the nearest there are.
    drawn = {p.name: p.encode(data.draw(st.sampled_from(p.values))) for p in space.parameters}
    found = space.policy_of(drawn)
    assert space.policy_of(space.params_of(found)) == found
    for group in (g for g in space.groups if g.pinned is None):
        precision = found[group.layers[0]]
        asked = next(
            (
                p.decode(drawn[p.name])
                for p in space.parameters
                if p.name.startswith(f"{group.name}.weight_bits")
            ),
            group.weight_bits[0],
        )
        allowed = [b for b in limits.get(precision.scheme, bits) if b in bits]
        assert abs(precision.weight_bits - asked) == min(abs(b - asked) for b in allowed)


def test_of_two_bits_equally_near_the_lower_is_taken() -> None:
    group = next(g for g in _limited({"post": [2, 4]}).groups if g.pinned is None)
    assert group.nearest_weight_bits(3, "post") == 2
    assert group.nearest_weight_bits(3, "lsq") == 3


def test_weight_bits_that_no_scheme_may_take_are_no_dimension() -> None:
    space = _space(
        default={**DEFAULT, "schemes": ["post"], "scheme_weight_bits": {"post": [3, 4]}},
        share={"all": ["*"]},
    )
    (group,) = (g for g in space.groups if g.pinned is None)
    assert group.weight_bits == (3, 4)
    plain = _space(
        default={"weight_bits": [3, 4], "input_bits": [2, 4], "schemes": ["post"]},
        share={"all": ["*"]},
    )
    assert space.fingerprint == plain.fingerprint


def test_a_rule_for_some_layers_limits_them_alone() -> None:
    space = _limited({"post": [3, 4]}, layers={"*1": {"scheme_weight_bits": {"adq": [2]}}})
    by_layer = {name: {(p.scheme, p.weight_bits) for p in _choices(space, name)} for name in INNER}
    assert ("post", 8) not in by_layer["block.conv0"]
    assert ("adq", 8) in by_layer["block.conv0"]
    assert ("post", 8) in by_layer["block.conv1"]
    assert ("adq", 8) not in by_layer["block.conv1"]


def test_baselines_are_those_that_the_first_scheme_may_take() -> None:
    space = _space(
        default={
            "weight_bits": [2, 3, 4, 8],
            "input_bits": [2, 3, 4, 8],
            "schemes": ["post", "lsq"],
            "scheme_weight_bits": {"post": [3, 4]},
        }
    )
    found = space.uniform_policies()
    assert list(found) == ["uniform W3A3", "uniform W4A4"]
    assert all(space.policy_of(space.params_of(p)) == p for p in found.values())


def test_the_fingerprint_knows_limits_and_forgets_absent_ones() -> None:
    limited = _limited({"post": [3, 4]})
    idle = _limited({"post": [2, 3, 4, 8]})
    plain = _space(default={**DEFAULT, "schemes": ["lsq", "post", "adq"]})
    assert idle.fingerprint == plain.fingerprint != limited.fingerprint
    # As it was before limits existed: studies begun then can be resumed.
    assert _space().fingerprint == "b8c02ad50f6a1f45"


@pytest.mark.parametrize(
    ("precision", "match"),
    [
        pytest.param(
            LayerPrecision(8, 4, "post"),
            "block.conv1 has weight_bits 8, .* 3, 4 with scheme post",
            id="bits",
        ),
        pytest.param(
            LayerPrecision(4, 4, "lsq", 0.99),
            "has an ema_momentum, but scheme lsq has no codebook",
            id="momentum",
        ),
    ],
)
def test_a_policy_outside_a_limit_is_refused(precision: LayerPrecision, match: str) -> None:
    space = _limited({"post": [3, 4]})
    policy = space.policy_from(
        {
            name: precision if name == "block.conv1" else LayerPrecision(4, 4, "lsq")
            for name in INNER
        }
    )
    with pytest.raises(SpaceError, match=match):
        space.params_of(policy)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        pytest.param({"post": [5, 6]}, r"leaves scheme 'post' \[5, 6\]", id="nothing left"),
        pytest.param(
            {"pot": [3]}, "limits 'pot', but none of its layers", id="scheme not searched"
        ),
        pytest.param({"pots": [3]}, "cannot be searched", id="unknown scheme"),
        pytest.param({"post": [3, 3]}, "3 is repeated", id="repeated"),
        pytest.param({"post": []}, "at least 1 item", id="empty"),
        pytest.param({"post": [9]}, "less than or equal to 8", id="out of range"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, list[int]], match: str) -> None:
    with pytest.raises(SpaceError, match=match):
        _limited(limits)


# Schemes that a search should not spend trials on.


def test_post_beyond_four_bits_is_warned_of_with_its_floor_and_the_remedy() -> None:
    with pytest.warns(AdqSearchWarning, match=r"'post' may take 8 .* 20\.1 dB.*post: \[2, 3, 4\]"):
        _space(default={**DEFAULT, "schemes": ["lsq", "post"]})


def test_the_warning_follows_the_root_of_the_family() -> None:
    rule = {"weight_bits": [5, 6], "input_bits": [4], "schemes": ["root+lsq"]}
    with pytest.warns(AdqSearchWarning, match=r"'root\+lsq' may take 6 .* 23\.6 dB"):
        _space(default=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _space(default=rule, options={"root": {"root": 4}})


def test_where_no_bits_are_left_the_scheme_is_what_to_take_out() -> None:
    rule = {"weight_bits": [5, 6], "input_bits": [4], "schemes": ["lsq", "post"]}
    with pytest.warns(AdqSearchWarning, match="To save trials, take it out of `schemes`"):
        _space(default=rule)


@pytest.mark.parametrize("name", search_spaces.names())
def test_shipped_spaces_offer_post_at_three_and_four_bits_only(name: str) -> None:
    space = load_job(search_spaces.load_text(name), what=name).space
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = SearchSpace.from_spec(space, SUMMARY)
    for group in found.groups:
        for precision in group.choices:
            if precision.scheme in {"post", "asq_post", "pot"}:
                assert precision.weight_bits in {3, 4}


# A host and the command line.


def test_a_host_that_draws_what_is_not_allowed_measures_the_nearest(tmp_path: Path) -> None:
    rule = {
        "weight_bits": [2, 3, 4, 8],
        "input_bits": [4],
        "schemes": ["lsq", "post"],
        "scheme_weight_bits": {"post": [3, 4]},
    }
    job = Job.model_validate(
        {
            "task": "tests.tiny:make",
            "space": {"default": rule, "share": {"all": ["*"]}},
            "training": {"epochs": 1, "batch_size": 10},
            "search": {"prior": None},
        }
    )
    session = prepare(plan(job), tmp_path)
    study = optuna.create_study(directions=directions(session.plan))
    for index in (3, 2):  # 8 bits, then the 4 bits that they become
        study.enqueue_trial({"all.weight_bits_index": index, "all.scheme": "post"})
    study.optimize(PolicyObjective(session), n_trials=2)
    first, second = study.trials
    assert first.params == {"all.weight_bits_index": 3, "all.scheme": "post"}
    result = result_of(first)
    assert result is not None
    assert {p.weight_bits for _, p in list(result.policy)[1:-1]} == {4}
    assert second.user_attrs["repeat_of"] == 0
    assert second.values == first.values


def test_the_command_line_says_a_warning_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    rule = "{weight_bits: [4, 8], input_bits: [4], schemes: [post]}"
    file.write_text(
        f"task: tests.tiny:make\nspace: {{default: {rule}}}\n"
        "search: {budgets: {weight_bytes: 1}}"
    )
    words = ["adq-search", "run", str(file), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdqSearchWarning)
        with pytest.raises(SystemExit):
            main()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("warning: Scheme 'post' may take 8 weight bits")
    assert said[0].endswith(
        "limit it by `scheme_weight_bits: {post: [4]}`, or take it out of `schemes`."
    )
    assert said[1].startswith("error: No policy of the space meets the budget")
