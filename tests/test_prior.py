from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adq_search.errors import BudgetError, CostError
from adq_search.hardware import COST_NAMES, cost, total_of
from adq_search.policy import Policy
from adq_search.prior import (
    Proposal,
    allocate,
    cost_range,
    lagrangian_sweep,
    propose_seeds,
    rank_correlation,
)
from adq_search.sensitivity import SensitivityTable, sensitivity_table
from adq_search.space import SearchSpace
from adq_search.tracing import trace

HARDWARE = "post_asic_45nm"


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 3, 1), nn.Flatten(), nn.Linear(48, 3)
    )


torch.manual_seed(0)
NETWORK = _network()
SUMMARY = trace(NETWORK, torch.zeros(1, 1, 8, 8))


def _space(**content: Any) -> SearchSpace:
    default = {"weight_bits": [2, 4, 8], "input_bits": [4, 8], "schemes": ["lsq"]}
    return SearchSpace.from_spec({"default": default, **content}, SUMMARY)


def _table(space: SearchSpace, scores: Mapping[tuple[str, str], list[float]]) -> SensitivityTable:
    """Make a table of the given falling scores by (layer, "weights" or "inputs")."""
    weights, inputs = {}, {}
    for group in space.groups:
        for layer in group.layers:
            for quantizer, b in itertools.product(("lsq", "post", "adq", "n2uq"), range(2, 9)):
                weights[layer, quantizer, b] = scores[layer, "weights"][b - 2]
                inputs[layer, quantizer, b] = scores[layer, "inputs"][b - 2]
    return SensitivityTable("given", weights, inputs, {})


def _random_table(space: SearchSpace, seed: int) -> SensitivityTable:
    rng = np.random.default_rng(seed)
    scores = {
        (layer, part): sorted((10.0 ** rng.uniform(-6, 0, 7)).tolist(), reverse=True)
        for layer in space.names
        for part in ("weights", "inputs")
    }
    return _table(space, scores)


def _everything(space: SearchSpace, table: SensitivityTable) -> list[tuple[Policy, float, dict]]:
    """Return every policy with its predicted loss and its costs, by the whole network's cost."""
    free = [g for g in space.groups if g.pinned is None]
    out = []
    for chosen in itertools.product(*(g.choices for g in free)):
        policy = space.policy_from({g.name: p for g, p in zip(free, chosen, strict=True)})
        loss = sum(table.score(layer, p) for layer, p in policy)
        out.append((policy, loss, total_of(cost(SUMMARY, policy, HARDWARE))))
    return out


