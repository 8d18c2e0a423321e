"""A search whose every answer is known: hidden losses, neighbours that interact, noise.

Notation:
    z_gc: hidden loss increase of choice c of group g; p_g(c, c'): what choices c of group g and c'
    of the next one lose together.
    kl(policy) = sum_g z_gc + sum_g p_g(c_g, c_{g+1});  accuracy = exp(-kl), that of full
    precision being 1.

As only neighbours interact, dynamic programming along the groups finds the whole true front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adq_search.pareto import Objective, hypervolume
from adq_search.policy import Policy
from adq_search.sensitivity import SensitivityTable
from adq_search.space import SearchSpace

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Shape of a learning curve: the logarithm of its excess at the first epoch, the pace at which that
#: falls, and the spread of both; as recorded on digits (`results/search_efficiency`).
_EXCESS = 0.7
_PACE = 0.45
_CURVE_SPREAD = 0.35


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a simulated training measured.

    Attributes:
        accuracy: Share of full precision's accuracy, 0 to 1.
        kl: Loss increase, nats.
        cost: Share of the cost of the dearest policy.
        curve: KL after each epoch, the last being `kl`.
    """

    accuracy: float
    kl: float
    cost: float
    curve: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class SimulatedProblem:
    """Policies of a space, with hidden losses.

    Args:
        space: Which policies exist; every group is searched.
        prior: What an estimator would say of the losses.
        losses: z, # shape: (groups, choices)
        pairs: p, # shape: (groups - 1, choices, choices)
        costs: In whole units, # shape: (groups, choices)
        noise: Standard deviation of the logarithm of a measured KL.
        epochs: Length of a learning curve.
    """

    space: SearchSpace
    prior: SensitivityTable
    losses: Floats
    pairs: Floats
    costs: Indices
    noise: float = 0.05
    epochs: int = 9

    #: Objectives of a measurement, in order.
    objectives = (Objective("accuracy", "maximize"), Objective("cost", "minimize"))
    #: The reference point of every hypervolume.
    reference = (0.0, 1.0)

    def indices_of(self, policies: Iterable[Policy]) -> Indices:
        """Return which choice each group of each policy takes, shape (policies, groups)."""
        places = self._places
        return np.array(
            [[at[policy[layer]] for (layer, at) in places] for policy in policies],
            dtype=np.int64,
        ).reshape(-1, len(places))

    def true_kl(self, indices: Indices) -> Floats:
        """Return KL without noise, shape (policies,)."""
        g = np.arange(len(self.losses))
        alone = self.losses[g, indices].sum(axis=1)
        return np.asarray(alone + self.pairs[g[:-1], indices[:, :-1], indices[:, 1:]].sum(axis=1))

    def cost(self, indices: Indices) -> Floats:
        """Return the share of the dearest policy's cost, shape (policies,)."""
        g = np.arange(len(self.losses))
        return np.asarray(self.costs[g, indices].sum(axis=1) / self.costs.max(axis=1).sum())

    @property
    def cost_rows(self) -> tuple[Floats, ...]:
        """What each choice of each group adds to `cost`, # shape: (choices,) each."""
        return tuple(self.costs / self.costs.max(axis=1).sum())

    def true_points(self, policies: Iterable[Policy]) -> list[tuple[float, float]]:
        """Return accuracy and cost of policies without noise."""
        indices = self.indices_of(policies)
        pairs = zip(np.exp(-self.true_kl(indices)), self.cost(indices), strict=True)
        return [(float(accuracy), float(cost)) for accuracy, cost in pairs]

    def measure(self, policy: Policy, *, seed: int) -> Measurement:
        """Return what one training would measure: the same for the same seed, noisy otherwise."""
        indices = self.indices_of([policy])
        rng = np.random.default_rng([seed, int(policy.hash, 16)])
        kl = float(self.true_kl(indices)[0]) * math.exp(self.noise * rng.standard_normal())
        excess = _EXCESS * math.exp(_CURVE_SPREAD * rng.standard_normal())
        pace = _PACE * math.exp(_CURVE_SPREAD * rng.standard_normal())
        epochs = np.arange(1, self.epochs + 1)
        wobble = self.noise * rng.standard_normal(self.epochs)
        wobble[-1] = 0.0
        fall = excess * (np.exp(-pace * (epochs - 1)) - math.exp(-pace * (self.epochs - 1)))
        curve = kl * np.exp(fall + wobble)
        return Measurement(
            math.exp(-kl), kl, float(self.cost(indices)[0]), tuple(map(float, curve))
        )

    def share_of_hypervolume(self, policies: Iterable[Policy]) -> float:
        """Return the hypervolume of the policies' true points over that of the true front."""
        points = self.true_points(policies)
        return self._volume(points) / self._volume(self.true_front)

    @cached_property
    def true_front(self) -> list[tuple[float, float]]:
        """Accuracy and cost of every point of the true front, by rising cost; exact.

        Dynamic programming: the least KL for each total cost and each choice of the last group.
        """
        most = int(self.costs.max(axis=1).sum())
        n_choices = self.losses.shape[1]
        best = np.full((n_choices, most + 1), np.inf)
        for c in range(n_choices):
            best[c, self.costs[0, c]] = self.losses[0, c]
        for g in range(1, len(self.losses)):
            further = np.full_like(best, np.inf)
            for c in range(n_choices):
                spent = int(self.costs[g, c])
                before = (best + self.pairs[g - 1, :, c, None]).min(axis=0)
                further[c, spent:] = before[: most + 1 - spent] + self.losses[g, c]
            best = further
        least = np.minimum.accumulate(best.min(axis=0))
        on_front = np.r_[np.isfinite(least[0]), least[1:] < least[:-1]]
        return [(math.exp(-least[cost]), float(cost / most)) for cost in np.flatnonzero(on_front)]

    def _volume(self, points: list[tuple[float, float]]) -> float:
        return hypervolume(points, [o.direction for o in self.objectives], self.reference)

    @cached_property
    def _places(self) -> list[tuple[str, dict[object, int]]]:
        return [
            (group.layers[0], {p: i for i, p in enumerate(group.choices)})
            for group in self.space.groups
        ]
