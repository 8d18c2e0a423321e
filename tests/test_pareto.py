import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_search.pareto import dominates, front_indices, hypervolume

coordinate = st.integers(0, 4).map(float)
directions = st.lists(st.sampled_from(["maximize", "minimize"]), min_size=1, max_size=3)
problems = directions.flatmap(
    lambda d: st.tuples(st.just(d), st.lists(st.tuples(*[coordinate] * len(d)), max_size=12))
)


def slowly_dominates(a, b, directions):
    better = [x > y if d == "maximize" else x < y for x, y, d in zip(a, b, directions)]
    worse = [x < y if d == "maximize" else x > y for x, y, d in zip(a, b, directions)]
    return any(better) and not any(worse)


@given(problems)
def test_front_agrees_with_brute_force_on_ties_and_duplicates(problem):
    directions, points = problem
    expected = [
        i
        for i, p in enumerate(points)
        if not any(slowly_dominates(q, p, directions) for q in points)
    ]
    assert front_indices(points, directions) == expected


@given(problems)
def test_dominance_is_irreflexive_and_agrees_with_brute_force(problem):
    directions, points = problem
    for a, b in itertools.product(points, repeat=2):
        assert dominates(a, b, directions) == slowly_dominates(a, b, directions)
        assert not (dominates(a, b, directions) and dominates(b, a, directions))


@given(problems)
def test_hypervolume_counts_unit_cells(problem):
    """On integer points the volume is the number of unit cells that some point dominates."""
    directions, points = problem
    reference = [-1.0 if d == "maximize" else 5.0 for d in directions]
    losses = [[-x if d == "maximize" else x for x, d in zip(p, directions)] for p in points]
    corner = [-r if d == "maximize" else r for r, d in zip(reference, directions)]
    cells = itertools.product(
        *[
            np.arange(-4, c) if d == "maximize" else np.arange(0, c)
            for c, d in zip(corner, directions)
        ]
    )
    covered = sum(any(all(x <= c for x, c in zip(p, cell)) for p in losses) for cell in cells)
    assert hypervolume(points, directions, reference) == pytest.approx(covered)


def test_points_with_nan_are_never_on_the_front():
    points = [(0.9, 5.0), (float("nan"), 1.0), (0.8, 2.0)]
    assert front_indices(points, ["maximize", "minimize"]) == [0, 2]


def test_no_points_make_no_front_and_no_volume():
    assert front_indices([], ["maximize", "minimize"]) == []
    assert hypervolume([], ["maximize", "minimize"], (0.0, 1.0)) == 0.0
