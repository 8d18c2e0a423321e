"""The front in numbers: what `front.json` says, and what every picture and table is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from adq_search.errors import StorageError
from adq_search.pareto import Objective
from adq_search.report._front_file import FrontFile, PointFile
from adq_search.report._read import MEASURED, axes_of, figure_of
from adq_search.report.indicators import Hypervolume, hypervolume_of, knee_index
from adq_search.report.records import (
    UNIFORM,
    TrialRecord,
    TrialState,
    least_violating,
    select_front,
    uniform_records,
)
from adq_search.report.replicated import Replicate, Replicated, judge_front
from adq_search.validation import validated

SCHEMA = "adq_search.front/1"
FULL_PRECISION = "full precision"
N_CLOSEST = 5


@dataclass(frozen=True, slots=True)
class IntegerCheck:
    """Whether a trained policy, lowered to integers, is the network that was measured.

    Attributes:
        is_verified: Whether every code (but ties) and every class agreed; None where it could not
            be tried.
        samples: Samples compared.
        reason: Why it is not verified, one sentence; None where it is.
    """

    is_verified: bool | None
    samples: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class FrontPoint:
    """A policy with what it reached and what it costs.

    Attributes:
        trial: Number of its trial; None for full precision.
        origin: Who proposed it.
        policy_hash: Its policy's hash; None for full precision.
        accuracy: On the validation part, 0 to 1; None for a baseline that diverged unmeasured.
        test_accuracy: On the test part, 0 to 1; computed for the points of the final front.
        loss: Validation cross-entropy, nats.
        kl: Validation KL from the teacher, nats.
        cost: Total cost figures by name.
        policy_file: Path in the results folder.
        weights_file: Path in the results folder; None where the weights were not kept.
        state: `complete` on the front; a baseline may have diverged.
        integer_verified: Whether the integer network computes the same codes (but ties) and
            classes; None where it was not or could not be tried.
        integer_samples: Samples on which that was compared.
        integer_reason: Why `integer_verified` is false or None; None where there is nothing to
            say: it is true, or there are no integers (full precision).
        donor: Hash of the policy whose weights its training began from; None for a cold start.
        replicated: What further trainings say; None where there were none.
    """

    trial: int | None
    origin: str
    policy_hash: str | None
    accuracy: float | None
    test_accuracy: float | None
    loss: float | None
    kl: float | None
    cost: dict[str, float]
    policy_file: str | None
    weights_file: str | None
    state: TrialState = "complete"
    integer_verified: bool | None = None
    integer_samples: int = 0
    integer_reason: str | None = None
    donor: str | None = None
    replicated: Replicated | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether this is one of the uniform-bit baselines."""
        return self.origin.startswith(UNIFORM)

    @property
    def label(self) -> str:
        """A short name: `W4A4`, `full precision`, or the trial's number, `#12`."""
        if self.trial is None or self.is_uniform:
            return self.origin.removeprefix(UNIFORM)
        return f"#{self.trial}"

    def value(self, name: str) -> float:
        """Return an objective by name.

        Raises:
            CostError: Nothing has this name.
            StorageError: It was not measured.
        """
        measured = {key: getattr(self, key) for key in MEASURED}
        return figure_of(name, measured, self.cost, who=f"The point '{self.label}'")


