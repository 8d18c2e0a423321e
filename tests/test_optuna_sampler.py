"""PolicySampler: Optuna's own conformance classes, and what a policy sampler promises beyond."""

import optuna
import pytest
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)

from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.simulator import published_problem


@pytest.fixture(scope="module")
def problem():
    return published_problem(seed=0)


class TestConformance(
    BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase
):
    """Optuna's contract, on ordinary spaces."""

    @pytest.fixture
    def sampler(self, problem):
        return lambda: PolicySampler(problem.space, seed=0)
