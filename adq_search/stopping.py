"""When to stop: a search that no longer grows, and how often a stopped trial was stopped wrongly.

Notation:
    v_t: objectives of trial t, t = 1 .. n in the order of the search; H(v_1 .. v_t): hypervolume
        of the first t up to a fixed reference point.
    growth = H(v_1 .. v_n) - H(v_1 .. v_(n - patience))
    error = standard deviation over draws of H(v_1 + e_1 .. v_n + e_n), e_t: what equal trainings
        differ by (a parametric bootstrap).

The search ends where growth < errors * error: improvement below statistical error, the rule of
[Makarova2022]_ with the hypervolume in place of a regret bound.

Where the noise is not given it comes from replicates, else from the guide's model of log KL: its
residual deviation sigma, carried over to the objective by the monotone curve f through the trials'
(log KL, value), and what they scatter about that curve,
    e = f(y + sigma z) - f(y) + s z',   z, z' ~ N(0, 1).
Sigma holds what the model cannot fit, too; that ends a search sooner, not later.

.. [Makarova2022] Makarova et al. Automatic termination for hyperparameter optimization. AutoML,
   2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from adq_search.guide import LossModel, decisions_of
from adq_search.job import MEASURED, StopSettings
from adq_search.pareto import Direction, hypervolume, non_dominated
from adq_search.plan import Plan
from adq_search.policy import Policy
from adq_search.replicates import spread_of
from adq_search.space import SearchSpace
from adq_search.trial import TrialResult

Floats = NDArray[np.float64]

_N_DRAWS = 200
#: The reference point lies this share of the range beyond the worst value.
_MARGIN = 0.1
#: Fewest complete trials that the noise is learned from.
_LEAST = 10


@dataclass(frozen=True, slots=True)
class FalseStops:
    """What became of trials that were condemned, but allowed to finish.

    Attributes:
        n_condemned: Trials that a rung condemned.
        n_spared: Those of them that ran on, and have finished.
        n_on_front: Those of them that are on the study's front now.
    """

    n_condemned: int
    n_spared: int
    n_on_front: int

    @property
    def rate(self) -> float:
        """Share of the spared trials that stopping would have taken off the front; NaN of none."""
        return self.n_on_front / self.n_spared if self.n_spared else math.nan


@dataclass(frozen=True, slots=True)
class SearchEnd:
    """Why a search ended before its last trial.

    Attributes:
        n_trials: Policies measured then.
        patience: Trials over which growth was taken.
        growth: Growth of the hypervolume in them, a share of it.
        error: Standard error of the hypervolume, likewise.
        noise: Standard deviation of the measured objective between equal trainings, median over
            trials, in its own unit.
    """

    n_trials: int
    patience: int
    growth: float
    error: float
    noise: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def settled(
    plan: Plan,
    results: Sequence[TrialResult],
    replicates: Mapping[Policy, Sequence[TrialResult]] | None = None,
) -> SearchEnd | None:
    """Judge by the job's stop rule; None where the search should go on, or has no rule.

    It is never stopped before twice its patience. The answer follows from the arguments and the
    job's seed alone, so all workers of a study agree.

    Args:
        plan: The job.
        results: What was measured so far, in the order of the search.
        replicates: Further trainings of policies with other seeds, if there are any.
    """
    settings = plan.job.search.stop
    if settings is None or len(results) < 2 * settings.patience:
        return None
    complete = [r for r in results if r.state == "complete"]
    earlier = [r for r in results[: -settings.patience] if r.state == "complete"]
    if len(earlier) < _LEAST:
        return None
    objectives = plan.job.search.axes
    directions = [o.direction for o in objectives]
    values = np.array([plan.values(r) for r in complete])
    rng = np.random.default_rng([plan.job.search.seed, len(results)])
    position = next(i for i, o in enumerate(objectives) if o.name in MEASURED)
    deviations = _noise(plan, settings, complete, values[:, position], replicates or {}, rng)
    drawn = np.repeat(values[None], _N_DRAWS, axis=0)
    drawn[..., position] += deviations
    growth, error = growth_and_error(values, drawn, len(earlier), directions)
    if growth >= settings.errors * error:
        return None
    noise = float(np.median(deviations.std(axis=0)))
    return SearchEnd(len(results), settings.patience, growth, error, noise)


def growth_and_error(
    values: Floats, drawn: Floats, n_earlier: int, directions: Sequence[Direction]
) -> tuple[float, float]:
    """Return by how much the later trials have grown the hypervolume, and its standard error.

    Both are shares of the hypervolume of all trials. Its reference point lies a tenth of the range
    beyond the worst values.

    Args:
        values: In order, # shape: (trials, objectives)
        drawn: The same with other noise, # shape: (draws, trials, objectives)
        n_earlier: How many of the trials are the earlier ones.
        directions: Of the objectives.
    """
    signs = np.array([-1.0 if d == "maximize" else 1.0 for d in directions])
    losses = values * signs
    worst, spread = losses.max(axis=0), np.ptp(losses, axis=0)
    # A constant objective has a reference point beyond it, too.
    corner = signs * (worst + _MARGIN * np.where(spread > 0.0, spread, np.abs(worst) + 1e-12))

    def volume(points: Floats, is_on_front: NDArray[np.bool_]) -> float:
        return hypervolume(list(points[is_on_front]), directions, corner)

    now, before = (volume(v, non_dominated(v, directions)) for v in (values, values[:n_earlier]))
    drawn = drawn[:, _ever_on_front(drawn * signs)]
    fronts = non_dominated(drawn, directions)
    error = float(np.std([volume(v, front) for v, front in zip(drawn, fronts, strict=True)]))
    return (now - before) / now, error / now


def _ever_on_front(losses: Floats) -> NDArray[np.bool_]:
    """Return which trials may be on the front of some draw: no other's worst beats their best.

    Args:
        losses: # shape: (draws, trials, objectives)
    """
    best, worst = losses.min(axis=0), losses.max(axis=0)
    worst = worst[non_dominated(worst, ["minimize"] * worst.shape[1])]
    is_beaten = (worst <= best[:, None]).all(axis=2) & (worst < best[:, None]).any(axis=2)
    return np.asarray(np.logical_not(is_beaten.any(axis=1)))


def _noise(
    plan: Plan,
    settings: StopSettings,
    complete: Sequence[TrialResult],
    values: Floats,
    replicates: Mapping[Policy, Sequence[TrialResult]],
    rng: np.random.Generator,
) -> Floats:
    """Draw what equal trainings differ by, # shape: (draws, trials)."""
    z, scatter = rng.standard_normal((2, _N_DRAWS, len(complete)))
    known = settings.noise or _replicated_noise(plan, replicates)
    if known is not None:
        return np.asarray(known * z)
    y = np.log([max(r.kl or 0.0, 1e-12) for r in complete])
    model = LossModel(decisions_of(plan.space))
    model.fit(_indices(plan.space, [r.policy for r in complete]), y, np.zeros_like(y))
    order = np.argsort(y, kind="stable")
    is_rising = bool(np.corrcoef(y, values)[0, 1] > 0.0) if np.ptp(values) > 0.0 else True
    curve = isotonic_regression(values[order], increasing=is_rising).x

    def value_at(log_kl: Floats) -> Floats:
        return np.asarray(np.interp(log_kl, y[order], curve))

    off_curve = float(np.std(values - value_at(y)))
    return np.asarray(value_at(y + model.noise * z) - value_at(y) + off_curve * scatter)


def _replicated_noise(
    plan: Plan, replicates: Mapping[Policy, Sequence[TrialResult]]
) -> float | None:
    """Return the pooled deviation of replicates, None where they tell of none."""
    axes = plan.job.search.axes
    position = next(i for i, o in enumerate(axes) if o.name in MEASURED)
    runs = [
        [plan.values(r) for r in of_policy if r.state == "complete"]
        for of_policy in replicates.values()
    ]
    spread = spread_of(runs, [o.direction for o in axes], seed=0)
    found = float(spread.deviations[position])
    return found if found > 0.0 else None


def _indices(space: SearchSpace, policies: Sequence[Policy]) -> NDArray[np.int64]:
    """Return which choice of each group each policy takes, # shape: (policies, groups)."""
    places = [(g.layers[0], {p: i for i, p in enumerate(g.choices)}) for g in space.groups]
    rows = [[at[policy[layer]] for layer, at in places] for policy in policies]
    return np.array(rows, dtype=np.int64).reshape(len(policies), len(places))
