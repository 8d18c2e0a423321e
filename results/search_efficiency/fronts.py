"""The searches of `trained.py` as it wrote them, and their fronts and hypervolumes."""

import csv
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from adq_search.pareto import front_indices

HERE = Path(__file__).parent
#: Job files that `trained.py` runs; the first is the default.
JOBS = ("deep_digits", "deep_mnist5k")
DIRECTIONS = ("maximize", "minimize")
#: Numbers of trials at which fronts are compared.
MARKS = (13, 40, 60, 100, 240, 400)


class Search(NamedTuple):
    """Which search: a sampler, plain or after the job's seeds, and the search's seed."""

    sampler: str
    is_seeded: bool
    seed: int


@dataclass
class Found:
    """What a search found, in the order of its trials.

    Attributes:
        search: Which.
        policies: Codes of the policies.
        points: Accuracy and energy in picojoules, as measured in the search.
        kls: KL to the teacher, nats.
        suggest_s: Seconds of each proposal, of the clock that `clock_of` names.
    """

    search: Search
    policies: list = field(default_factory=list)
    points: list = field(default_factory=list)
    kls: list = field(default_factory=list)
    suggest_s: list = field(default_factory=list)


def folder_of(job):
    """Return where the tables of a job lie; the report of a job is named as this folder."""
    return HERE / ("trained" if job == JOBS[0] else f"trained_{job.removeprefix('deep_')}")


def label(key):
    """Return the name of a search, given as sampler and whether seeds come first."""
    name, is_seeded = key
    if name == "guide":
        return "ours"
    return f"seeds, then {name}" if is_seeded else name


def read_searches(folder):
    """Return every search of a folder."""
    out = {}
    for file in sorted(folder.glob("trials_*.csv")):
        seed = int(file.stem.removeprefix("trials_"))
        trainings = {r["policy"]: r for r in rows_of(folder / f"trainings_{seed}.csv")}
        for row in rows_of(file):
            search = Search(row["sampler"], bool(int(row["seeded"])), seed)
            found = out.setdefault(search, Found(search))
            training = trainings[row["policy"]]
            found.policies.append(row["policy"])
            found.points.append((float(training["accuracy"]), float(training["energy_pj"])))
            found.kls.append(float(training["kl"]))
            found.suggest_s.append(seconds_of(row, "suggest_"))
    return list(out.values())


def clock_of(row):
    """Return what a row's seconds are of: the wall's clock, where it was looked at."""
    return "wall" if any(name.endswith("wall_s") for name in row) else "processor"


def seconds_of(row, prefix=""):
    """Return the seconds that something took, by the clock of `clock_of`."""
    return float(row[prefix + {"wall": "wall_s", "processor": "cpu_s"}[clock_of(row)]])


def read_retrained(folder, seed):
    """Return the accuracies of each policy after training it again, by policy."""
    out = defaultdict(list)
    for row in rows_of(folder / f"retrained_{seed}.csv"):
        out[row["policy"]].append(float(row["accuracy"]))
    return dict(out)


def front_of(points):
    """Return the indices of non-dominated points."""
    return front_indices(points, DIRECTIONS)


def rows_of(file):
    """Return the rows of a CSV file, none where there is none; a torn last line is left out."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if None not in row.values()]
