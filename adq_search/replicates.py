"""How sure a front is: its policies trained again with new seeds.

A search keeps what measured best, and of many noisy measurements the best ones are too good. So
each policy of the front is trained again, and judged by the new trainings alone.

Notation:
    x_ir: objectives of policy i in its r-th new training, # shape: (objectives,)
    n_i: how many of them completed; a cost is known, so it is the same in all.
    m_i: their mean.
    S = sum_ir (x_ir - m_i)(x_ir - m_i)^T / nu,  nu = sum_i (n_i - 1): covariance of one training,
        pooled over the policies, since two or three trainings of one tell little of it.

    standard error of m_i:  sqrt(diag(S) / n_i)

With normal errors of one covariance and no prior knowledge, what the policies truly reach is
distributed about the means as ([Gelman2013]_, 3.2 and 3.6, with S for its form)
    theta_i = m_i + sqrt(nu / c) z_i,   z_i ~ N(0, S / n_i),   c ~ chi^2(nu),
one c for all. The probability that policy i is not dominated is the share of draws in which no
theta_j dominates theta_i. Of two policies at equal cost it is Student's
    P(theta_1 > theta_2) = T_nu((m_1 - m_2) / sqrt(S (1 / n_1 + 1 / n_2))).

.. [Gelman2013] Gelman et al. Bayesian Data Analysis. Third edition, 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_search.pareto import Direction, non_dominated

Floats = NDArray[np.float64]

#: Draws; they leave a probability uncertain by at most 0.005.
_N_DRAWS = 10_000


@dataclass(frozen=True, eq=False)
class Spread:
    """What new trainings say of some policies.

    Attributes:
        means: m, # shape: (policies, objectives); NaN where no training completed.
        errors: Standard errors of the means, likewise; NaN where nothing tells of the spread.
        deviations: Standard deviations of one training, sqrt(diag(S)), # shape: (objectives,)
        probabilities: That no other of the policies dominates it, # shape: (policies,); 0 where no
            training completed.
    """

    means: Floats
    errors: Floats
    deviations: Floats
    probabilities: Floats


def spread_of(
    measured: Sequence[Sequence[Sequence[float]]], directions: Sequence[Direction], *, seed: int
) -> Spread:
    """Judge policies by what their new trainings measured.

    Where no policy has two completed trainings the spread is unknown: errors are NaN, and the means
    are taken as they are.

    Args:
        measured: For each policy, the objectives of each of its completed trainings.
        directions: Of the objectives.
        seed: Of the draws.
    """
    k, m = len(measured), len(directions)
    runs = [np.array(of_policy, dtype=np.float64).reshape(-1, m) for of_policy in measured]
    n = np.array([len(of_policy) for of_policy in runs])
    means = np.full((k, m), np.nan)
    for i in np.flatnonzero(n):
        means[i] = runs[i].mean(axis=0)
    freedom = int((n[n > 0] - 1).sum())
    if freedom == 0:
        unknown = np.full(m, np.nan)
        shares = non_dominated(means, directions).astype(np.float64)
        return Spread(means, np.full((k, m), np.nan), unknown, shares)
    left = np.concatenate([runs[i] - means[i] for i in np.flatnonzero(n)])
    covariance = left.T @ left / freedom
    deviations = np.sqrt(np.diag(covariance))
    per_root_n = 1.0 / np.sqrt(np.where(n > 0, n, np.nan))
    errors = deviations * per_root_n[:, None]
    rng = np.random.default_rng(seed)
    z = rng.multivariate_normal(np.zeros(m), covariance, (_N_DRAWS, k), method="eigh")
    c = rng.chisquare(freedom, _N_DRAWS)
    # In place of a cost's covariance, zero but for rounding, exactly zero: ties stay ties.
    z[..., deviations <= 1e-12 * np.nanmax(np.abs(means), axis=0)] = 0.0
    drawn = means + np.sqrt(freedom / c)[:, None, None] * z * per_root_n[:, None]
    shares = non_dominated(drawn, directions).mean(axis=0)
    return Spread(means, errors, deviations, shares)
