import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_search.errors import PolicyError
from adq_search.policy import FLOAT, LayerPrecision, Policy, load_policy, parse_uniform, save_policy

SCHEMES = ["lsq", "asq", "post", "asq_post", "pot", "adq", "adq+lsq"]
bits = st.integers(2, 8)
precisions = st.one_of(
    st.just(FLOAT),
    st.builds(
        LayerPrecision, bits, bits, st.sampled_from(SCHEMES), st.none() | st.floats(0.0, 0.999)
    ),
)
names = st.text(alphabet="abc.01", min_size=1, max_size=8)
options = st.dictionaries(
    st.sampled_from(["post", "lsq"]),
    st.dictionaries(st.sampled_from(["levels", "granularity"]), st.sampled_from(["a", "b"])),
)
policies = st.builds(Policy.of, st.dictionaries(names, precisions, min_size=1, max_size=6), options)


@given(policies)
def test_json_round_trip_keeps_value_and_hash(policy):
    back = Policy.from_json(json.loads(json.dumps(policy.to_json())))
    assert back == policy
    assert back.hash == policy.hash
    assert hash(back) == hash(policy)


@given(policies, policies)
def test_hashes_agree_exactly_when_policies_do(a, b):
    same = dict(a.layers) == dict(b.layers) and a.options == b.options
    assert (a.hash == b.hash) == same


def test_extra_content_of_the_file_does_not_change_the_policy(tmp_path):
    policy = Policy.of({"fc": LayerPrecision(4, 4, "lsq")})
    save_policy(policy, tmp_path / "p.json", metrics={"accuracy": 0.9}, provenance={"seed": 1})
    assert load_policy(tmp_path / "p.json") == policy
    assert json.loads((tmp_path / "p.json").read_text())["metrics"] == {"accuracy": 0.9}


@pytest.mark.parametrize("wrong", [1, 9, True, 4.0, "4"], ids=repr)
def test_bits_outside_two_to_eight_are_refused(wrong):
    with pytest.raises(PolicyError, match="weight_bits must"):
        LayerPrecision(wrong, 4, "lsq")


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_outside_its_range_is_refused(momentum):
    with pytest.raises(PolicyError, match=r"\[0, 1\)"):
        LayerPrecision(4, 4, "adq", momentum)


def test_float_layer_takes_no_bits():
    with pytest.raises(PolicyError, match="'float' takes no bits"):
        LayerPrecision(4, None, "float")


def test_empty_and_doubled_policies_are_refused():
    with pytest.raises(PolicyError, match="at least one layer"):
        Policy.of({})
    with pytest.raises(PolicyError, match="fc stand twice"):
        Policy((("fc", FLOAT), ("fc", FLOAT)))


def test_difference_names_both_sides():
    policy = Policy.of({"a": FLOAT, "old": FLOAT})
    text = policy.difference(["a", "new"])
    assert "without a precision: new" in text
    assert "the network lacks: old" in text
    assert policy.difference(["old", "a"]) == ""


DAMAGE = {
    "unknown key": (lambda c: c | {"colour": 1}, "colour"),
    "wrong schema": (lambda c: c | {"schema": "adq_search.policy/9"}, "schema"),
    "bits of nine": (
        lambda c: c | {"layers": {"fc": c["layers"]["fc"] | {"weight_bits": 9}}},
        "9|8",
    ),
    "no layers": (lambda c: c | {"layers": {}}, "layers"),
    "edited by hand": (
        lambda c: c | {"layers": {"fc": c["layers"]["fc"] | {"weight_bits": 5}}},
        "edited by hand",
    ),
    "a list": (lambda c: [c], "policy"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_content_is_refused_by_its_field(damage, match):
    content = Policy.of({"fc": LayerPrecision(4, 4, "lsq")}).to_json()
    with pytest.raises(PolicyError, match=match):
        Policy.from_json(damage(content))


def test_truncated_file_says_where(tmp_path):
    file = tmp_path / "p.json"
    file.write_text('{"schema": "adq')
    with pytest.raises(PolicyError, match="damaged: line 1"):
        load_policy(file)
    with pytest.raises(PolicyError, match="no policy file"):
        load_policy(tmp_path / "absent.json")


def test_uniform_keeps_its_ends():
    w4, w8 = LayerPrecision(4, 4, "lsq"), LayerPrecision(8, 8, "lsq")
    policy = Policy.uniform(["a", "b", "c"], w4, ends=w8)
    assert [policy[n] for n in "abc"] == [w8, w4, w8]
    assert parse_uniform("W3A5") == (3, 5)
    with pytest.raises(PolicyError, match="like W4A4"):
        parse_uniform("4/4")
