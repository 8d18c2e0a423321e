"""A Bayesian model of the logarithm of the loss, additive over decisions.

Notation:
    g, c: a decision and its choice; S_gc: predicted loss increase; phi_gc: its features.
    w ~ N(0, diag(tau^2)): deviations from the prediction, tau by family of features.
    y = log KL to the teacher of a trained policy:
        y = a + log sum_g S_gc exp(phi_gc w) + sum_x phi_x w + noise,
    where x runs over the parameters that scale the whole loss, such as a learning rate.
    noise ~ N(0, sigma^2 exp(beta (y - mean y))): it may grow or shrink with the loss.

The prediction is the prior mean, its scale exp(a) is learned, and the sum of choices is positive
and keeps the prediction's order of bits unless the data speak against it. The posterior is
Laplace's: Gauss-Newton steps linearise the logarithm, so that the row of a policy in the regression
is the mean of its features weighted by their share in its loss. The spreads tau and sigma are set
by expectation maximisation on the evidence ([Bishop2006]_, 9.3.4). Between fits a new trial updates
the posterior at the last linearisation.

.. [Bishop2006] Bishop. Pattern Recognition and Machine Learning. Springer, 2006.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.sparse import csr_array

from adq_search.guide._decisions import Decision, Feature, Floats

Indices = NDArray[np.int64]

#: Prior spreads of the families before data speak, in units of log loss.
_SPREADS = {
    "shared": 0.5,
    "group": 0.5,
    "group bits": 0.3,
    "group quantizers": 0.2,
    "momentum": 0.1,
}
_SPREAD_OF_EXTRAS = 0.3
_SPREAD_OF_LEVEL = 5.0
_NOISE = 0.2
#: Pseudo-counts with which the spreads and the noise hold on to their first values.
_HOLD = 5.0
_N_STEPS = 8
#: Trials needed before the noise's dependence on the loss is fitted.
_MIN_FOR_SLOPE = 30


@dataclass(frozen=True, eq=False)
class Belief:
    """One draw from the posterior, or its mean: the loss of every choice.

    Attributes:
        losses: For each decision that predicts a loss, nats, # shape: (decisions, choices)
            Infinite where a decision has fewer choices.
        factors: For the others, the logarithm of what they scale the loss by, likewise.
        level: Logarithm of what everything is scaled by.
    """

    losses: Floats
    factors: Floats
    level: float


class LossModel:
    """What is believed of every decision's share in the loss.

    Args:
        decisions: What is decided, in the order of a policy's indices.
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = tuple(decisions)
        self.is_share: NDArray[np.bool_] = np.array([d.predicted is not None for d in decisions])
        self._width = max(d.n_choices for d in decisions)
        self._features, self._families = _feature_table(self.decisions, self._width)
        self._log_predicted = _log_predictions(self.decisions, self._width)
        n = self._features.shape[1]
        self._spreads = np.array([_first_spread(family) for family in self._families])
        self._noise, self._slope = _NOISE, 0.0
        self._mean = np.zeros(n)
        self._precision = np.diag(self._spreads**-2.0)
        self._moment = np.zeros(n)
        self._at = np.zeros(n)
        self._centre = 0.0

    def fit(self, choices: Indices, y: Floats, noise: Floats) -> None:
        """Learn from trials, spreads and noise included.

        Args:
            choices: What each trial chose, # shape: (trials, decisions)
            y: Logarithm of its loss, # shape: (trials,)
            noise: Known further standard deviation of y, # shape: (trials,)
        """
        spreads = np.array([_first_spread(family) for family in self._families])
        self._slope, sigma = 0.0, _NOISE
        self._centre = float(y.mean())
        at = np.zeros_like(self._mean)
        at[0] = float(np.mean(y - self._values(at, choices)[0]))
        families = list(dict.fromkeys(self._families))
        members = {f: np.array([g == f for g in self._families]) for f in families}
        for _ in range(_N_STEPS):
            value, rows = self._values(at, choices)
            variance = sigma**2 * np.exp(self._slope * (y - self._centre)) + noise**2
            weights = 1.0 / variance
            target = y - value + rows @ at
            precision = (rows * weights[:, None]).T @ rows
            precision[np.diag_indices_from(precision)] += spreads**-2.0
            moment = rows.T @ (weights * target)
            factor = cho_factor(precision, lower=True)
            covariance = cho_solve(factor, np.eye(len(at)))
            at = cho_solve(factor, moment)
            second = at**2 + covariance.diagonal()
            for family, member in members.items():
                if family != "level":
                    first = _first_spread(family)
                    total = second[member].sum() + _HOLD * first**2
                    spreads[member] = np.sqrt(total / (member.sum() + _HOLD))
            residual = y - self._values(at, choices)[0]
            leverage = np.einsum("np,pq,nq->n", rows, covariance, rows, optimize=True)
            # Of what a trial is off by, this share is expected to be its own noise.
            own = sigma**2 * weights
            scaled = own**2 * (residual**2 + leverage) + own * noise**2
            sigma = float(np.sqrt((scaled.sum() + _HOLD * _NOISE**2) / (len(y) + _HOLD)))
        measured = noise == 0.0
        self._slope = _noise_slope(residual[measured], y[measured])
        self._spreads, self._noise, self._at = spreads, sigma, at
        self._precision = np.diag(spreads**-2.0)
        self._moment = np.zeros_like(at)
        self.update(choices, y, noise)

    def update(self, choices: Indices, y: Floats, noise: Floats) -> None:
        """Learn from further trials, spreads and noise as they are; arguments as in `fit`."""
        value, rows = self._values(self._at, choices)
        variance = self._noise**2 * np.exp(self._slope * (y - self._centre)) + noise**2
        weighted = rows / variance[:, None]
        self._precision += weighted.T @ rows
        self._moment += weighted.T @ (y - value + rows @ self._at)
        self._factor = cho_factor(self._precision, lower=True)
        self._mean = cho_solve(self._factor, self._moment)

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm of a typical loss, between equal trials."""
        return self._noise

    @property
    def spreads(self) -> dict[str, float]:
        """Learned prior spread of each family of features."""
        return dict(zip(self._families, map(float, self._spreads), strict=True))

    def mean(self) -> Belief:
        """Return the posterior mean."""
        return self._belief(self._mean)

    def draw(self, rng: np.random.Generator, *, scale: float = 1.0) -> Belief:
        """Return a draw from the posterior.

        Args:
            rng: Source of the draw.
            scale: Of its deviation from the mean: 1 is the posterior, 0 its mean.
        """
        if not hasattr(self, "_factor"):
            self._factor = cho_factor(self._precision, lower=True)
        lower, _ = self._factor
        noise = solve_triangular(lower, rng.standard_normal(len(self._mean)), lower=True, trans="T")
        return self._belief(self._mean + scale * noise)

    def log_loss(self, belief: Belief, choices: Indices) -> Floats:
        """Return the logarithm of the loss of policies, shape (trials,)."""
        d = np.arange(len(self.decisions))
        share, factor = self.is_share, ~self.is_share
        total = belief.losses[d[share], choices[:, share]].sum(axis=1)
        scale = belief.factors[d[factor], choices[:, factor]].sum(axis=1)
        return np.asarray(belief.level + np.log(total) + scale)

    def _belief(self, w: Floats) -> Belief:
        moved = (self._features[:, 1:] @ w[1:]).reshape(len(self.decisions), self._width)
        losses = np.exp(self._log_predicted + np.where(self.is_share[:, None], moved, 0.0))
        losses = np.where(np.isnan(losses), np.inf, losses)
        factors = np.where(np.isnan(self._log_predicted), np.inf, moved)
        return Belief(losses, factors, float(w[0]))

    def _values(self, w: Floats, choices: Indices) -> tuple[Floats, Floats]:
        """Return the predicted y of policies, and its derivatives in w, shape (trials, p)."""
        n, n_decisions = choices.shape
        flat = choices + np.arange(n_decisions) * self._width
        moved = (self._features @ w)[flat]
        share = self.is_share
        logs = self._log_predicted.ravel()[flat[:, share]] + moved[:, share]
        top = logs.max(axis=1, keepdims=True)
        parts = np.exp(logs - top)
        total = parts.sum(axis=1, keepdims=True)
        weights = np.ones((n, n_decisions))
        weights[:, share] = parts / total
        value = w[0] + (top + np.log(total))[:, 0] + moved[:, ~share].sum(axis=1)
        pick = csr_array(
            (weights.ravel(), flat.ravel(), np.arange(0, flat.size + 1, n_decisions)),
            shape=(n, n_decisions * self._width),
        )
        rows = np.asarray((pick @ self._features).todense())
        rows[:, 0] = 1.0
        return value, rows


def _first_spread(family: str) -> float:
    if family == "level":
        return _SPREAD_OF_LEVEL
    return _SPREADS.get(family, _SPREAD_OF_EXTRAS)


def _feature_table(decisions: Sequence[Decision], width: int) -> tuple[csr_array, tuple[str, ...]]:
    """Return the features of every choice, a row each; the first column is the level's, empty."""
    number: dict[Feature, int] = {("level", ""): 0}
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for d, decision in enumerate(decisions):
        for c, features in enumerate(decision.features):
            for feature, value in features.items():
                rows.append(d * width + c)
                columns.append(number.setdefault(feature, len(number)))
                values.append(value)
    shape = (len(decisions) * width, len(number))
    return csr_array((values, (rows, columns)), shape=shape), tuple(f for f, _ in number)


