"""Costs of many policies at once are those of one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adq_search.errors import CostError
from adq_search.hardware import cost, cost_table, load_hardware, total_of
from adq_search.space import SearchSpace
from adq_search.tasks.networks import resnet20
from adq_search.tracing import trace

SPEC = {
    "default": {
        "weight_bits": [2, 3, 4],
        "input_bits": [2, 4, 8],
        "schemes": ["lsq", "asq", "post", "pot", "adq"],
        "ema_momenta": [0.9, 0.99],
    },
}


@pytest.fixture(scope="module")
def summary():
    return trace(resnet20(), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def space(summary):
    spec = SPEC | {"share": {"first stage": list(summary.names[1:4])}}
    return SearchSpace.from_spec(spec, summary)


def draws(table, n, seed):
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, len(row), n) for row in table.choices], axis=1)


@pytest.mark.parametrize("hardware", ["post_asic_45nm", "memory_bound_edge"])
def test_totals_equal_costs_to_the_last_bit(summary, space, hardware):
    table = cost_table(summary, space, hardware)
    indices = draws(table, 40, seed=1)

    totals = table.totals(indices)

    for row, policy in enumerate(indices):
        chosen = {
            group.name: group.choices[i] for group, i in zip(space.groups, policy, strict=True)
        }
        expected = total_of(cost(summary, space.policy_from(chosen), hardware))
        assert set(totals) == set(expected)
        for name, value in expected.items():
            assert totals[name][row] == value, name


def test_blocks_do_not_matter_and_figures_may_be_chosen(summary, space):
    table = cost_table(summary, space)
    indices = draws(table, 5000, seed=2)  # more than two blocks

    some = table.totals(indices, ["energy_pj", "utilisation"])
    alone = table.totals(indices[4999:])

    assert list(some) == ["energy_pj", "utilisation"]
    assert some["energy_pj"][4999] == alone["energy_pj"][0]
    assert some["utilisation"][4999] == alone["utilisation"][0]
    assert table.totals(indices[:0])["bops"].shape == (0,)


def test_policies_are_found_by_their_precisions(summary, space):
    table = cost_table(summary, space)
    indices = draws(table, 3, seed=3)
    precisions = [
        [row[i] for row, i in zip(table.choices, policy, strict=True)] for policy in indices
    ]

    assert (table.indices_of(precisions) == indices).all()


def test_wrong_rows_are_refused(summary, space):
    table = cost_table(summary, space, load_hardware("post_asic_45nm"))
    indices = draws(table, 2, seed=4)

    with pytest.raises(CostError, match=r"shape \(2, 3\). Give \(policies, "):
        table.totals(indices[:, :3])
    with pytest.raises(CostError, match="names a choice that its group does not have"):
        table.totals(indices + 1000)
    with pytest.raises(CostError, match=r"no figure 'energy'.*mean 'energy_pj'"):
        table.totals(indices, ["energy"])
    with pytest.raises(
        CostError, match="no datapath for weights of quantizer .post., which `layer1"
    ):
        cost_table(summary, space, "uniform_asic_45nm")
