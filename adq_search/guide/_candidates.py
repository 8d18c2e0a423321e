"""From a believed loss of every choice to the policies worth training.

Notation:
    L_gc: believed loss of choice c of decision g; K_gc: its cost; lambda: price of cost in loss.

Both add up over decisions, so argmin_c L_gc + lambda K_gc, decision by decision, is a policy that
no other beats at that price: a point of the front of the belief. One sweep of lambda walks along
that whole front ([Kellerer2004]_, chapter 11; see `adq_search.knapsack`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adq_search.guide._decisions import Decision, Floats

Indices = NDArray[np.int64]

#: Prices a sweep tries, and how far they reach from the typical ratio of loss to cost.
_N_PRICES = 128
_REACH = (1e-6, 1e3)


class Monotone:
    """Makes a table of losses fall along every chain of rising bits.

    Along one line of bits that is the mean of the largest falling sequence below the losses and
    the smallest one above. Losses that fall already stay as they are.

    Args:
        decisions: Whose choices the table holds.
        width: Columns of the table.
    """

    def __init__(self, decisions: Sequence[Decision], width: int) -> None:
        by_pass: dict[tuple[int, int], list[list[int]]] = {}
        for d, decision in enumerate(decisions):
            used: list[set[int]] = []
            for chain in decision.chains:
                # Chains that share a choice go to different passes.
                turn = next((i for i, u in enumerate(used) if not u & set(chain)), len(used))
                if turn == len(used):
                    used.append(set())
                used[turn] |= set(chain)
                line = [d * width + c for c in chain]
                by_pass.setdefault((turn, len(chain)), []).append(line)
        self._passes = [np.array(by_pass[key]) for key in sorted(by_pass)]

    def __call__(self, losses: Floats) -> Floats:
        """Return the losses made falling, shape as given."""
        below, above = losses.copy(), losses.copy()
        flat_below, flat_above = below.reshape(-1), above.reshape(-1)
        for lines in self._passes:
            flat_below[lines] = np.minimum.accumulate(flat_below[lines], axis=1)
            rising = flat_above[lines][:, ::-1]
            flat_above[lines] = np.maximum.accumulate(rising, axis=1)[:, ::-1]
        return np.asarray(0.5 * (below + above))


def sweep(losses: Floats, costs: Floats, rng: np.random.Generator) -> Indices:
    """Return policies along the front of a belief, each once.

    Args:
        losses: L, infinite where there is no choice, # shape: (decisions, choices)
        costs: K, # shape: (decisions, choices)
        rng: Shifts the prices, so that sweeps differ.

    Returns:
        One choice for each decision, # shape: (policies, decisions)
    """
    exists = np.isfinite(losses)
    reach = np.where(exists, losses, -np.inf).max(axis=1) - losses.min(axis=1)
    spent = np.where(exists, costs, -np.inf).max(axis=1)
    spent = spent - np.where(exists, costs, np.inf).min(axis=1)
    if not spent.sum() > 0.0:
        return np.asarray(losses.argmin(axis=1)[None, :])
    typical = max(float(reach.sum()), 1e-300) / float(spent.sum())
    low, high = np.log(_REACH)
    exponents = np.linspace(low, high, _N_PRICES)
    exponents = exponents + rng.uniform(0.0, exponents[1] - exponents[0])
    prices = np.concatenate([[0.0], typical * np.exp(exponents)])
    # A price of zero still prefers the cheaper of equally good choices.
    prices[0] = prices[1] * 1e-3
    priced = losses[None] + prices[:, None, None] * costs[None]
    chosen = priced.argmin(axis=2)
    return np.asarray(chosen[np.r_[True, np.any(np.diff(chosen, axis=0), axis=1)]])


def neighbours(policy: Indices, sizes: Indices) -> Indices:
    """Return every policy that differs from one in a single decision, shape (n, decisions)."""
    out = []
    for d, size in enumerate(sizes):
        rows = np.repeat(policy[None, :], size - 1, axis=0)
        rows[:, d] = np.delete(np.arange(size), policy[d])
        out.append(rows)
    return np.concatenate(out)


def improvement(
    values: Floats, costs: Floats, known_values: Floats, known_costs: Floats, corner: Floats
) -> Floats:
    """Return by how much each candidate alone would raise the hypervolume of what is known.

    Args:
        values: Candidates' losses, # shape: (n,)
        costs: Candidates' costs, # shape: (n,)
        known_values: Losses of policies known already, # shape: (m,)
        known_costs: Their costs, # shape: (m,)
        corner: Reference point: loss, cost.

    Returns:
        Areas, # shape: (n,)
    """
    order = np.argsort(known_costs, kind="stable")
    edges = np.minimum(known_costs[order], corner[1])
    best = np.minimum(np.minimum.accumulate(known_values[order]), corner[0])
    falls = np.r_[True, np.diff(best) < 0.0] if len(best) else np.zeros(0, dtype=bool)
    edges, best = edges[falls], best[falls]
    left = np.r_[-np.inf, edges]
    right = np.r_[edges, corner[1]]
    level = np.r_[corner[0], best]
    wide = np.clip(right - np.maximum(left, costs[:, None]), 0.0, None)
    high = np.clip(level - values[:, None], 0.0, None)
    return np.asarray((wide * high).sum(axis=1))
