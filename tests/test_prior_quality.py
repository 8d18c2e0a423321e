from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import nn

from adq_search.policy import LayerPrecision
from adq_search.prior_quality import partial_rank_correlation, prior_quality
from adq_search.sensitivity import SensitivityTable
from adq_search.space import SearchSpace
from adq_search.tracing import trace

NETWORK = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
SPACE = SearchSpace.from_spec(
    {
        "default": {"weight_bits": [2, 3, 4, 8], "input_bits": [8], "schemes": ["lsq"]},
        "pinned": {"last": 8},
        "share": {"pair": ["0", "1"]},
    },
    trace(NETWORK, torch.zeros(1, 4)),
)
SCALES = {"0": 1.0, "1": 3.0, "2": 2.0, "3": 1.0}
TABLE = SensitivityTable(
    "given",
    {(n, "lsq", b): s * 4.0**-b for n, s in SCALES.items() for b in (2, 3, 4, 8)},
    {(n, "lsq", 8): 0.0 for n in SCALES},
)


def policies(n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield SPACE.policy_from(
            {
                name: LayerPrecision(int(rng.choice([2, 3, 4, 8])), 8, "lsq")
                for name in ("pair", "2")
            }
        )


def test_partial_rank_correlation_is_that_of_regression_residuals():
    rng = np.random.default_rng(1)
    z = rng.normal(size=40)
    x, y = z + rng.normal(size=40), z - 0.5 * rng.normal(size=40)
    ranks = [rankdata(v) for v in (x, y, z)]
    design = np.stack([np.ones(40), ranks[2]], axis=1)
    left = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
    expected = np.corrcoef(*left)[0, 1]
    assert partial_rank_correlation(list(x), list(y), list(z)) == pytest.approx(expected)


def test_what_follows_a_third_alone_has_no_partial_correlation():
    rng = np.random.default_rng(2)
    z = rng.normal(size=4000)
    x, y = z + rng.normal(size=4000), z + rng.normal(size=4000)
    assert abs(partial_rank_correlation(list(x), list(y), list(z))) < 0.1


def test_undefined_correlations_are_none_not_a_number():
    assert math.isnan(partial_rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 2]))
    assert math.isnan(partial_rank_correlation([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 5]))
    plain = partial_rank_correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [0] * 5)
    assert plain == pytest.approx(-1.0)
    few = prior_quality(SPACE, TABLE, [(p, 0.1) for p in policies(2)])
    assert few.rank_correlation is None
    assert few.by_group == {"pair": None, "2": None}


def test_a_prior_that_is_right_has_a_correlation_of_one():
    measured = [(p, TABLE.predict(p)) for p in policies(40)]
    found = prior_quality(SPACE, TABLE, measured)
    assert (found.estimator, found.n_measured) == ("given", 40)
    assert found.rank_correlation == pytest.approx(1.0)
    assert set(found.by_group) == {"pair", "2"}  # the pinned layer is not judged
    # a rank of a sum is no sum of ranks, so a part of each is left to the other
    assert min(found.by_group.values()) > 0.7


def test_the_group_that_a_prior_gets_wrong_is_found():
    # What is measured falls with the sensitivity of `2` instead of rising.
    def truth(policy):
        return TABLE.score("0", policy["0"]) * 4.0 - TABLE.score("2", policy["2"])

    measured = [(p, truth(p)) for p in policies(60)]
    found = prior_quality(SPACE, TABLE, measured)
    assert found.by_group["pair"] > 0.8
    assert found.by_group["2"] < -0.5
