"""Estimates that are timed, stopped, kept, gone on with, and refused where they do not belong."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn

from adq_search.errors import SensitivityError, StorageError
from adq_search.sensitivity import (
    KlEstimator,
    Scores,
    SensitivityEstimator,
    SensitivityTable,
    Subject,
    sensitivity_table,
)
from adq_search.sensitivity._base import input_key, weight_key
from adq_search.space import SearchSpace
from adq_search.tracing import trace

torch.manual_seed(0)
NETWORK = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
INPUTS, TARGETS = torch.randn(32, 4), torch.arange(32) % 3
RULE = {"weight_bits": [2, 4], "input_bits": [4], "schemes": ["lsq"]}
SPACE = SearchSpace.from_spec({"default": RULE, "pinned": {}}, trace(NETWORK, INPUTS[:1]))


@dataclass(frozen=True)
class Counting(SensitivityEstimator):
    """Scores that are known, and a note of every piece that was worked on."""

    n: int = 6
    stop_after: int = field(default=10**9, repr=False)
    worked: list[tuple[int, str]] = field(default_factory=list, repr=False, compare=False)

    name: ClassVar[str] = "counting"

    def n_samples(self, subject: Subject) -> int:
        return self.n

    def parts(self, subject: Subject) -> tuple[str, ...]:
        return ("head", "tail")

    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        if len(self.worked) >= self.stop_after:
            raise KeyboardInterrupt
        self.worked.append((index, part))
        names = SPACE.names[:1] if part == "head" else SPACE.names[1:]
        scores: Scores = {}
        for name in names:
            for bits in (2, 4):
                scores[weight_key(name, "lsq", bits)] = (1.0 + index) / bits
            scores[input_key(name, "lsq", 4)] = 0.5
        return scores


def measured(estimator, **options) -> SensitivityTable:
    return sensitivity_table(estimator, NETWORK, INPUTS, TARGETS, SPACE, **options)


def test_a_table_is_the_mean_of_its_samples_with_their_standard_error():
    table = measured(Counting(n=4))
    assert table.weights["0", "lsq", 2] == pytest.approx((1 + 2 + 3 + 4) / 4 / 2)
    # by hand: variance of 0.5, 1, 1.5, 2 is 1.25 / 3
    assert table.weight_errors["0", "lsq", 2] == pytest.approx(math.sqrt(1.25 / 3 / 4))
    assert table.input_errors["0", "lsq", 4] == 0.0


def test_an_interrupted_estimate_goes_on_where_it_was(tmp_path):
    file = tmp_path / "sensitivity.json"
    with pytest.raises(KeyboardInterrupt):
        measured(Counting(stop_after=5), file=file)
    second = Counting()
    table = measured(second, file=file)
    assert second.worked == [(2, "tail"), *((i, p) for i in (3, 4, 5) for p in ("head", "tail"))]
    assert table == measured(Counting())
    third = Counting(stop_after=0)
    assert measured(third, file=file) == table  # nothing left to work on


@pytest.mark.parametrize("name", ["fisher", "fisher_output", "kl", "hessian", "lsq_steps"])
def test_a_kept_estimate_is_the_same_to_the_last_digit(name, tmp_path):
    file = tmp_path / "sensitivity.json"
    with torch.no_grad():
        targets = NETWORK(INPUTS).argmax(dim=1)
    options = {"file": file, "seed": 1}
    tables = [
        sensitivity_table(name, NETWORK, INPUTS, targets, SPACE, **o)
        for o in (options, options, {"seed": 1})
    ]
    assert tables[0] == tables[1] == tables[2]


def _other_network():
    other = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in NETWORK[::2]))
    network = nn.Sequential(other[0], nn.ReLU(), other[1], nn.ReLU(), other[2])
    return {"network": network}


CHANGES = {
    "weights": _other_network,
    "data": lambda: {"inputs": INPUTS + 1e-6},
    "space": lambda: {
        "space": SearchSpace.from_spec(
            {"default": {**RULE, "weight_bits": [2, 3]}, "pinned": {}}, trace(NETWORK, INPUTS[:1])
        )
    },
    "seed": lambda: {"seed": 7},
    "estimator": lambda: {"estimator": KlEstimator(n_folds=2)},
}


@pytest.mark.parametrize("part", CHANGES)
def test_what_belongs_to_another_estimate_is_refused_by_name(part, tmp_path):
    file = tmp_path / "sensitivity.json"
    ours = {"network": NETWORK, "inputs": INPUTS, "space": SPACE, "seed": 0, "estimator": "kl"}

    def measure(estimator, network, inputs, space, seed):
        return sensitivity_table(estimator, network, inputs, TARGETS, space, seed=seed, file=file)

    measure(**ours)
    with pytest.raises(StorageError, match=rf"measured on something else: {part} .*Remove"):
        measure(**{**ours, **CHANGES[part]()})


def test_what_another_version_measured_is_refused(tmp_path):
    file = tmp_path / "sensitivity.json"
    measured(Counting(), file=file)
    content = json.loads(file.read_text())
    content["signature"]["code"] = "0.0.1 0123456789abcdef"
    file.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"something else: code 0\.0\.1"):
        measured(Counting(), file=file)
    file.write_text("{}")
    with pytest.raises(StorageError, match="no sensitivity file of schema"):
        measured(Counting(), file=file)
    file.write_text("{")
    with pytest.raises(StorageError, match="damaged: line 1"):
        measured(Counting(), file=file)


class Clock:
    """A clock that the work moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("adq_search.sensitivity._work.time.perf_counter", clock)
    return clock


