"""When does a learning curve know more than the guide did before the first epoch?

Usage: python results/search_efficiency/foresight.py [--seeds N] [--trials N]

A pruner behind the guide can only save epochs if a few of them say more of how a trial ends than
the guide knew when it proposed the trial. Two tables:

Errors. Trials come one by one. Before each, a model of those before it forecasts log KL at the end
three ways: the guide's model, from the policy alone; `forecast_end`, from the score after e epochs,
as `FrontPruner` does; and a regression on the guide's forecast and the logarithm of the score. Root
mean squares, on the trials that the guide proposed on the simulator and the forest, and on those
recorded on digits in random orders.

Stop and return. Half of the epochs of a plain search, spent otherwise: the first twelve trials
finish; then every trial is stopped after e epochs, its forecast told to the guide, and after every
k of them the stopped one that is believed to add most hypervolume goes on to its end. So a stop
costs no epoch twice, and whether to finish is decided with all that was learned since: asynchronous
successive halving [Li2020]_, with the guide for a judge.

Writes foresight.csv (epochs: seen by a forecast, or spent by a search; n: forecasts, or trials that
finished), foresight.md and foresight.json.

.. [Li2020] Li et al. A System for Massively Parallel Hyperparameter Tuning. MLSys 2020.
"""

import argparse
import csv
import json
import math
from pathlib import Path
from statistics import median

import numpy as np
from pruned import Forest, Simulator, set_up

from adq_search.guide import Guide, LossModel, forecast_end
from adq_search.pareto import hypervolume

