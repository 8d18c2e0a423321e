"""What pruners could save if they knew how trials end: bounds for `pruned.py`.

After its first epoch a trial is stopped that, by what it would come to without noise,
    dominated: adds no hypervolume to the trials that finished;
    gain: adds less than the last ten trials would have, on average.
The sampler is told what a stopped trial would have come to, as if it had been trained to the end.

Hindsight: a search that trains every trial to its end is looked at when it is over. Of the trials
it began with, as many are kept as could have been finished within half of the epochs, were all
others stopped after one epoch (two, three): those that are worth most together. How many it began
with is chosen for the best as well. A pruner that knew less could only do better by making the
sampler propose something else.
"""

import statistics

import numpy as np

RECENT = 10


class Oracle:
    """Stops what adds too little, after one epoch.

    Args:
        volume: Hypervolume of points.
        share: How much a trial must add, as a share of what the last ones would have added.
    """

    tells_ends = True

    def __init__(self, volume, *, share):
        self.volume, self._share = volume, share
        self._points, self._gains = [], []

    def stops_after(self, trial, training):
        """Return 1 for a trial that is stopped, None for one that finishes."""
        points = [*self._points, training.point]
        gain = self.volume(points) - self.volume(self._points)
        usual = statistics.mean(self._gains[-RECENT:]) if len(self._gains) >= RECENT else 0.0
        self._gains.append(gain)
        if gain <= self._share * usual:
            return 1
        self._points = points
        return None

    def false_stops(self, study):
        """Return nothing: there are none."""


def hindsight_volume(points, n, directions, reference):
    """Return the largest hypervolume of any n of the points; exact, of two objectives.

    Notation: points by rising cost c, of height h above the reference, whose cost is C.
    V_1(i) = h_i (C - c_i) and V_n(i) = max_{j > i} h_i (c_j - c_i) + V_{n-1}(j) is the largest
    volume of n points whose cheapest is i.

    Args:
        points: What is measured, and a cost.
        n: How many to choose.
        directions: Of both.
        reference: Of the hypervolume.
    """
    signs = np.array([1.0 if d == "maximize" else -1.0 for d in directions])
    gains = (np.array(points) - reference) * signs
    gains = gains[(gains > 0.0).all(axis=1)]
    height, room = gains[np.argsort(-gains[:, 1], kind="stable")].T  # room: C - c
    wins = np.where(np.triu(np.ones((len(height),) * 2), k=1) > 0.0, room[:, None] - room, -np.inf)
    alone = best = height * room
    for _ in range(n - 1):
        best = np.maximum(alone, (height[:, None] * wins + best).max(axis=1, initial=-np.inf))
    return float(best.max(initial=0.0))
