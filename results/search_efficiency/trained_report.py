"""Tables and figures of `trained.py`, at any time of its run: hypervolume by trials and by seconds.

Usage: python results/search_efficiency/trained_report.py [--job deep_digits] [--folder trained]

The hypervolume of accuracy and energy reaches from chance and the dearest policy; it is given as a
share of that of everything measured under the same seed. "Found" takes the accuracies that the
search saw. "Trained again" takes the policies of the found front, and the mean of their accuracies
over fresh training seeds: what the front is worth without the luck of the draw. Its share is of
all policies that were trained again under the same seed. "On test" takes the found front's
accuracies on the test part, which no search has seen.

Writes trained.md, trained.json, trained_trials.svg and trained_seconds.svg, or the same of
trained_mnist5k.
"""

import argparse
import itertools
import json
import statistics
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

from figures import COLOURS, colour_of, draw
from fronts import (
    DIRECTIONS,
    HERE,
    JOBS,
    MARKS,
    clock_of,
    folder_of,
    front_of,
    label,
    read_retrained,
    read_searches,
    rows_of,
    seconds_of,
)

from adq_search.pareto import hypervolume
from adq_search.provenance import provenance

CHANCE = 0.1
#: What each target compares: ours at a number of trials with rivals at another.
TARGETS = ((40, False, 400), (60, True, 240))
OURS = ("guide", True)
#: Seconds at which found fronts are compared.
MARKS_S = (20, 40, 80, 160)


class Volumes:
    """Hypervolumes of one search seed, as shares.

    Args:
        folder: Of `trained.py`.
        seed: Of the searches.
        searches: Those of the seed.
    """

    def __init__(self, folder, seed, searches):
        self.searches = {(f.search.sampler, f.search.is_seeded): f for f in searches}
        prepared = json.loads((folder / f"prepared_{seed}.json").read_text())
        self.n_seeds = len(prepared["seeds"])
        self.n_dimensions = prepared["n_dimensions"]
        self.prepare_s = seconds_of(prepared)
        dearest = prepared["energy_range_pj"][1]
        self._corner = (CHANCE, dearest)
        trainings = rows_of(folder / f"trainings_{seed}.csv")
        self.clock = clock_of(trainings[0])
        self.train_s = statistics.fmean(map(seconds_of, trainings))
        self.test = {r["policy"]: float(r["test_accuracy"]) for r in trainings}
        self.again = read_retrained(folder, seed)
        self._all = self._volume([p for f in searches for p in f.points])
        energy = {p: e for f in searches for p, (_, e) in zip(f.policies, f.points, strict=True)}
        means = [(statistics.fmean(a), energy[p]) for p, a in self.again.items()]
        self._all_again = self._volume(means)
        self._all_test = self._volume([(a, energy[p]) for p, a in self.test.items() if p in energy])

    def n_done(self, key):
        """Return how many trials a search has finished."""
        return len(self.searches[key].points)

    def found(self, key, n):
        """Return the share of a search's first n trials."""
        return self._volume(self.searches[key].points[:n]) / self._all

    def curve(self, key):
        """Return the shares of a search after each trial."""
        points = self.searches[key].points
        shares, front = [], []
        for point in points:
            front = [*front, point]
            front = [front[i] for i in front_of(front)]
            shares.append(self._volume(front) / self._all)
        return shares

    def ends(self, key):
        """Return the seconds that a search has taken after each trial, preparation included."""
        suggest_s = self.searches[key].suggest_s
        spent = itertools.accumulate(s + self.train_s for s in suggest_s)
        return [s + (self.prepare_s if key[1] else 0.0) for s in spent]

    def trained_again(self, key, n):
        """Return the share of a found front by fresh trainings; None where some are missing."""
        front = self._front(key, n)
        if any(policy not in self.again for policy, _ in front):
            return None
        means = [(statistics.fmean(self.again[policy]), energy) for policy, energy in front]
        return self._volume(means) / self._all_again

    def on_test(self, key, n):
        """Return the share of a found front by accuracies on the test part."""
        points = [(self.test[policy], energy) for policy, energy in self._front(key, n)]
        return self._volume(points) / self._all_test

    def _front(self, key, n):
        found = self.searches[key]
        return [(found.policies[i], found.points[i][1]) for i in front_of(found.points[:n])]

    def _volume(self, points):
        return hypervolume(points, DIRECTIONS, self._corner) if points else float("nan")


