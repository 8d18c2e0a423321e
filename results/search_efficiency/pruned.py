"""What FrontPruner saves, and what any pruner could: on the simulator and on recorded digits.

Usage: python results/search_efficiency/pruned.py [--seeds N] [--trials N] [--only PROBLEM]

Simulator: each sampler runs a number of trials to the end, and once more with the pruner until it
has spent half of those epochs. Forest: the same on digits, after the job's own seeds, where a
forest fitted to measured_digits.csv answers for training, with noise; the training losses that the
pruner sees are those of the recorded trial of nearest KL, which flatters it. Recorded: the trials
of measured_digits.csv in random orders, each stopped or not by their training loss. All compare
the hypervolume of what finished; condemned trials that were spared tell the rate of false stops.

Oracles know how trials would end, and bound what a pruner can save: see `oracles.py`.
Writes pruned.csv, pruned.md and pruned.json; with --only, the rows of that problem alone are new.
"""

import argparse
import csv
import json
import math
import statistics
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import torch
from oracles import Oracle, hindsight_volume
from samplers import FEW

from adq_search.distill import Teacher
from adq_search.guide import additive_costs, decisions_of
from adq_search.hardware import cost_table
from adq_search.job import read_job
from adq_search.pareto import hypervolume
from adq_search.plan import plan
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_pruner import FrontPruner
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.prior import propose_seeds
from adq_search.provenance import provenance
from adq_search.session import measure_sensitivity
from adq_search.simulator import published_problem, read_table
from adq_search.stopping import FalseStops
from adq_search.teacher import make_teacher

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: Of the logarithm of a KL that the forest answers with.
NOISE = 0.1


@dataclass(frozen=True)
class Training:
    """What a trial would come to, trained to the end.

    Attributes:
        scores: What a pruner sees after each epoch.
        values: Measured objectives; all but the first are known before.
        point: The same without noise.
        kl: As measured.
    """

    scores: tuple
    values: tuple
    point: tuple
    kl: float


@dataclass(frozen=True)
class Search:
    """What came of a search.

    Attributes:
        points: Of the trials that finished, in order.
        n_trials: Trials begun.
        n_epochs: Epochs spent.
        stops: False stops among those that were spared, None where nobody counts.
    """

    points: list
    n_trials: int
    n_epochs: int
    stops: FalseStops | None


class Learned:
    """`FrontPruner` with some options."""

    tells_ends = False

    def __init__(self, seed, **options):
        self._pruner = FrontPruner(**options, seed=seed)

    def stops_after(self, trial, training):
        """Return the epoch after which a trial is stopped, None where it finishes."""
        for epoch, score in enumerate(training.scores, start=1):
            if self._pruner.should_stop(trial, epoch, score, known=training.values[1:]):
                return epoch
        return None

    def false_stops(self, study):
        return self._pruner.false_stops(study)


class Never:
    """No pruner."""

    tells_ends = False

    def stops_after(self, trial, training):
        return None

    def false_stops(self, study):
        return None


def learned(confidence):
    return lambda seed, _: Learned(seed, rungs=(1, 2, 3, 4, 5), confidence=confidence)


#: Pruners by name: each takes a seed and the hypervolume of points.
PRUNERS = {
    "none": lambda *_: Never(),
    "rungs 1 to 5, 0.6": learned(0.6),
    "rungs 1 to 5, 0.8": learned(0.8),
    "rungs 1 to 5, 0.9": learned(0.9),
    "oracle: dominated": lambda _, volume: Oracle(volume, share=0.0),
    "oracle: adds little": lambda _, volume: Oracle(volume, share=1.0),
}
#: After how many epochs hindsight stops trials.
HINDSIGHT = (1, 2, 3)


class Simulator:
    """The published-sensitivity problem of a seed: accuracy against cost."""

    directions = ("maximize", "minimize")
    seeds = ()

    def __init__(self, seed):
        self._problem = published_problem(seed=seed)
        self.space, self.epochs = self._problem.space, self._problem.epochs
        self.reference = self._problem.reference
        self.decisions = decisions_of(self.space, self._problem.prior, [self._problem.cost_rows])

    def sampler(self, name, seed):
        return FEW[name](self._problem, seed)

    def believed(self, kl, cost):
        """Return the objectives of a KL and a cost."""
        return math.exp(-kl), cost

    def trained(self, policy, seed):
        found = self._problem.measure(policy, seed=seed)
        (point,) = self._problem.true_points([policy])
        return Training(found.curve, (found.accuracy, found.cost), point, found.kl)

    @property
    def whole(self):
        """The largest hypervolume there is."""
        return hypervolume(self._problem.true_front, self.directions, self.reference)