def _log_predictions(decisions: Sequence[Decision], width: int) -> Floats:
    """Return log S, # shape: (decisions, width); NaN where there is no such choice.

    A predicted loss of zero is taken for a thousandth of the least predicted total: a logarithm
    needs it, and no layer is free of loss.
    """
    out = np.full((len(decisions), width), np.nan)
    shares = [d.predicted for d in decisions if d.predicted is not None]
    total = sum(float(s.min()) for s in shares)
    positive = [float(v) for s in shares for v in s if v > 0.0]
    floor = 1e-3 * (total or min(positive, default=1.0)) / max(len(shares), 1)
    for d, decision in enumerate(decisions):
        if decision.predicted is None:
            out[d, : decision.n_choices] = 0.0
        else:
            out[d, : decision.n_choices] = np.log(np.maximum(decision.predicted, floor))
    return out


def _noise_slope(residual: Floats, level: Floats) -> float:
    """Return beta: the slope of log squared residuals, drawn to zero by few trials."""
    if len(residual) < _MIN_FOR_SLOPE:
        return 0.0
    level = level - level.mean()
    spread = float(level @ level)
    if spread == 0.0:
        return 0.0
    logs = np.log(residual**2 + 1e-6)
    # A log squared normal has variance pi^2 / 2; the slope's prior is N(0, 0.5^2).
    return float(level @ (logs - logs.mean()) / (spread + 0.5 * np.pi**2 / 0.25))
