"""The bounds of results/search_efficiency/pruned.py: what an oracle stops, what hindsight keeps."""

import importlib
import itertools
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from adq_search.pareto import hypervolume

FOLDER = Path(__file__).parent.parent / "results" / "search_efficiency"
DIRECTIONS = ("maximize", "minimize")


@pytest.fixture(scope="module")
def oracles():
    """A script of a folder that is no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("oracles")
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("oracles", None)


@pytest.mark.parametrize("directions", [DIRECTIONS, ("minimize", "minimize")])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_hindsight_is_the_best_of_all_subsets(oracles, directions, n):
    rng = np.random.default_rng(n)
    points = [tuple(p) for p in rng.uniform(0.0, 1.0, (9, 2))]
    reference = (0.2 if directions[0] == "maximize" else 0.8, 0.9)
    best = max(
        hypervolume(some, directions, reference) for some in itertools.combinations(points, n)
    )
    found = oracles.hindsight_volume(points, n, directions, reference)
    assert found == pytest.approx(best, abs=1e-12)


def test_hindsight_of_points_beyond_the_reference_is_nothing(oracles):
    assert oracles.hindsight_volume([(0.1, 2.0)], 3, DIRECTIONS, (0.0, 1.0)) == 0.0


def stops(oracle, points):
    return [oracle.stops_after(None, SimpleNamespace(point=p)) for p in points]


def test_an_oracle_stops_what_a_finished_trial_dominates(oracles):
    volume = partial(hypervolume, directions=DIRECTIONS, reference=(0.0, 1.0))
    oracle = oracles.Oracle(volume, share=0.0)
    points = [(0.5, 0.5), (0.4, 0.6), (0.4, 0.4), (0.45, 0.45), (0.44, 0.46)]
    assert stops(oracle, points) == [None, 1, None, None, 1]


def test_an_oracle_by_gain_stops_what_adds_less_than_the_last_ones(oracles):
    volume = partial(hypervolume, directions=DIRECTIONS, reference=(0.0, 1.0))
    steps = [(0.1 * i, 0.1 * i) for i in range(1, 10)]  # each adds to the others
    oracle = oracles.Oracle(volume, share=1.0)
    assert stops(oracle, [*steps, (0.05, 0.05)]) == [None] * 10
    assert stops(oracle, [(0.951, 0.95), (1.0, 0.951)]) == [1, 1]