class Forest:
    """Digits with a forest for training: KL to the teacher against energy."""

    directions = ("minimize", "minimize")
    whole = 1.0

    def __init__(self, planned, table):
        teacher = Teacher(make_teacher(planned.task, seed=planned.job.search.seed), planned.task)
        prior = measure_sensitivity(planned, teacher)
        costs = additive_costs(cost_table(planned.summary, planned.space, planned.hardware))
        found = propose_seeds(
            planned.space, planned.summary, prior, "energy_pj", planned.hardware, n=8
        )
        self._planned, self._table, self.space = planned, table, planned.space
        self.epochs = planned.job.training.epochs
        self.seeds = (*planned.space.uniform_policies().values(), *(s.policy for s in found))
        self._known = {"space": planned.space, "prior": prior, "costs": costs}
        self.decisions = decisions_of(planned.space, prior, [costs["energy_pj"]])
        kls = [table.measure(p).kl for p in table.policies]
        self.reference = (np.log(max(kls)), planned.cost_range("energy_pj")[1])

    def sampler(self, name, seed):
        if name == "guide":
            return PolicySampler(objectives=("kl", "energy_pj"), seed=seed, **self._known)
        return FEW[name](None, seed)

    def believed(self, kl, cost):
        """Return the objectives of a KL and an energy, as points have them."""
        return math.log(kl), cost

    def trained(self, policy, seed):
        found = self._table.measure(policy)
        rng = np.random.default_rng([seed, int(policy.hash, 16)])
        kl = found.kl * float(np.exp(NOISE * rng.standard_normal()))
        energy = self._planned.totals(policy)["energy_pj"]
        return Training(found.scores, (kl, energy), (np.log(found.kl), energy), kl)


def searched(problem, sampler, pruner, seed, n_epochs):
    """Search a problem until the epochs are spent."""
    study = optuna.create_study(
        directions=problem.directions, sampler=problem.sampler(sampler, seed)
    )
    for policy in problem.seeds:
        study.enqueue_trial(problem.space.params_of(policy))
    parameters = {p.name: distribution(p) for p in problem.space.parameters}
    points, spent = [], 0
    while spent < n_epochs:
        trial = study.ask(parameters)
        training = problem.trained(problem.space.policy_of(trial.params), seed)
        stop = pruner.stops_after(trial, training)
        if trial.number < len(problem.seeds):  # these finish, as in a job
            stop = None
        spent += stop or problem.epochs
        if stop is None:
            points.append(training.point)
        if stop is None or pruner.tells_ends:
            trial.set_user_attr("kl", training.kl)
            study.tell(trial, training.values)
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return Search(points, len(study.trials), spent, pruner.false_stops(study))