def cell(values):
    """Return median and range, a dash where a seed has none."""
    if not values or any(v is None for v in values):
        return "–"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def trials_of(volumes, key):
    """Return the trials that a search has finished under every seed."""
    return min(v.n_done(key) for v in volumes)


def mark_of(volumes, key, wanted):
    """Return the last mark, no later than the one wanted, that a search has come to."""
    n = trials_of(volumes, key)
    return max((mark for mark in MARKS if mark <= min(n, wanted)), default=n)


def reach(volumes, keys):
    """Say how far the run has come, and what was trained."""
    by_number = defaultdict(list)
    for key in keys:
        by_number[trials_of(volumes, key)].append(label(key))
    done = ", ".join(f"{n} ({' / '.join(names)})" for n, names in sorted(by_number.items()))
    again = sum(len(a) for v in volumes for a in v.again.values())
    return (
        f"{volumes[0].n_dimensions} dimensions, median (min to max) of {len(volumes)} seeds; "
        f"{sum(len(v.test) for v in volumes)} policies trained, {again} trainings of front "
        f"policies with fresh seeds. Trials that searches have come to: {done}."
    )


def table(volumes, keys, what):
    """Return a table of one kind of share by trials."""
    done = {key: trials_of(volumes, key) for key in keys}
    marks = [mark for mark in MARKS if mark <= max(done.values())]
    lines = [
        f"| sampler | {' | '.join(map(str, marks))} |",
        f"| --- | {' | '.join('---:' for _ in marks)} |",
    ]
    for key in keys:
        cells = []
        for mark in marks:
            reached = volumes if done[key] >= mark else []
            cells.append(cell([getattr(v, what)(key, mark) for v in reached]))
        lines.append(f"| {label(key)} | {' | '.join(cells)} |")
    return lines


def targets(volumes, keys, what):
    """Say whether ours at few trials is level with the best rival at many, seed by seed."""
    said = what.replace("_", " ")
    for ours_at, is_seeded, rival_at in TARGETS:
        rivals = [k for k in keys if k != OURS and k[1] == is_seeded]
        at = {k: mark_of(volumes, k, rival_at) for k in rivals}
        at[OURS] = mark_of(volumes, OURS, ours_at)
        shares = {k: [getattr(v, what)(k, n) for v in volumes] for k, n in at.items()}
        if any(None in found for found in shares.values()):
            yield f"- {said}: not all fronts are trained again yet."
            continue
        ours = shares.pop(OURS)
        best = max(shares, key=lambda k: statistics.median(shares[k]))
        of_each = [max(found) for found in zip(*shares.values(), strict=True)]
        n_level, n_all = (
            sum(a >= b for a, b in zip(ours, other, strict=True))
            for other in (shares[best], of_each)
        )
        yield (
            f"- {said}: ours at {at[OURS]} trials {statistics.median(ours):.4f}, {label(best)} at "
            f"{at[best]} {statistics.median(shares[best]):.4f}"
            f"{'' if at[best] == rival_at else f' (of {rival_at} asked for)'}; ours is level or "
            f"above in {n_level} of {len(ours)} seeds, and in {n_all} against the best rival of "
            "each seed."
        )


