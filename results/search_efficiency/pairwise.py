"""Do terms for pairs of neighbouring groups earn their place in the guide's model?

Usage: python results/search_efficiency/pairwise.py [--seeds N] [--trials N]

Notation:
    L_g: loss of group g under its choice, as the additive model has it.
    r_g ~ N(0, tau^2): how much groups g and g + 1 lose together, clipped to +- 0.9.
    loss = sum_g L_g + sum_g r_g sqrt(L_g L_(g+1)):  r = 0 is the additive model; the sum stays
    positive, since sqrt(ab) <= (a + b) / 2.

Two questions. How well does each model predict log KL of policies that it has not seen (ten-fold
cross-validation, at several numbers of policies)? And what share of the true hypervolume does the
guide reach with each on the published-sensitivity problem, whose neighbours do interact? Policies
ranked with the pair terms, the front of a draw is still swept without them, and searched around.

Tables: digits as recorded (`measured_digits.csv`), 64 dimensions as trained by `trained.py` under
each seed, and random policies of the published problem. Writes pairwise.csv, .md and .json.
"""

import argparse
import csv
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fronts import rows_of
from scipy.sparse import csr_array, hstack

from adq_search.distill import Teacher
from adq_search.guide import Belief, Guide, LossModel, decisions_of
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.prior import rank_correlation
from adq_search.provenance import provenance
from adq_search.session import measure_sensitivity
from adq_search.simulator import published_problem, read_table
from adq_search.teacher import make_teacher

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
N_FOLDS = 10
SIZES = (40, 100, 400)
SPREAD = 0.3
LIMIT = 0.9
MARKS = (24, 50, 100)


@dataclass(frozen=True, eq=False)
class PairBelief(Belief):
    """A belief with what neighbours lose together."""

    pairs: np.ndarray


class PairModel(LossModel):
    """`LossModel` with a term for each two neighbouring groups that have a choice."""

    def __init__(self, decisions):
        super().__init__(decisions)
        free = [
            d for d, one in enumerate(decisions) if one.predicted is not None and one.n_choices > 1
        ]
        self._left, self._right = np.array(free[:-1]), np.array(free[1:])
        n_pairs = len(self._left)
        n_rows, n = self._features.shape
        self._features = hstack([self._features, csr_array((n_rows, n_pairs))]).tocsr()
        self._families += ("pair",) * n_pairs
        self._spreads = np.r_[self._spreads, np.full(n_pairs, SPREAD)]
        self._mean, self._moment, self._at = (np.zeros(n + n_pairs) for _ in range(3))
        self._precision = np.diag(self._spreads**-2.0)

    def log_loss(self, belief, choices):
        """Return the logarithm of the loss of policies."""
        d = np.arange(len(self.decisions))
        parts = np.where(self.is_share, belief.losses[d, choices], 0.0)
        together = np.sqrt(parts[:, self._left] * parts[:, self._right]) @ belief.pairs
        alone = parts.sum(axis=1)
        return super().log_loss(belief, choices) + np.log((alone + together) / alone)

    def _belief(self, w):
        found = super()._belief(w)
        pairs = np.clip(w[len(w) - len(self._left) :], -LIMIT, LIMIT)
        return PairBelief(found.losses, found.factors, found.level, pairs)

    def _values(self, w, choices):
        value, rows = super()._values(w, choices)
        belief = self._belief(w)
        d = np.arange(len(self.decisions))
        parts = np.where(self.is_share, belief.losses[d, choices], 0.0)
        roots = np.sqrt(parts[:, self._left] * parts[:, self._right])
        alone, together = parts.sum(axis=1), roots @ belief.pairs
        total = alone + together
        # What moves a group's logarithm moves half of its pairs'.
        weights = parts.copy()
        np.add.at(weights, (slice(None), self._left), 0.5 * roots * belief.pairs)
        np.add.at(weights, (slice(None), self._right), 0.5 * roots * belief.pairs)
        flat = choices + d * self._width
        starts = np.arange(0, flat.size + 1, len(d))
        pick = csr_array(
            ((weights / total[:, None]).ravel(), flat.ravel(), starts),
            shape=(len(choices), len(d) * self._width),
        )
        rows = np.asarray((pick @ self._features).todense())
        rows[:, 0] = 1.0
        rows[:, len(w) - len(self._left) :] = roots / total[:, None]
        return value + np.log(total / alone), rows


MODELS = {"additive": LossModel, "with pairs": PairModel}


class PairGuide(Guide):
    """The guide with the other model."""

    def __init__(self, decisions):
        super().__init__(decisions)
        self._model = PairModel(self.decisions)


def predictions(kind, decisions, choices, y):
    """Return what a model predicts of policies that it was not fitted to."""
    out = np.zeros_like(y)
    fold = np.random.default_rng(0).permutation(len(y)) % N_FOLDS
    for k in range(N_FOLDS):
        model = kind(decisions)
        seen = fold != k
        model.fit(choices[seen], y[seen], np.zeros(int(seen.sum())))
        out[~seen] = model.log_loss(model.mean(), choices[~seen])
    return out