@pytest.mark.parametrize("name", COST_NAMES)
def test_cost_range_is_that_of_all_policies(name: str) -> None:
    space = _space(default={"weight_bits": [2, 8], "input_bits": [2, 8], "schemes": ["lsq", "adq"]})
    costs = [c[name] for _, _, c in _everything(space, _random_table(space, 0))]
    low, high = cost_range(space, SUMMARY, name, HARDWARE)
    assert low == pytest.approx(min(costs), rel=1e-12)
    assert high == pytest.approx(max(costs), rel=1e-12)


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the lower left hull by asking every price of the cost in turn."""
    corners = set()
    slopes = {
        (b[1] - a[1]) / (a[0] - b[0]) for a, b in itertools.permutations(points, 2) if a[0] != b[0]
    }
    ordered = sorted(s for s in slopes if s > 0)
    prices = [ordered[0] / 2, *(math.sqrt(a * b) for a, b in itertools.pairwise(ordered))]
    for price in [*prices, ordered[-1] * 2]:
        corners.add(min(points, key=lambda p: (p[1] + price * p[0], p[0])))
    return sorted(corners)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["energy_pj", "weight_bytes"])
def test_the_sweep_holds_every_corner_of_the_hull_over_all_policies(name: str, seed: int) -> None:
    space = _space(default={"weight_bits": [2, 4, 8], "input_bits": [4], "schemes": ["lsq"]})
    table = _random_table(space, seed)
    points = [(c[name], loss) for _, loss, c in _everything(space, table)]
    sweep = lagrangian_sweep(space, SUMMARY, table, name, HARDWARE)
    swept = [(p.cost, p.predicted) for p in sweep]
    for corner in _hull(points):
        assert any(s == pytest.approx(corner, rel=1e-9) for s in swept)
    for point in swept:
        assert any(point == pytest.approx(p, rel=1e-9) for p in points)


def test_the_sweep_runs_from_the_cheapest_to_the_best() -> None:
    space = _space()
    table = _random_table(space, 1)
    sweep = lagrangian_sweep(space, SUMMARY, table, "energy_pj", HARDWARE)
    everything = _everything(space, table)
    assert sweep[0].cost == pytest.approx(min(c["energy_pj"] for *_, c in everything))
    assert sweep[-1].predicted == pytest.approx(min(loss for _, loss, _ in everything))
    costs = [p.cost for p in sweep]
    losses = [p.predicted for p in sweep]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)
    assert len({p.policy for p in sweep}) == len(sweep)
    for p in sweep:
        assert p.predicted == pytest.approx(table.predict(p.policy))
        assert p.cost == pytest.approx(total_of(cost(SUMMARY, p.policy, HARDWARE))["energy_pj"])


def test_no_swept_policy_is_beaten_in_both() -> None:
    space = _space()
    table = _random_table(space, 2)
    points = [(c["bops"], loss) for _, loss, c in _everything(space, table)]
    for p in lagrangian_sweep(space, SUMMARY, table, "bops", HARDWARE):
        assert not any(
            k <= p.cost * (1 - 1e-12) and s <= p.predicted * (1 - 1e-12) for k, s in points
        )


@pytest.mark.parametrize("n", [0, 1, 2, 4, 1000])
def test_seeds_are_different_and_spread_over_the_logarithm_of_cost(n: int) -> None:
    space = _space(pinned={})
    table = _random_table(space, 3)
    sweep = lagrangian_sweep(space, SUMMARY, table, "energy_pj", HARDWARE)
    seeds = propose_seeds(space, SUMMARY, table, "energy_pj", HARDWARE, n=n)
    assert len(seeds) == len({s.policy for s in seeds}) == min(n, len(sweep))
    assert set(seeds) <= set(sweep)
    if n == 4:
        assert (seeds[0], seeds[-1]) == (sweep[0], sweep[-1])
        low, high = math.log(sweep[0].cost), math.log(sweep[-1].cost)
        widest = max(math.log(b.cost / a.cost) for a, b in itertools.pairwise(sweep))
        for i, seed in enumerate(seeds):
            assert abs(math.log(seed.cost) - (low + i * (high - low) / 3)) <= widest


def test_seeds_keep_within_budgets() -> None:
    space = _space()
    table = _random_table(space, 4)
    low, high = cost_range(space, SUMMARY, "weight_bytes", HARDWARE)
    budgets = {"weight_bytes": (low + high) / 2}
    seeds = propose_seeds(space, SUMMARY, table, "bops", HARDWARE, n=5, budgets=budgets)
    assert 1 < len(seeds) <= 5
    for s in seeds:
        totals = total_of(cost(SUMMARY, s.policy, HARDWARE))
        assert totals["weight_bytes"] <= budgets["weight_bytes"]
        assert s.cost == pytest.approx(totals["bops"])


def test_seeds_of_budgets_begin_with_the_best_and_crowd_near_the_limits() -> None:
    space = _space(default={"weight_bits": [2, 3, 4, 8], "input_bits": [4, 8], "schemes": ["lsq"]})
    table = _random_table(space, 4)
    budgets = {}
    for name in ("weight_bytes", "energy_pj"):
        low, high = cost_range(space, SUMMARY, name, HARDWARE)
        budgets[name] = low + 0.8 * (high - low)
    seeds = propose_seeds(space, SUMMARY, table, "energy_pj", HARDWARE, n=8, budgets=budgets)
    within = [
        (loss, c)
        for _, loss, c in _everything(space, table)
        if all(c[name] <= limit for name, limit in budgets.items())
    ]
    assert seeds[0].predicted == pytest.approx(min(loss for loss, _ in within))
    assert len({s.policy for s in seeds}) == len(seeds) > 3
    losses = [s.predicted for s in seeds]
    assert losses == sorted(losses)
    for seed in seeds:  # nothing is better at no more of either budget
        own = total_of(cost(SUMMARY, seed.policy, HARDWARE))
        assert not any(
            loss < seed.predicted * (1 - 1e-9)
            and all(c[name] <= own[name] * (1 + 1e-9) for name in budgets)
            for loss, c in within
        )
    last = total_of(cost(SUMMARY, seeds[-1].policy, HARDWARE))
    for name in budgets:
        assert last[name] == pytest.approx(cost_range(space, SUMMARY, name, HARDWARE)[0])


ADQ = {"weight_bits": 4, "input_bits": 4, "scheme": "adq", "ema_momentum": 0.9}
CONSTRAINED = {
    "tied": {"share": {"inner": ["1", "2"]}, "pinned": {}},
    "pinned": {"pinned": {"first": 8, "2": ADQ}},
    "tied and pinned": {"share": {"ends": ["0", "4"]}, "pinned": {"1": ADQ}},
}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.0, 1.0),
    other=st.floats(0.0, 1.0),
    kind=st.sampled_from(sorted(CONSTRAINED)),
)
def test_tied_and_pinned_layers_under_two_budgets(
    seed: int, share: float, other: float, kind: str
) -> None:
    space = _space(**CONSTRAINED[kind])
    table = _random_table(space, seed)
    everything = _everything(space, table)
    budgets = {}
    for name, t in (("weight_bytes", share), ("energy_pj", other)):
        low, high = cost_range(space, SUMMARY, name, HARDWARE)
        budgets[name] = low + t * (high - low)
    affordable = [
        loss
        for _, loss, c in everything
        if all(c[figure] <= limit * (1 + 1e-9) for figure, limit in budgets.items())
    ]
    if not affordable:
        with pytest.raises(BudgetError, match="together with"):
            allocate(space, SUMMARY, table, budgets, HARDWARE)
        return
    found = allocate(space, SUMMARY, table, budgets, HARDWARE)
    assert space.policy_of(space.params_of(found.policy)) == found.policy
    assert found.predicted == pytest.approx(min(affordable), rel=1e-7, abs=1e-9)
    sweep = lagrangian_sweep(space, SUMMARY, table, "energy_pj", HARDWARE)
    best = min(loss for _, loss, _ in everything)
    assert sweep[-1].predicted == pytest.approx(best)


def test_a_budget_that_no_corner_meets_gets_its_best_policy() -> None:
    # As below: adq takes less memory in one layer but more energy, so a sweep over energy with
    # equal losses stays with lsq.
    space = _space(default={"weight_bits": [2], "input_bits": [2], "schemes": ["lsq", "adq"]})
    scores = {(n, part): [1.0] * 7 for n in space.names for part in ("weights", "inputs")}
    table = _table(space, scores)
    everything = [c for *_, c in _everything(space, table)]
    budgets = {"memory_bytes": min(c["memory_bytes"] for c in everything)}
    for p in lagrangian_sweep(space, SUMMARY, table, "energy_pj", HARDWARE):
        assert total_of(cost(SUMMARY, p.policy, HARDWARE))["memory_bytes"] > budgets["memory_bytes"]
    (seed,) = propose_seeds(space, SUMMARY, table, "energy_pj", HARDWARE, n=3, budgets=budgets)
    totals = total_of(cost(SUMMARY, seed.policy, HARDWARE))
    assert totals["memory_bytes"] == pytest.approx(budgets["memory_bytes"])
    assert seed.cost == pytest.approx(totals["energy_pj"])
    with pytest.raises(BudgetError, match="memory_bytes"):
        propose_seeds(
            space, SUMMARY, table, "energy_pj", HARDWARE, n=3, budgets={"memory_bytes": 1.0}
        )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.0, 1.0),
    name=st.sampled_from(["average_bits_weighted", "average_bits_inner", "energy_pj", "bops"]),
    other=st.sampled_from([None, "memory_bytes"]),
)
def test_allocation_is_the_best_of_all_policies(
    seed: int, share: float, name: str, other: str | None
) -> None:
    space = _space()
    table = _random_table(space, seed)
    everything = _everything(space, table)
    low, high = cost_range(space, SUMMARY, name, HARDWARE)
    budgets = {name: low + share * (high - low)}
    if other is not None:
        low, high = cost_range(space, SUMMARY, other, HARDWARE)
        budgets[other] = low + (1.0 - share) * (high - low)
    affordable = [
        loss
        for _, loss, c in everything
        if all(c[figure] <= limit * (1 + 1e-9) for figure, limit in budgets.items())
    ]
    if not affordable:
        with pytest.raises(BudgetError, match="together with"):
            allocate(space, SUMMARY, table, budgets, HARDWARE)
        return
    found = allocate(space, SUMMARY, table, budgets, HARDWARE)
    totals = total_of(cost(SUMMARY, found.policy, HARDWARE))
    assert all(totals[figure] <= limit * (1 + 2e-9) for figure, limit in budgets.items())
    assert found.predicted == pytest.approx(table.predict(found.policy))
    assert found.predicted == pytest.approx(min(affordable), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", COST_NAMES)
def test_a_budget_at_the_very_bottom_is_met_exactly(name: str) -> None:
    space = _space()
    table = _random_table(space, 5)
    low, high = cost_range(space, SUMMARY, name, HARDWARE)
    assert allocate(space, SUMMARY, table, {name: low}, HARDWARE).cost == pytest.approx(low)
    best = min(loss for _, loss, _ in _everything(space, table))
    roomy = allocate(space, SUMMARY, table, {name: high}, HARDWARE)
    assert roomy.predicted == pytest.approx(best)


def test_shared_layers_are_bought_together() -> None:
    space = _space(share={"inner": ["1", "2"]})
    table = _random_table(space, 6)
    for p in lagrangian_sweep(space, SUMMARY, table, "energy_pj", HARDWARE):
        assert p.policy["1"] == p.policy["2"]
    found = allocate(space, SUMMARY, table, {"average_bits_inner": 4.0}, HARDWARE)
    assert found.policy["1"] == found.policy["2"]
    assert found.cost <= 4.0


def test_momentum_is_the_middle_one() -> None:
    space = _space(
        default={
            "weight_bits": [2, 4],
            "input_bits": [4],
            "schemes": ["adq"],
            "ema_momenta": [0.9, 0.99, 0.999],
        }
    )
    table = _random_table(space, 7)
    sweep = lagrangian_sweep(space, SUMMARY, table, "energy_pj", HARDWARE)
    assert {p.policy["1"].ema_momentum for p in sweep} == {0.99}
    assert all(space.policy_of(space.params_of(p.policy)) == p.policy for p in sweep)


def test_an_impossible_budget_says_what_is_possible() -> None:
    space = _space()
    table = _random_table(space, 8)
    low, high = cost_range(space, SUMMARY, "average_bits_weighted", HARDWARE)
    with pytest.raises(BudgetError, match=f"reaches from {low:.6g} to {high:.6g}") as caught:
        allocate(space, SUMMARY, table, {"average_bits_weighted": 1.5}, HARDWARE)
    assert caught.value.reachable == (low, high)


def test_budgets_that_exclude_each_other_say_what_is_possible_together() -> None:
    # In the wider layer one codebook takes less memory than a step a channel, but more energy.
    space = _space(default={"weight_bits": [2], "input_bits": [2], "schemes": ["lsq", "adq"]})
    table = _random_table(space, 9)
    everything = [c for *_, c in _everything(space, table)]
    low = {name: min(c[name] for c in everything) for name in ("energy_pj", "memory_bytes")}
    within = [c["memory_bytes"] for c in everything if c["energy_pj"] <= low["energy_pj"]]
    assert min(within) > low["memory_bytes"]
    with pytest.raises(BudgetError, match=r"memory_bytes .* together with energy_pj") as caught:
        allocate(space, SUMMARY, table, low, HARDWARE)
    assert caught.value.reachable == pytest.approx((min(within), max(within)))


def test_an_allocation_needs_a_budget_and_a_figure_that_exists() -> None:
    space = _space()
    table = _random_table(space, 10)
    with pytest.raises(CostError, match="needs a budget"):
        allocate(space, SUMMARY, table, {}, HARDWARE)
    with pytest.raises(CostError, match="Did you mean 'energy_pj'"):
        cost_range(space, SUMMARY, "energy", HARDWARE)


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    space = _space(pinned={})
    for seed in range(30):
        table = _random_table(space, seed)
        allocate(space, SUMMARY, table, {"average_bits_weighted": 3.0 + seed / 10}, HARDWARE)
    assert capfd.readouterr() == ("", "")


def test_from_a_real_table_to_seeds() -> None:
    space = _space()
    inputs, targets = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    table = sensitivity_table("fisher", NETWORK, inputs, targets, space)
    seeds = propose_seeds(space, SUMMARY, table, "energy_pj", HARDWARE, n=4)
    assert all(isinstance(s, Proposal) and math.isfinite(s.predicted) for s in seeds)
    assert len(seeds) == 4


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # by hand: ranks 1 2 3 against 2 1 3, 1 - 6 * (1 + 1 + 0) / (3 * 8)
    assert rank_correlation([1, 2, 3], [2, 1, 3]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 2], [1, 2]))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