def seconds(volumes, keys):
    """Return a table of the seconds of a trial."""
    train = statistics.fmean(v.train_s for v in volumes)
    prepare = statistics.fmean(v.prepare_s for v in volumes)
    lines = [
        f"In {volumes[0].clock} seconds: a training takes {train:.2f} (mean), teacher, prior and "
        f"seeds {prepare:.0f} a search. A proposal takes:",
        "",
        "| sampler | trials | first half, ms | second half, ms |",
        "| --- | ---: | ---: | ---: |",
    ]
    for key in keys:
        halves = [[], []]
        for v in volumes:
            spent = v.searches[key].suggest_s
            halves[0] += spent[: len(spent) // 2]
            halves[1] += spent[len(spent) // 2 :]
        n = trials_of(volumes, key)
        means = " | ".join(f"{1e3 * statistics.fmean(h):.1f}" for h in halves)
        lines.append(f"| {label(key)} | {n} | {means} |")
    return lines


def noise(volumes):
    """Return the spread of accuracy between trainings of one policy that differ in their seed."""
    spreads = [statistics.variance(a) for v in volumes for a in v.again.values() if len(a) > 1]
    return statistics.fmean(spreads) ** 0.5 if spreads else None


def curves(volumes, keys, file, *, by_seconds):
    """Draw the shares by trials or by seconds."""
    lines = []
    for key in keys:
        columns = list(zip(*(v.curve(key) for v in volumes), strict=False))
        n = len(columns)
        places = range(1, n + 1)
        if by_seconds:
            ends = zip(*(v.ends(key) for v in volumes), strict=False)
            places = [statistics.fmean(column) for column in ends]
        lines.append((label(key), colour_of(key[0]), "-" if key[1] else ":", places, columns))
    x = f"{volumes[0].clock} seconds, preparation included" if by_seconds else "trials"
    draw(file, lines, x=x, y="hypervolume, share of all measured")


def table_by_seconds(volumes, keys):
    """Return a table of found shares by seconds, preparation included."""
    lines = [
        f"| sampler | {' | '.join(f'{mark} s' for mark in MARKS_S)} |",
        f"| --- | {' | '.join('---:' for _ in MARKS_S)} |",
    ]
    for key in keys:
        searches = [(v.ends(key), v.curve(key)) for v in volumes]
        cells = []
        for mark in MARKS_S:
            n_done = [bisect_right(ends, mark) for ends, _ in searches]
            is_on = all(ends[-1] >= mark for ends, _ in searches)
            shares = [
                curve[n - 1] if n else 0.0 for n, (_, curve) in zip(n_done, searches, strict=True)
            ]
            cells.append(cell(shares if is_on else []))
        lines.append(f"| {label(key)} | {' | '.join(cells)} |")
    return lines


def main(job, folder):
    name, folder = folder_of(job).name, folder or folder_of(job)
    by_seed = defaultdict(list)
    for found in read_searches(folder):
        by_seed[found.search.seed].append(found)
    of_each = [
        {(f.search.sampler, f.search.is_seeded) for f in found} for found in by_seed.values()
    ]
    keys = sorted(
        set.intersection(*of_each), key=lambda k: (k == OURS, k[1], list(COLOURS).index(k[0]))
    )
    volumes = [Volumes(folder, seed, found) for seed, found in sorted(by_seed.items())]
    n_seeds = volumes[0].n_seeds
    deviation = noise(volumes)
    lines = [
        reach(volumes, keys),
        "",
        "Found:",
        "",
        *table(volumes, keys, "found"),
        "",
        f"Seeds only ({n_seeds} trials): {cell([v.found(OURS, n_seeds) for v in volumes])}.",
        "",
        f"Found, by {volumes[0].clock} seconds; a dash where a search ended before:",
        "",
        *table_by_seconds(volumes, keys),
        "",
        "The found fronts, trained again:",
        "",
        *table(volumes, keys, "trained_again"),
        "",
        f"Seeds only: {cell([v.trained_again(OURS, n_seeds) for v in volumes])}.",
        "",
        "The found fronts, on the test part:",
        "",
        *table(volumes, keys, "on_test"),
        "",
        f"Seeds only: {cell([v.on_test(OURS, n_seeds) for v in volumes])}.",
        "",
        "Targets:",
        "",
        *(
            line
            for what in ("found", "trained_again", "on_test")
            for line in targets(volumes, keys, what)
        ),
        "",
    ]
    if deviation is not None:
        lines += [
            f"Between trainings of one policy that differ in their seed, accuracy has a standard "
            f"deviation of {deviation:.4f}.",
            "",
        ]
    lines += seconds(volumes, keys)
    text = "\n".join(lines) + "\n"
    (HERE / f"{name}.md").write_text(text)
    (HERE / f"{name}.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")
    curves(volumes, keys, HERE / f"{name}_trials.svg", by_seconds=False)
    curves(volumes, keys, HERE / f"{name}_seconds.svg", by_seconds=True)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", choices=JOBS, default=JOBS[0])
    parser.add_argument("--folder", type=Path)
    main(**vars(parser.parse_args()))
