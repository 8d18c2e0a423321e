"""The guide: what to train next, from what was trained.

Each proposal is the answer to one draw from the posterior of the loss (Thompson sampling,
[Russo2018]_): the front of the drawn belief is swept exactly, and the policy is taken that would
add most hypervolume to what the same draw thinks of the policies tried already. Trials still
running count as tried, so that any number of them spread over the front [Bradford2018]_. Trials
stopped early are learned from, but do not count: what they would have added is still to be had.
Draws lie half as far from the mean as the posterior's: so reshaped they regret less
[Chapelle2011]_, and some hundred trials cannot explore that many dimensions anyway.

.. [Russo2018] Russo et al. A Tutorial on Thompson Sampling. FnT Machine Learning, 2018.
.. [Chapelle2011] Chapelle, Li. An Empirical Evaluation of Thompson Sampling. NIPS 2011.
.. [Bradford2018] Bradford, Schweidtmann, Lapkin. Efficient multiobjective optimization employing
   Gaussian processes, spectral sampling and a genetic algorithm. J. Global Optimization, 2018.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import isotonic_regression

from adq_search.guide._candidates import Indices, Monotone, improvement, neighbours, sweep
from adq_search.guide._decisions import Decision, Floats
from adq_search.guide._model import Belief, LossModel
from adq_search.knapsack import choose, is_within

Choice = tuple[int, ...]

#: A failed trial is taken to lose this much more, in units of log loss, than the worst finished
#: one, give or take as much.
_FAILURE_EXCESS = 0.7
#: The spreads are learned anew when this many times more trials have finished.
_REFIT_GROWTH = 1.15
#: The first trials are spread over the front that the mean of the belief predicts.
_N_SPREAD = 12
#: How far draws lie from the mean, as a share of the posterior's. On the published problem 0.25 to
#: 0.5 was level with 0 and 1 or ahead: at 24 to 400 trials, one by one, 16 and 64 at a time.
_RESHAPED = 0.5
_MAX_RANDOM_TRIES = 1000
_TINY = 1e-12


class Guide:
    """Proposes policies, given what was measured of others.

    Args:
        decisions: What is decided; a policy is one index for each.
        n_objectives: How many of the decisions' cost figures are objectives: the first ones.
        budgets: Upper limits, by the position of their figure among the cost figures.
    """

    def __init__(
        self,
        decisions: Sequence[Decision],
        *,
        n_objectives: int = 1,
        budgets: Mapping[int, float] | None = None,
    ) -> None:
        self.decisions = tuple(decisions)
        self._model = LossModel(self.decisions)
        self._sizes = np.array([d.n_choices for d in self.decisions])
        width = int(self._sizes.max())
        n_figures = self.decisions[0].costs.shape[0]
        self._costs = np.zeros((n_figures, len(self.decisions), width))
        for d, decision in enumerate(self.decisions):
            self._costs[:, d, : decision.n_choices] = decision.costs
        self._n_objectives = n_objectives
        self._budgets = dict(budgets or {})
        self._monotone = Monotone(self.decisions, width)
        self._tried: dict[Choice, None] = {}
        self._counted: dict[Choice, None] = {}
        self._choices: list[Choice] = []
        self._log_losses: list[float] = []
        self._values: list[float] = []
        self._noise: list[float] = []
        self._failures: list[Choice] = []
        self._n_learned = self._n_at_fit = 0
        self._known = np.zeros((0, len(self.decisions)), dtype=np.int64)

    @property
    def n_told(self) -> int:
        """Number of trials whose loss was told or forecast."""
        return len(self._choices)

    @property
    def model(self) -> LossModel:
        """What has been learned, as of the last proposal."""
        return self._model

    def tell(
        self,
        choices: Sequence[int],
        log_loss: float,
        *,
        value: float | None = None,
    ) -> None:
        """Take the result of a finished trial.

        Args:
            choices: What it chose.
            log_loss: Natural logarithm of its KL to the teacher, or of another positive loss.
            value: The objective that hypervolume is measured in, minimised; None where the trial
                did not measure it. Without any value it is the loss.
        """
        row = tuple(int(c) for c in choices)
        self._counted[row] = None
        self._observe(row, log_loss, math.nan if value is None else value, 0.0)

    def tell_stopped(self, choices: Sequence[int], log_loss: float, *, error: float) -> None:
        """Take what a trial that was stopped early was heading for.

        Args:
            choices: What it chose; not proposed again.
            log_loss: Forecast of the natural logarithm of its loss.
            error: Standard deviation of that forecast, beyond that of every trial.
        """
        self._observe(tuple(int(c) for c in choices), log_loss, math.nan, error)

    def tell_failure(self, choices: Sequence[int], *, diverged: bool = True) -> None:
        """Take a trial without a result.

        Args:
            choices: What it chose; not proposed again.
            diverged: Training went wrong, which tells of the policy; a crash tells nothing.
        """
        row = tuple(int(c) for c in choices)
        self._tried[row] = self._counted[row] = None
        if diverged:
            self._failures.append(row)

    def propose(self, rng: np.random.Generator, pending: Sequence[Sequence[int]] = ()) -> Choice:
        """Return the next policy to train: none that was tried or is pending, while there is one.

        Args:
            rng: Source of the draw.
            pending: Policies being trained.
        """
        self._learn()
        running = [tuple(int(c) for c in row) for row in pending]
        is_early = self.n_told < _N_SPREAD
        belief = self._model.mean() if is_early else self._model.draw(rng, scale=_RESHAPED)
        belief = replace(belief, losses=self._monotone(belief.losses))
        price = self._prices(rng)
        candidates = self._within_budgets(belief, self._swept(belief, price, rng))
        known = np.concatenate([self._known_rows(), self._rows(running)])
        taken = {*self._tried, *running}
        if is_early and self._n_objectives:
            best = self._spread(price, candidates, known)
            for row in best:
                found = tuple(map(int, row))
                if found not in taken:
                    return found
        best = self._ranked(belief, price, candidates, known)
        around = neighbours(best[0], self._sizes)
        around = self._feasible(np.concatenate([best, around]))
        for row in self._ranked(belief, price, around, known):
            found = tuple(map(int, row))
            if found not in taken:
                return found
        return self._any_other(best[0], taken, rng)

    def _observe(self, row: Choice, log_loss: float, value: float, noise: float) -> None:
        self._tried[row] = None
        self._choices.append(row)
        self._log_losses.append(float(log_loss))
        self._values.append(float(value))
        self._noise.append(float(noise))

    def _learn(self) -> None:
        n = len(self._choices)
        if n == self._n_learned or n == 0:
            return
        if n >= max(_REFIT_GROWTH * self._n_at_fit, self._n_at_fit + 1):
            self._model.fit(*self._evidence())
            self._n_at_fit = n
        else:
            new = slice(self._n_learned, n)
            y, noise = np.array(self._log_losses[new]), np.array(self._noise[new])
            self._model.update(self._rows(self._choices[new]), y, noise)
        self._n_learned = n

    def _known_rows(self) -> Indices:
        """Return every policy that counts as tried, # shape: (policies, decisions)."""
        new = itertools.islice(self._counted, len(self._known), None)
        self._known = np.concatenate([self._known, self._rows(list(new))])
        return self._known

    def _rows(self, choices: Sequence[Choice]) -> Indices:
        return np.array(choices, dtype=np.int64).reshape(len(choices), len(self.decisions))

    def _evidence(self) -> tuple[Indices, Floats, Floats]:
        """Return the finished trials, and the diverged ones after them as very bad."""
        worst = max(self._log_losses) + _FAILURE_EXCESS
        n_failed = len(self._failures)
        choices = self._rows([*self._choices, *self._failures])
        y = np.array([*self._log_losses, *[worst] * n_failed])
        noise = np.array([*self._noise, *[_FAILURE_EXCESS] * n_failed])
        return choices, y, noise

    def _prices(self, rng: np.random.Generator) -> Floats:
        """Return how the cost figures are weighed into one, shape (figures,)."""
        n_figures = len(self._costs)
        weighed = list(range(self._n_objectives)) or list(self._budgets)
        out = np.zeros(n_figures)
        if not weighed:
            return out
        ranges = (self._costs.max(axis=2) - self._costs.min(axis=2)).sum(axis=1)
        shares = rng.dirichlet(np.ones(len(weighed)))
        out[weighed] = shares / np.maximum(ranges[weighed], _TINY)
        return out

    def _swept(self, belief: Belief, price: Floats, rng: np.random.Generator) -> Indices:
        share = self._model.is_share
        out = np.tile(belief.factors.argmin(axis=1), (1, 1))
        costs = np.tensordot(price, self._costs, axes=1)
        found = sweep(belief.losses[share], costs[share], rng)
        out = np.repeat(out, len(found), axis=0)
        out[:, share] = found
        return out

    def _figures(self, policies: Indices) -> Floats:
        """Return the cost figures of policies, shape (figures, policies)."""
        d = np.arange(len(self.decisions))
        return np.asarray(self._costs[:, d, policies].sum(axis=2))

    def _feasible(self, policies: Indices) -> Indices:
        if not self._budgets:
            return policies
        figures = self._figures(policies)
        keep = np.ones(len(policies), dtype=bool)
        for figure, limit in self._budgets.items():
            keep &= np.array([is_within(cost, limit) for cost in figures[figure]])
        return policies[keep]

    def _within_budgets(self, belief: Belief, policies: Indices) -> Indices:
        """Return those that meet the budgets; where none does, the best policy that does."""
        found = self._feasible(policies)
        if len(found):
            return found
        limits = [([list(d.costs[k]) for d in self.decisions], b) for k, b in self._budgets.items()]
        share = self._model.is_share
        losses = np.where(share[:, None], belief.losses, np.exp(belief.factors))
        rows = [list(losses[d, :n]) for d, n in enumerate(self._sizes)]
        chosen = choose(rows, limits)
        assert chosen is not None, "budgets were checked before the search began"
        return np.array([chosen])

    def _spread(self, price: Floats, policies: Indices, known: Indices) -> Indices:
        """Return policies in the order of their distance from what is known, the furthest first.

        Distance is that of the logarithms of cost: the cheap end is as wide as the dear one.
        """
        costs = np.log(np.maximum(price @ self._figures(policies), _TINY))
        if len(known):
            tried = np.log(np.maximum(price @ self._figures(known), _TINY))
            distance = np.abs(costs[:, None] - tried).min(axis=1)
        else:
            distance = np.abs(costs - costs.mean())
            distance = distance.max() - distance
        return policies[np.argsort(-distance, kind="stable")]

    def _ranked(
        self,
        belief: Belief,
        price: Floats,
        policies: Indices,
        known: Indices,
    ) -> Indices:
        """Return policies in the order of the hypervolume that each would add, the best first."""
        to_value = self._value_of_log_loss()
        values = to_value(self._model.log_loss(belief, policies))
        costs = price @ self._figures(policies)
        known_values = to_value(self._model.log_loss(belief, known)) if len(known) else np.zeros(0)
        known_costs = price @ self._figures(known) if len(known) else np.zeros(0)
        highest = [max(map(float, x), default=0.0) for x in (values, known_values)]
        dearest = float(price @ self._costs.max(axis=2).sum(axis=1))
        corner = np.array([max(highest), dearest]) * 1.0
        corner = corner + 0.1 * np.abs(corner) + _TINY
        gain = improvement(values, costs, known_values, known_costs, corner)
        return policies[np.lexsort((values, -gain))]

    def _value_of_log_loss(self) -> Callable[[Floats], Floats]:
        """Return the map from log loss to the objective: monotone, as the finished trials show."""
        y, v = np.array(self._log_losses), np.array(self._values)
        y, v = y[~np.isnan(v)], v[~np.isnan(v)]
        if len(y) < 2:
            return lambda log_loss: np.exp(log_loss)
        order = np.argsort(y, kind="stable")
        fitted = isotonic_regression(v[order]).x
        return lambda log_loss: np.asarray(np.interp(log_loss, y[order], fitted))

    def _any_other(self, policy: Indices, taken: set[Choice], rng: np.random.Generator) -> Choice:
        """Return a policy near another that is not taken; that one itself where none is found."""
        row = policy.copy()
        for _ in range(_MAX_RANDOM_TRIES):
            d = int(rng.integers(len(self._sizes)))
            row[d] = rng.integers(self._sizes[d])
            found = tuple(map(int, row))
            if found not in taken and len(self._feasible(row[None, :])):
                return found
        return tuple(map(int, policy))
