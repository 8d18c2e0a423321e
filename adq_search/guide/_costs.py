"""Costs learned from finished trials, where nobody says what a choice costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from adq_search.guide._candidates import Indices
from adq_search.guide._decisions import Decision, Feature, Floats, Rows

#: Prior standard deviations: of the guess's common price, of each group's price beside it, of a
#: feature's cost, and of a single choice's own; in units of the guess's range over one group.
_COMMON, _GROUP, _FEATURE, _OWN = 3.0, 1.0, 0.1, 0.05
#: Standard deviation of what no sum over decisions explains, in the same units.
_RESIDUAL = 0.02


def learned_costs(
    decisions: Sequence[Decision], guess: Rows, choices: Indices, values: Floats
) -> Rows:
    """Return rows of costs whose sums come nearest to the values seen (ridge regression).

    A group's costs are believed to be the guess times a price of its own near a common one, plus
    smaller amounts for each feature and each choice: so choices never seen are priced too.

    Args:
        decisions: Whose choices are priced.
        guess: What costs go like, such as products of bits; any scale.
        choices: What finished trials chose, # shape: (trials, decisions)
        values: What they cost, # shape: (trials,)
    """
    unit = float(np.mean([np.ptp(row) for row in guess])) or 1.0
    scaled = [row / unit for row in guess]
    tables = [_regressors(d, g) for d, g in zip(decisions, scaled, strict=True)]
    total = sum(row[choices[:, d]] for d, row in enumerate(scaled))
    rows = np.concatenate([t[choices[:, d]] for d, t in enumerate(tables)], axis=1)
    rows = np.concatenate([_COMMON * np.reshape(total, (-1, 1)), rows], axis=1)
    centre, middle = float(values.mean()), rows.mean(axis=0)
    size = float(values.std() / (np.std(total) or 1.0)) or 1.0
    rows = rows - middle
    gram = rows @ rows.T
    gram[np.diag_indices_from(gram)] += _RESIDUAL**2
    found = size * (rows.T @ cho_solve(cho_factor(gram), (values - centre) / size))
    ends = np.cumsum([1, *(t.shape[1] for t in tables)])
    coefficients = np.split(found, ends[:-1])
    constant = (centre - float(middle @ found)) / len(decisions)
    return tuple(
        _COMMON * g * found[0] + t @ c + constant
        for g, t, c in zip(scaled, tables, coefficients[1:], strict=True)
    )


def _regressors(decision: Decision, guess: Floats) -> Floats:
    """Return the regressors of every choice, shape (choices, regressors)."""
    number: dict[Feature, int] = {}
    for features in decision.features:
        for feature in features:
            number.setdefault(feature, len(number))
    table = np.zeros((decision.n_choices, len(number)))
    for c, features in enumerate(decision.features):
        for feature, value in features.items():
            table[c, number[feature]] = value
    own = np.eye(decision.n_choices)
    return np.concatenate([_GROUP * guess[:, None], _FEATURE * table, _OWN * own], axis=1)
