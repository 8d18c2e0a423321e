"""What a trial may still become, told from where others stood at the same epoch and how they ended.

Notation:
    s: a trial's score at a rung, such as its training loss after two epochs.
    f: its value at the end, smaller being better.

Among the finished trials that stood nearest to s, f is a straight line in s, and what it leaves
over is noise. The optimistic end is the line at s, less a quantile of the noise. Scores need not
be in the unit of the value. Positive ones, as losses are, enter by their logarithm: they fall by
factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from adq_search.guide._decisions import Floats

#: Fewest finished trials that tell anything.
MIN_FINISHED = 8
#: The line is fitted to this share of the finished trials, the nearest ones.
_NEAREST = 0.5


@dataclass(frozen=True, slots=True)
class Forecast:
    """How an unfinished trial is expected to end.

    Attributes:
        end: Its expected value at the end.
        error: Standard deviation of what that may be off by.
        freedom: Degrees of freedom that the error is estimated with.
    """

    end: float
    error: float
    freedom: int

    def at_best(self, confidence: float) -> float:
        """Return the value that the end will not be below, with a confidence of 0.5 to 1."""
        return float(self.end - stdtrit(self.freedom, confidence) * self.error)


def forecast_end(scores: Floats, ends: Floats, score: float) -> Forecast | None:
    """Return how a trial is expected to end; None where fewer than `MIN_FINISHED` have finished.

    Args:
        scores: Finished trials' scores at the rung, smaller being better, # shape: (trials,)
        ends: Their values at the end, likewise, # shape: (trials,)
        score: The unfinished trial's score at the rung.
    """
    usable = np.isfinite(scores) & np.isfinite(ends)
    scores, ends = scores[usable], ends[usable]
    n = len(scores)
    if n < MIN_FINISHED or not np.isfinite(score):
        return None
    if min(score, scores.min()) > 0.0:
        scores, score = np.log(scores), math.log(score)
    n_near = max(MIN_FINISHED, round(_NEAREST * n))
    near = np.argsort(np.abs(scores - score), kind="stable")[:n_near]
    x, y = scores[near], ends[near]
    middle, spread = x.mean(), float(((x - x.mean()) ** 2).sum())
    # A better score never forecasts a worse end.
    slope = max(float((x - middle) @ y) / spread, 0.0) if spread > 0.0 else 0.0
    residual = y - y.mean() - slope * (x - middle)
    leverage = (score - middle) ** 2 / spread if spread > 0.0 else 0.0
    variance = float(residual @ residual) / (n_near - 2) * (1.0 + 1.0 / n_near + leverage)
    end = float(y.mean()) + slope * (score - middle)
    return Forecast(float(end), float(np.sqrt(variance)), n_near - 2)