def tables(n_seeds):
    """Yield the name of each table, its decisions, choices and log KL."""
    for name, job_file in (("digits", ROOT / "search_spaces/digits.yaml"),):
        planned = plan(read_job(job_file))
        teacher = Teacher(make_teacher(planned.task, seed=0), planned.task)
        prior = measure_sensitivity(planned, teacher)
        problem = read_table(HERE / f"measured_{name}.csv", planned.space)
        index = [{p: i for i, p in enumerate(g.choices)} for g in planned.space.groups]
        groups = planned.space.groups
        choices = np.array(
            [
                [at[policy[g.layers[0]]] for at, g in zip(index, groups, strict=True)]
                for policy in problem.policies
            ]
        )
        y = np.log([t.kl for t in problem.trials.values()])
        yield name, decisions_of(planned.space, prior), choices, y
    for file in sorted((HERE / "trained").glob("trainings_*.csv"))[:n_seeds]:
        seed = int(file.stem.removeprefix("trainings_"))
        planned = plan(read_job(HERE / "deep_digits.yaml").with_search(seed=seed))
        teacher = Teacher(make_teacher(planned.task, seed=seed), planned.task)
        rows = rows_of(file)
        choices = np.array([[int(c) for c in row["policy"].split()] for row in rows])
        y = np.log([float(row["kl"]) for row in rows])
        prior = measure_sensitivity(planned, teacher)
        yield f"64 dimensions, seed {seed}", decisions_of(planned.space, prior), choices, y
    for seed in range(n_seeds):
        problem = published_problem(seed=seed)
        rng = np.random.default_rng(seed)
        sizes = [len(g.choices) for g in problem.space.groups]
        choices = rng.integers(0, sizes, (max(SIZES), len(sizes)))
        y = np.log(problem.true_kl(choices)) + problem.noise * rng.standard_normal(len(choices))
        yield f"published, seed {seed}", decisions_of(problem.space, problem.prior), choices, y


def validated(n_seeds):
    """Yield a row for each table, size and model."""
    for name, decisions, choices, y in tables(n_seeds):
        order = np.random.default_rng(1).permutation(len(y))
        for size in dict.fromkeys(min(size, len(y)) for size in SIZES):
            some = order[:size]
            for model, kind in MODELS.items():
                found = predictions(kind, decisions, choices[some], y[some])
                left = float(((y[some] - found) ** 2).sum())
                yield {
                    "table": name,
                    "policies": size,
                    "model": model,
                    "spearman": rank_correlation(list(found), list(y[some])),
                    "r2": 1.0 - left / float(((y[some] - y[some].mean()) ** 2).sum()),
                }


def searched(guide_of, seed, n_trials):
    """Return the share of the true hypervolume at each mark."""
    problem = published_problem(seed=seed)
    guide = guide_of(decisions_of(problem.space, problem.prior, [problem.cost_rows]))
    groups = problem.space.groups
    policies, out = [], {}
    for n in range(1, n_trials + 1):
        row = guide.propose(np.random.default_rng([seed, n]))
        policy = problem.space.policy_from(
            {g.name: g.choices[c] for g, c in zip(groups, row, strict=True)}
        )
        found = problem.measure(policy, seed=seed)
        guide.tell(row, np.log(found.kl), value=-found.accuracy)
        policies.append(policy)
        if n in MARKS:
            out[n] = problem.share_of_hypervolume(policies)
    return out


def summary(rows, shares):
    """Return the tables."""
    lines = [
        f"Log KL of unseen policies, {N_FOLDS}-fold cross-validation.",
        "",
        "| table | policies | Spearman, additive | with pairs | R2, additive | with pairs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for table, size in dict.fromkeys((r["table"], r["policies"]) for r in rows):
        here = {r["model"]: r for r in rows if (r["table"], r["policies"]) == (table, size)}
        cells = [f"{here[m][what]:.3f}" for what in ("spearman", "r2") for m in MODELS]
        lines.append(f"| {table} | {size} | {' | '.join(cells)} |")
    lines += [
        "",
        "Share of the true hypervolume on the published problem, median of "
        f"{len(shares['additive'])} seeds, and in how many of them the pairs are ahead:",
        "",
        "| trials | additive | with pairs | ahead |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for mark in shares["additive"][0]:
        columns = [[s[mark] for s in shares[m]] for m in MODELS]
        ahead = sum(b > a for a, b in zip(*columns, strict=True))
        medians = " | ".join(f"{statistics.median(c):.4f}" for c in columns)
        lines.append(f"| {mark} | {medians} | {ahead} |")
    return "\n".join(lines) + "\n"


def main(seeds, trials):
    made = provenance(seed=0)  # before files change
    rows = list(validated(seeds))
    with (HERE / "pairwise.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    guides = {"additive": Guide, "with pairs": PairGuide}
    shares = {m: [searched(g, s, trials) for s in range(seeds)] for m, g in guides.items()}
    text = summary(rows, shares)
    (HERE / "pairwise.md").write_text(text)
    (HERE / "pairwise.json").write_text(json.dumps({"shares": shares, **made}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=100)
    main(**vars(parser.parse_args()))