HERE = Path(__file__).parent
#: Trials that finish before any is stopped, as the job's seeds would.
N_FIRST = 12
#: Trials before the first one whose end is forecast.
N_LEARNED = 20
#: Epochs before a stop, and stops to a return.
WAYS = ((1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (3, 2), (3, 4))


def policy_of(space, row):
    """Return the policy of some choices."""
    pairs = zip(space.groups, row, strict=True)
    return space.policy_from({group.name: group.choices[c] for group, c in pairs})


def row_of(space, policy):
    """Return the choices of a policy."""
    return tuple(group.choices.index(policy[group.layers[0]]) for group in space.groups)


class Search:
    """The guide on a problem, trial by trial; a trial may be stopped and finished later.

    Args:
        problem: Of `pruned.py`.
        seed: Of draws and of training.
    """

    def __init__(self, problem, seed):
        self.problem, self._seed = problem, seed
        self._rng = np.random.default_rng(seed)
        self.spent = 0
        self.finished, self.stopped = {}, {}
        self._guide = Guide(problem.decisions)

    def propose(self):
        """Return a policy's choices, and what its training would come to."""
        row = self._guide.propose(self._rng, pending=list(self.stopped))
        return row, self.problem.trained(policy_of(self.problem.space, row), self._seed)

    def finish(self, row, training, n_epochs):
        """Train to the end, with this many epochs."""
        self.spent += n_epochs
        self.finished[row] = training
        self._tell(row)

    def stop(self, row, training, epoch):
        """Train for some epochs."""
        self.spent += epoch
        self.stopped[row] = training
        self._tell_stopped(row, epoch)

    def finish_best(self, epoch):
        """Finish the stopped trial that is believed to add most hypervolume."""
        row = self._best_stopped(epoch)
        training = self.stopped.pop(row)
        self._guide = Guide(self.problem.decisions)  # which does not know the forecast
        for known in self.finished:
            self._tell(known)
        for other in self.stopped:
            self._tell_stopped(other, epoch)
        self.finish(row, training, self.problem.epochs - epoch)

    def _best_stopped(self, epoch):
        trials = {**self.finished, **self.stopped}
        forecasts = [self._forecast(row, epoch) for row in self.stopped]
        y = np.log([t.kl for t in self.finished.values()])
        noise = np.r_[np.zeros(len(y)), [f.error for f in forecasts]]
        model, rows = LossModel(self.problem.decisions), np.array(list(trials))
        model.fit(rows, np.r_[y, [f.end for f in forecasts]], noise)
        kls = np.exp(model.log_loss(model.mean(), rows))
        costs = [t.values[1] for t in trials.values()]
        points = [self.problem.believed(*pair) for pair in zip(kls, costs, strict=True)]
        done, rest = points[: len(y)], points[len(y) :]
        volumes = [self.volume([*done, point]) for point in rest]
        return list(self.stopped)[int(np.argmax(volumes))]

    def _forecast(self, row, epoch):
        trainings = self.finished.values()
        scores = np.array([t.scores[epoch - 1] for t in trainings])
        ends = np.log([t.kl for t in trainings])
        return forecast_end(scores, ends, self.stopped[row].scores[epoch - 1])

    def volume(self, points):
        return hypervolume(points, self.problem.directions, self.problem.reference)

    @property
    def share(self):
        """Hypervolume of what finished, without noise."""
        return self.volume([t.point for t in self.finished.values()]) / self.problem.whole

    def _tell(self, row):
        training = self.finished[row]
        sign = -1.0 if self.problem.directions[0] == "maximize" else 1.0
        self._guide.tell(row, math.log(training.kl), value=sign * training.values[0])

    def _tell_stopped(self, row, epoch):
        forecast = self._forecast(row, epoch)
        self._guide.tell_stopped(row, forecast.end, error=forecast.error)


def plain(problem, seed, n_epochs):
    """Return a search that finishes every trial."""
    search = Search(problem, seed)
    while search.spent < n_epochs:
        search.finish(*search.propose(), problem.epochs)
    return search


def returning(problem, seed, n_epochs, epoch, stops):
    """Return a search that stops trials after an epoch, and finishes one in so many."""
    search, n_stopped, n_returned = Search(problem, seed), 0, 0
    while search.spent < n_epochs:
        if len(search.finished) < N_FIRST:
            search.finish(*search.propose(), problem.epochs)
        elif n_stopped < stops * (n_returned + 1):
            search.stop(*search.propose(), epoch)
            n_stopped += 1
        else:
            search.finish_best(epoch)
            n_returned += 1
    return search


def errors(decisions, rows, scores, ends):
    """Yield what each forecast of each trial was off by: source, epoch, error of log KL.

    Args:
        decisions: Of the guide.
        rows: Choices, # shape: (trials, decisions)
        scores: After each epoch, # shape: (trials, epochs)
        ends: Log KL, # shape: (trials,)
    """
    guessed = np.full(len(ends), np.nan)
    for t in range(N_LEARNED // 2, len(rows)):
        model = LossModel(decisions)
        model.fit(rows[:t], ends[:t], np.zeros(t))
        guessed[t] = model.log_loss(model.mean(), rows[t : t + 1])[0]
    for t in range(N_LEARNED, len(rows)):
        yield "guide", 0, guessed[t] - ends[t]
        past = slice(N_LEARNED // 2, t)  # those that the guide guessed before it saw them
        for epoch, column in enumerate(scores.T[:-1], start=1):
            yield "curve", epoch, forecast_end(column[:t], ends[:t], column[t]).end - ends[t]
            table = np.column_stack([guessed, np.log(column), np.ones(len(ends))])
            weights, *_ = np.linalg.lstsq(table[past], ends[past], rcond=None)
            yield "both", epoch, table[t] @ weights - ends[t]


def rows_of_errors(name, searches):
    """Return root mean squares over the trials of some searches."""
    found = {}
    for arguments in searches:
        for source, epoch, error in errors(*arguments):
            found.setdefault((source, epoch), []).append(error)
    return [
        {"table": "errors", "problem": name, "way": source, "epochs": epoch, "n": len(e)}
        | {"figure": float(np.sqrt(np.mean(np.square(e))))}
        for (source, epoch), e in found.items()
    ]


def arguments_of(search):
    """Return what `errors` takes, of a search that finished every trial."""
    trainings = search.finished.values()
    scores = np.array([t.scores for t in trainings])
    ends = np.log([t.kl for t in trainings])
    return search.problem.decisions, np.array(list(search.finished)), scores, ends


def recorded(forest, table, seeds):
    """Yield what `errors` takes: recorded trials in random orders."""
    codes = np.array([row_of(forest.space, p) for p in table.policies])
    found = [table.measure(p) for p in table.policies]
    scores, ends = np.array([m.scores for m in found]), np.log([m.kl for m in found])
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(codes))
        yield forest.decisions, codes[order], scores[order], ends[order]


def rows_of_returns(name, problem, seed, trials):
    """Yield the share of hypervolume of each way to spend half of the epochs, and of all."""
    budget = trials * problem.epochs
    ways = {"all epochs": plain(problem, seed, budget)}
    ways["every trial finishes"] = plain(problem, seed, budget // 2)
    for epoch, stops in WAYS:
        way = f"stopped after {epoch}, 1 in {stops} returns"
        ways[way] = returning(problem, seed, budget // 2, epoch, stops)
    for way, search in ways.items():
        yield {"table": "returns", "problem": name, "way": way, "epochs": search.spent} | {
            "n": len(search.finished),
            "figure": search.share,
        }


def scale(rows, name):
    """Make hypervolumes of a problem shares of its largest."""
    own = [r for r in rows if (r["table"], r["problem"]) == ("returns", name)]
    largest = max(r["figure"] for r in own)
    for row in own:
        row["figure"] /= largest


def table_of_errors(rows):
    epochs = sorted({r["epochs"] for r in rows} - {0})
    lines = [
        "Root mean square of what forecasts of log KL at the end are off by; n: forecasts.",
        "",
        f"| trials of | n | forecast from | before | {' | '.join(f'{e}' for e in epochs)} |",
        f"| --- | ---: | --- | ---: | {' | '.join('---:' for _ in epochs)} |",
    ]
    for name, way in dict.fromkeys((r["problem"], r["way"]) for r in rows):
        here = {r["epochs"]: r for r in rows if (r["problem"], r["way"]) == (name, way)}
        cells = [f"{here[e]['figure']:.3f}" if e in here else "" for e in (0, *epochs)]
        n = next(iter(here.values()))["n"]
        lines.append(f"| {name} | {n} | {way} | {' | '.join(cells)} |")
    return lines


def table_of_returns(rows):
    lines = [
        "Stop and return: medians (min to max) over seeds of the share of hypervolume, of the true "
        "front's on the simulator, of the largest here on the forest.",
        "",
        "| problem | way | epochs | finished | hypervolume |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, way in dict.fromkeys((r["problem"], r["way"]) for r in rows):
        here = [r for r in rows if (r["problem"], r["way"]) == (name, way)]
        shares = [r["figure"] for r in here]
        spent, n = (f"{median(r[k] for r in here):.0f}" for k in ("epochs", "n"))
        lines.append(
            f"| {name} | {way} | {spent} | {n} | "
            f"{median(shares):.4f} ({min(shares):.4f} to {max(shares):.4f}) |"
        )
    return lines


def main(seeds, trials):
    made, planned, table = set_up()
    forest = Forest(planned, table)
    rows = []
    for name, problem_of in (("simulator", Simulator), ("forest", lambda _: forest)):
        problems = {seed: problem_of(seed) for seed in range(seeds)}
        whole = [plain(p, seed, trials * p.epochs) for seed, p in problems.items()]
        rows += rows_of_errors(name, map(arguments_of, whole))
        for seed, problem in problems.items():
            rows += rows_of_returns(name, problem, seed, trials)
            print(name, seed, flush=True)
    rows += rows_of_errors("recorded digits", recorded(forest, table, seeds))
    scale(rows, "forest")
    with (HERE / "foresight.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    by_table = {name: [r for r in rows if r["table"] == name] for name in ("errors", "returns")}
    lines = [*table_of_errors(by_table["errors"]), "", *table_of_returns(by_table["returns"])]
    (HERE / "foresight.md").write_text("\n".join(lines) + "\n")
    (HERE / "foresight.json").write_text(json.dumps(made, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=100)
    main(**vars(parser.parse_args()))