@dataclass(frozen=True)
class FrontReport:
    """A search's outcome in numbers.

    Attributes:
        study: Name of the study.
        objectives: The axes of the search.
        budgets: Upper limits on cost figures.
        points: The front, cheapest first.
        baselines: Uniform policies by rising cost, then full precision.
        closest: Where no trial meets the budgets, the complete trials nearest to them; their
            policies are in `trials.json` only.
        counts: Trials by state, `rejected` and `repeated` draws.
        prior: What the prior said of itself; None without one.
        seconds: Where the time went, by part.
        hypervolume: None where there is nothing to refer to.
        knee: Policy hash of the front's knee; see `knee_index`.
        end: Why the search ended before its last trial: `SearchEnd` in plain form; None where it
            did not.
        false_stops: What became of trials that a pruner condemned: `FalseStops` in plain form;
            None where none was at work.
    """

    study: str
    objectives: tuple[Objective, ...]
    budgets: dict[str, float]
    points: tuple[FrontPoint, ...]
    baselines: tuple[FrontPoint, ...]
    closest: tuple[FrontPoint, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    prior: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    hypervolume: Hypervolume | None = None
    knee: str | None = None
    end: dict[str, Any] | None = None
    false_stops: dict[str, int] | None = None

    @property
    def axes(self) -> tuple[str, str]:
        """The first cost figure and the first measured figure among the objectives."""
        return axes_of(self.objectives)

    @property
    def full_precision(self) -> FrontPoint:
        """The unquantized network."""
        return next(p for p in self.baselines if p.trial is None)

    @property
    def uniform(self) -> tuple[FrontPoint, ...]:
        """The uniform baselines that completed."""
        return tuple(p for p in self.baselines if p.trial is not None and p.state == "complete")

    def to_json(self) -> dict[str, Any]:
        """Return the content of `front.json`."""
        content = {"schema": SCHEMA, **asdict(self)}
        content["objectives"] = [objective._asdict() for objective in self.objectives]
        for rows in ("points", "baselines", "closest"):
            content[rows] = list(content[rows])
        return content

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Build a report from the content of `front.json`.

        Raises:
            StorageError: The content is damaged, with the field at fault.
        """
        form = validated(FrontFile, content, StorageError, what="the file front.json")
        volume = form.hypervolume
        report = cls(
            study=form.study,
            objectives=tuple(Objective(o.name, o.direction) for o in form.objectives),
            budgets=form.budgets,
            points=_points(form.points),
            baselines=_points(form.baselines),
            closest=_points(form.closest),
            counts=form.counts,
            prior=form.prior,
            seconds=form.seconds,
            hypervolume=None if volume is None else Hypervolume(**volume.model_dump()),
            knee=form.knee,
            end=form.end,
            false_stops=form.false_stops,
        )
        _check_rows(report)
        return report


def _points(rows: Sequence[PointFile]) -> tuple[FrontPoint, ...]:
    return tuple(
        FrontPoint(
            **row.model_dump(exclude={"replicated"}),
            replicated=None if row.replicated is None else Replicated.from_file(row.replicated),
        )
        for row in rows
    )


def _check_rows(report: FrontReport) -> None:
    """Refuse rows that lack an objective, and a front without the network it started from."""
    for place, rows in (("points", report.points), ("closest", report.closest)):
        for i, point in enumerate(rows):
            for objective in report.objectives:
                _check_has(point, objective.name, f"{place}.{i}")
    if sum(p.trial is None for p in report.baselines) != 1:
        msg = (
            "The file front.json: 'baselines': full precision (the row whose trial is null) must "
            "stand once. Restore the file from its source, or run the search again."
        )
        raise StorageError(msg)


def _check_has(point: FrontPoint, name: str, place: str) -> None:
    inside = name if name in MEASURED else f"cost.{name}"
    known = getattr(point, name) if name in MEASURED else point.cost.get(name)
    if known is None:
        msg = (
            f"The file front.json: '{place}.{inside}': an objective of the search is missing. "
            "Restore the file from its source, or run the search again."
        )
        raise StorageError(msg)


def make_front_report(
    study: str,
    *,
    objectives: Sequence[Objective],
    budgets: Mapping[str, float],
    records: Sequence[TrialRecord],
    full_precision: FrontPoint,
    test_accuracies: Mapping[str, float] | None,
    kept_weights: Collection[str],
    integer_checks: Mapping[str, IntegerCheck] | None = None,
    replicates: Mapping[str, Sequence[Replicate]] | None = None,
    seed: int = 0,
    n_rejected: int = 0,
    n_repeated: int = 0,
    prior: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    end: Mapping[str, Any] | None = None,
    false_stops: Mapping[str, int] | None = None,
) -> FrontReport:
    """Draw the sum of a search.

    Args:
        study: Its name.
        objectives: Its axes.
        budgets: Upper limits on cost figures.
        records: All its trials.
        full_precision: The unquantized network; see `full_precision_point`.
        test_accuracies: Test accuracy by policy hash; every policy of the front must have one.
            None while the search runs and the test part is not to be touched.
        kept_weights: Hashes of the policies whose weights lie in the results folder.
        integer_checks: How the lowered networks agree, by policy hash.
        replicates: Further trainings of the policies of the front, by policy hash.
        seed: Of the draws that judge those.
        n_rejected: Draws over budget, refused before training.
        n_repeated: Draws of a policy that was measured already.
        prior: What the prior said of itself.
        seconds: Where the time went, by part.
        end: Why the search ended before its last trial.
        false_stops: What became of trials that a pruner condemned.

    Raises:
        StorageError: A complete trial lacks an objective, or a front policy its test accuracy.
        CostError: An objective or budget names no figure.
    """

    def point(record: TrialRecord) -> FrontPoint:
        name = record.policy_hash
        check = (integer_checks or {}).get(name, IntegerCheck(None))
        return _point(record, (test_accuracies or {}).get(name), check, kept_weights)

    front = select_front(records, objectives, budgets)
    missing = [r for r in front if r.policy_hash not in (test_accuracies or {})]
    if test_accuracies is not None and missing:
        untested = [r.number for r in missing]
        msg = f"Every policy of the front is tested once, but trials {untested} are not. Test them."
        raise StorageError(msg)
    judged = judge_front(front, replicates or {}, objectives, seed=seed)
    states = Counter[str](r.state for r in records)
    values = [[r.value(o.name) for o in objectives] for r in front]
    knee = knee_index(values, [o.direction for o in objectives])
    closest = () if front else least_violating(records, budgets, N_CLOSEST)
    axis, _ = axes_of(objectives)
    return FrontReport(
        study=study,
        objectives=tuple(objectives),
        budgets=dict(budgets),
        points=tuple(replace(point(r), replicated=judged.get(r.policy_hash)) for r in front),
        baselines=(
            *(point(r) for r in sorted(uniform_records(records), key=lambda r: r.cost[axis])),
            full_precision,
        ),
        closest=tuple(replace(point(r), policy_file=None, weights_file=None) for r in closest),
        counts={**states, "rejected": n_rejected, "repeated": n_repeated},
        prior=None if prior is None else dict(prior),
        seconds=dict(seconds or {}),
        hypervolume=hypervolume_of(
            records,
            objectives,
            budgets,
            retrained=[
                {**r.cost, **found.means}
                for r in front
                if (found := judged.get(r.policy_hash)) is not None
            ],
        ),
        knee=None if knee is None else front[knee].policy_hash,
        end=None if end is None else dict(end),
        false_stops=None if false_stops is None else dict(false_stops),
    )


def full_precision_point(
    *,
    accuracy: float,
    test_accuracy: float | None,
    loss: float | None,
    cost: Mapping[str, float],
    weights_file: str | None = None,
) -> FrontPoint:
    """Return the point of the unquantized network: the teacher, so its KL is 0."""
    return FrontPoint(
        trial=None,
        origin=FULL_PRECISION,
        policy_hash=None,
        accuracy=accuracy,
        test_accuracy=test_accuracy,
        loss=loss,
        kl=0.0,
        cost=dict(cost),
        policy_file=None,
        weights_file=weights_file,
    )


def _point(
    record: TrialRecord,
    test_accuracy: float | None,
    check: IntegerCheck,
    kept_weights: Collection[str],
) -> FrontPoint:
    name = record.policy_hash
    return FrontPoint(
        trial=record.number,
        origin=record.origin,
        policy_hash=name,
        accuracy=record.accuracy,
        test_accuracy=test_accuracy,
        loss=record.loss,
        kl=record.kl,
        cost=dict(record.cost),
        policy_file=f"policies/{name}.json",
        weights_file=f"weights/{name}.safetensors" if name in kept_weights else None,
        state=record.state,
        integer_verified=check.is_verified,
        integer_samples=check.samples,
        integer_reason=check.reason,
        donor=record.donor,
    )
