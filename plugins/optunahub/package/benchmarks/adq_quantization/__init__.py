"""OptunaHub package: mixed-precision quantization of ResNet-18 as a benchmark problem."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState
from optunahub.benchmarks import BaseProblem

from adq_search.plugins.optuna_objective import distribution
from adq_search.sensitivity import SensitivityTable
from adq_search.simulator import published_problem
from adq_search.space import SearchSpace

__all__ = ["Problem"]


class Problem(BaseProblem):
    """Bits of 19 layers: accuracy against bit operations, from published sensitivities.

    Args:
        seed: Of the hidden losses and of the noise.
        noise: Standard deviation of the logarithm of a measured loss.
        budget: Upper limit on the cost, as a share of the dearest policy's; None sets none.
    """

    def __init__(self, *, seed: int = 0, noise: float = 0.05, budget: float | None = None) -> None:
        self._problem = published_problem(seed=seed, noise=noise)
        self._seed = seed
        self._budget = budget

    @property
    def search_space(self) -> dict[str, BaseDistribution]:
        """Bits of each layer."""
        return {p.name: distribution(p) for p in self.space.parameters}

    @property
    def directions(self) -> list[StudyDirection]:
        """Accuracy is maximised, cost minimised."""
        return [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]

    @property
    def space(self) -> SearchSpace:
        """The search space, for samplers that know policies."""
        return self._problem.space

    @property
    def prior(self) -> SensitivityTable:
        """What a sensitivity estimator would predict."""
        return self._problem.prior

    def evaluate(self, params: dict[str, Any]) -> tuple[float, float]:
        """Return accuracy (1 is full precision's) and cost (1 is the dearest policy's)."""
        found = self._problem.measure(self.space.policy_of(params), seed=self._seed)
        return found.accuracy, found.cost

    def evaluate_constraints(self, params: dict[str, Any]) -> dict[str, float]:
        """Return by how much the cost exceeds the budget."""
        if self._budget is None:
            return {}
        policy = self.space.policy_of(params)
        ((_, cost),) = self._problem.true_points([policy])
        return {"cost": cost - self._budget}

    def share_of_hypervolume(self, study: Study) -> float:
        """Return the share of the true front's hypervolume that a study's trials reach."""
        trials: list[optuna.trial.FrozenTrial] = study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE,)
        )
        return self._problem.share_of_hypervolume(self.space.policy_of(t.params) for t in trials)