def rows_of_search(name, problem, sampler, seed, trials):
    """Yield a row for all epochs without a pruner, and for each way to spend half of them."""
    volume = partial(hypervolume, directions=problem.directions, reference=problem.reference)
    here = {"problem": name, "sampler": sampler, "seed": seed}
    budget = trials * problem.epochs
    points = searched(problem, sampler, Never(), seed, 2 * budget).points
    whole = Search(points[:trials], trials, budget, None)
    yield row_of(here, "none", whole, volume(whole.points) / problem.whole, budget)
    for after in HINDSIGHT:
        best, found = in_hindsight(points, after, problem, budget // 2)
        yield row_of(here, f"hindsight: after {after}", found, best / problem.whole, budget // 2)
    for pruner, make in PRUNERS.items():
        found = searched(problem, sampler, make(seed, volume), seed, budget // 2)
        yield row_of(here, pruner, found, volume(found.points) / problem.whole, budget // 2)
    print(here, flush=True)


def in_hindsight(points, after, problem, n_epochs):
    """Return the best hypervolume, and the search with as many trials begun as allow it."""
    found = []
    for begun in range(n_epochs // problem.epochs, len(points) + 1, 5):
        n = min((n_epochs - after * begun) // (problem.epochs - after), begun)
        if n > 0:
            best = hindsight_volume(points[:begun], n, problem.directions, problem.reference)
            found.append((best, Search(points[:n], begun, n_epochs, None)))
    return max(found, key=lambda pair: pair[0])


def rows_of_records(seeds, planned, table):
    """Return rows of the recorded trials, replayed in random orders."""
    directions = ("maximize", "minimize")
    trials = []
    for policy in table.policies:
        found, energy = table.measure(policy), planned.totals(policy)["energy_pj"]
        values = (found.accuracy, energy)
        trials.append(Training(found.scores, values, values, found.kl))
    reference = tuple(f(t.values[k] for t in trials) for k, f in enumerate((min, max)))
    volume = partial(hypervolume, directions=directions, reference=reference)
    rows = []
    for name, seed in ((n, s) for n in PRUNERS for s in range(4 * seeds)):
        study, pruner = optuna.create_study(directions=directions), PRUNERS[name](seed, volume)
        points, spent = [], 0
        for i in np.random.default_rng(seed).permutation(len(trials)):
            trial = study.ask()
            stop = pruner.stops_after(trial, trials[i])
            spent += stop or len(trials[i].scores)
            if stop is None:
                points.append(trials[i].point)
                study.tell(trial, trials[i].values)
            else:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        found = Search(points, len(trials), spent, pruner.false_stops(study))
        here = {"problem": "digits", "sampler": "recorded", "seed": seed}
        rows.append(row_of(here, name, found, volume(points), 0))
    return shares(rows, rows[0]["hypervolume"])


def row_of(here, pruner, found, volume, budget):
    row = {**here, "pruner": pruner, "budget": budget, "epochs": found.n_epochs}
    row |= {"trials": found.n_trials, "finished": len(found.points), "hypervolume": volume}
    return row | {n: getattr(found.stops, n, "") for n in ("n_condemned", "n_spared", "n_on_front")}


def shares(rows, whole):
    return [{**row, "hypervolume": row["hypervolume"] / whole} for row in rows]


def summary(rows):
    lines = [
        "Medians (min to max) over seeds. Hypervolume: share of the true front's on the "
        "simulator, of the largest of all runs on the forest, of that of all recorded trials.",
        "Gap: hypervolume missing to all epochs without a pruner, mean over seeds and its standard "
        "error; the oracles and hindsight are bounds, no pruners (`oracles.py`).",
        "",
        "| problem | sampler | pruner | epochs | trials | finished | hypervolume | gap | "
        "false stops |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    keys = [tuple(r[n] for n in ("problem", "sampler", "pruner", "budget")) for r in rows]
    whole = {}
    for key in sorted(dict.fromkeys(keys), key=keys.index):
        here = [r for r, k in zip(rows, keys, strict=True) if k == key]
        volume = np.array([float(r["hypervolume"]) for r in here])
        gap = whole.setdefault(key[:2], volume) - volume
        error = gap.std(ddof=1) / np.sqrt(len(gap)) if len(gap) > 1 else np.nan
        medians = [
            f"{statistics.median(int(r[n]) for r in here):.0f}"
            for n in ("epochs", "trials", "finished")
        ]
        cells = [
            *key[:3],
            *medians,
            f"{np.median(volume):.4f} ({volume.min():.4f} to {volume.max():.4f})",
            f"{gap.mean():.4f} ± {error:.4f}" if gap.any() else "",
        ]
        spared, wrong = (sum(int(r[n] or 0) for r in here) for n in ("n_spared", "n_on_front"))
        counts = any(r["n_spared"] != "" for r in here)
        lines.append(f"| {' | '.join(cells)} | {f'{wrong} of {spared}' if counts else ''} |")
    return "\n".join(lines) + "\n"


def set_up():
    """Return how this is made, and the plan and recorded policies of digits; Optuna is quiet."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    made = provenance(seed=0)  # before files change
    planned = plan(read_job(ROOT / "search_spaces" / "digits.yaml"))
    return made, planned, read_table(HERE / "measured_digits.csv", planned.space)


def main(seeds, trials, only):
    made, planned, table = set_up()

    def rows_of(name, problem_of):
        pairs = [(sampler, seed) for sampler in FEW for seed in range(seeds)]
        for sampler, seed in pairs:
            yield from rows_of_search(name, problem_of(seed), sampler, seed, trials)

    def rows_of_forest():
        forest = Forest(planned, table)
        rows = list(rows_of("forest", lambda _: forest))
        return shares(rows, max(r["hypervolume"] for r in rows))

    problems = {
        "simulator": lambda: rows_of("simulator", Simulator),
        "forest": rows_of_forest,
        "digits": lambda: rows_of_records(seeds, planned, table),
    }
    rows = []
    for name, measure in problems.items():
        if only in (None, name):
            rows += [
                {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in measure()
            ]
        else:
            with (HERE / "pruned.csv").open(newline="") as lines:
                rows += [row for row in csv.DictReader(lines) if row["problem"] == name]
    with (HERE / "pruned.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = summary(list(csv.DictReader((HERE / "pruned.csv").open())))
    (HERE / "pruned.md").write_text(text)
    (HERE / "pruned.json").write_text(json.dumps(made, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--only", choices=["simulator", "forest", "digits"])
    main(**vars(parser.parse_args()))