@dataclass(frozen=True)
class Slow(Counting):
    """Two seconds a piece."""

    clock: Clock = field(default_factory=Clock, repr=False)

    name: ClassVar[str] = "slow"

    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        self.clock.now += 2.0
        return super().sample(subject, index, part)


def test_the_time_left_is_told_after_the_first_piece(clock):
    told = []
    measured(Slow(clock=clock), on_eta=told.append)
    assert told == [22.0]  # 12 pieces of 2 s, one of them done


@pytest.mark.parametrize(("budget_s", "n"), [(100.0, 6), (24.0, 6), (23.9, 5), (12.0, 3), (8.0, 2)])
def test_no_sample_begins_that_would_pass_the_budget(clock, budget_s, n):
    estimator = Slow(clock=clock)
    table = measured(estimator, budget_s=budget_s)
    assert len(estimator.worked) == 2 * n
    assert clock.now <= budget_s
    assert table.weights["0", "lsq", 2] == pytest.approx((n + 1) / 2 / 2)


def test_what_a_budget_ended_goes_on_only_with_a_larger_one(clock, tmp_path):
    file = tmp_path / "sensitivity.json"
    first = measured(Slow(clock=clock), budget_s=12.0, file=file)
    again = Slow(clock=clock)
    assert measured(again, budget_s=12.0, file=file) == first
    assert measured(again, budget_s=9.0, file=file) == first
    assert again.worked == []
    measured(again, budget_s=16.0, file=file)
    assert [index for index, _ in again.worked] == [3, 3, 4, 4, 5, 5]  # 0 to 2 cost nothing now
    assert measured(Slow(clock=clock), file=file) == measured(Slow(clock=clock))


def test_a_budget_below_the_least_number_of_samples_is_refused_at_once(clock):
    estimator = Slow(clock=clock)
    with pytest.raises(SensitivityError, match=r"2 samples at least.*about 8 s.*budget is 7.9 s"):
        measured(estimator, budget_s=7.9)
    assert len(estimator.worked) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9], ids=["nan", "inf", "negative"])
def test_a_table_with_a_bad_score_cannot_be_made(bad):
    good = {("a", "lsq", 2): 0.1}
    for part, scores in (
        ("weights", {"weights": {("a", "lsq", 2): bad}, "inputs": good}),
        ("inputs", {"weights": good, "inputs": {("a", "lsq", 2): bad}}),
        ("both", {"weights": good, "inputs": good, "both": {("a", "lsq", 2, 2): bad}}),
    ):
        with pytest.raises(SensitivityError, match=rf"for the {part}.* of a .*it is {bad}"):
            SensitivityTable("given", **scores)
