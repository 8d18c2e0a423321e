"""Finished trials as plain values, and which of them are the front.

Example:
    >>> from adq_search.pareto import Objective
    >>> from adq_search.policy import LayerPrecision, Policy
    >>> def trial(number, bits, accuracy, energy_pj):
    ...     policy = Policy.of({"fc": LayerPrecision(bits, bits, "lsq")})
    ...     cost = {"energy_pj": energy_pj}
    ...     return TrialRecord(number, policy, {}, "complete", "sampler", accuracy, 0.1, 0.1, cost)
    >>> trials = [trial(0, 2, 0.5, 1.0), trial(1, 3, 0.9, 2.0), trial(2, 4, 0.8, 3.0)]
    >>> axes = [Objective("accuracy", "maximize"), Objective("energy_pj", "minimize")]
    >>> [t.number for t in select_front(trials, axes, {})]
    [0, 1]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from pydantic import Field

from adq_search.errors import PolicyError, StorageError
from adq_search.pareto import Objective, front_indices
from adq_search.policy import Policy
from adq_search.report._read import MEASURED, StrictFile, figure_of
from adq_search.validation import validated

TrialState = Literal["complete", "diverged", "stopped", "failed"]
SCHEMA = "adq_search.trials/1"
#: How the origin of a baseline begins.
UNIFORM = "uniform "


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a study, whichever host ran it.

    Attributes:
        number: The host's number of the trial.
        policy: What was tried.
        parameters: What the host drew, by parameter name.
        state: `complete` trials alone may be on the front.
        origin: Who proposed the policy: `sampler`, `uniform W4A4`, `prior fisher 3/8`, `manual`.
        accuracy: On the validation part, 0 to 1; None where it was not measured.
        loss: Validation cross-entropy, nats.
        kl: Validation KL from the teacher, nats.
        cost: Total cost figures by name; known before training, so always there.
        epochs: Epochs trained (the fidelity).
        wall_s: Seconds the trial took.
        reason: Why it diverged, stopped or failed.
        health: Steps of wrong sign, saturation, dead levels: totals, and `layers`.
        host_label: Which worker ran it.
        started_at: ISO 8601, UTC.
        donor: Hash of the policy whose weights training began from; None for a cold start.
        epochs_before: Epochs that those weights had been trained for.
    """

    number: int
    policy: Policy
    parameters: dict[str, int | float | str]
    state: TrialState
    origin: str
    accuracy: float | None
    loss: float | None
    kl: float | None
    cost: dict[str, float]
    epochs: int = 0
    wall_s: float = 0.0
    reason: str | None = None
    health: dict[str, Any] = field(default_factory=dict)
    host_label: str = ""
    started_at: str = ""
    donor: str | None = None
    epochs_before: int = 0

    @property
    def policy_hash(self) -> str:
        """The hash of the policy."""
        return self.policy.hash

    @property
    def is_complete(self) -> bool:
        """Whether the trial was trained to its end and did not diverge."""
        return self.state == "complete"

    @property
    def is_seed(self) -> bool:
        """Whether a prior or a baseline proposed the policy, not the sampler."""
        return self.origin.startswith(("prior", UNIFORM))

    def value(self, name: str) -> float:
        """Return an objective by name: `accuracy`, `loss`, `kl`, or a cost figure.

        Raises:
            CostError: Nothing has this name.
            StorageError: It was not measured.
        """
        measured = {key: getattr(self, key) for key in MEASURED}
        return figure_of(name, measured, self.cost, who=f"Trial {self.number}")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON content."""
        return {**asdict(self), "policy": self.policy.to_json()}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Build a record from its JSON form.

        Raises:
            StorageError: The content is damaged, with the field at fault.
        """
        form = validated(_RecordFile, content, StorageError, what="the trial record")
        try:
            policy = Policy.from_json(form.policy)
        except PolicyError as error:
            msg = f"The record of trial {form.number} is damaged: {error}"
            raise StorageError(msg) from error
        return cls(**{**form.model_dump(), "policy": policy})


class _RecordFile(StrictFile):
    number: int
    policy: dict[str, Any]
    parameters: dict[str, int | float | str]
    state: TrialState
    origin: str
    accuracy: float | None
    loss: float | None
    kl: float | None
    cost: dict[str, float]
    epochs: int
    wall_s: float
    reason: str | None
    health: dict[str, Any]
    host_label: str
    started_at: str
    # Not in files of versions that knew no warm start.
    donor: str | None = None
    epochs_before: int = 0


class _TrialsFile(StrictFile):
    schema_: Literal["adq_search.trials/1"] = Field(alias="schema")
    trials: list[dict[str, Any]]


def excess_of(cost: Mapping[str, float], budgets: Mapping[str, float], *, who: str) -> float:
    """Return the sum over budgets of the share by which each is exceeded; 0 is within all.

    Raises:
        CostError: A budget names a figure that the cost lacks.
    """
    over = (figure_of(name, {}, cost, who=who) / limit - 1.0 for name, limit in budgets.items())
    return sum(max(0.0, share) for share in over)


def is_within(record: TrialRecord, budgets: Mapping[str, float]) -> bool:
    """Whether a trial's cost meets every budget, limits included."""
    return excess_of(record.cost, budgets, who=f"Trial {record.number}") == 0.0


def select_front(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    budgets: Mapping[str, float],
) -> list[TrialRecord]:
    """Return the trials that no other trial beats: complete, within all budgets, each policy once.

    Of trials of one policy the one with the lowest number counts, not the luckiest.

    Returns:
        The front, cheapest first by the first cost objective; ties by number.

    Raises:
        CostError: An objective or budget names no figure.
        StorageError: A complete trial lacks an objective.
    """
    eligible = [r for r in _first_of_each_policy(records) if is_within(r, budgets)]
    values = [[r.value(o.name) for o in objectives] for r in eligible]
    if not eligible:
        return []
    front = [eligible[i] for i in front_indices(values, [o.direction for o in objectives])]
    axis = next((o.name for o in objectives if o.name not in MEASURED), objectives[0].name)
    return sorted(front, key=lambda r: (r.value(axis), r.number))


def least_violating(
    records: Sequence[TrialRecord], budgets: Mapping[str, float], n: int
) -> list[TrialRecord]:
    """Return the `n` complete trials nearest to meeting the budgets, nearest first.

    Near is the sum over budgets of the share by which each is exceeded.
    """
    distinct = _first_of_each_policy(records)
    far = {r.number: excess_of(r.cost, budgets, who=f"Trial {r.number}") for r in distinct}
    return sorted(distinct, key=lambda r: (far[r.number], r.number))[:n]


def uniform_records(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the first trial of each uniform baseline, whatever became of it."""
    first: dict[str, TrialRecord] = {}
    for record in sorted(records, key=lambda r: r.number):
        if record.origin.startswith(UNIFORM):
            first.setdefault(record.origin, record)
    return list(first.values())


def trials_to_json(records: Sequence[TrialRecord]) -> dict[str, Any]:
    """Return the content of `trials.json`."""
    return {"schema": SCHEMA, "trials": [record.to_json() for record in records]}


def trials_from_json(content: Any) -> list[TrialRecord]:
    """Build the records of `trials.json`.

    Raises:
        StorageError: The content is damaged, with the field at fault.
    """
    form = validated(_TrialsFile, content, StorageError, what="the file trials.json")
    return [TrialRecord.from_json(trial) for trial in form.trials]


def _first_of_each_policy(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    first: dict[Policy, TrialRecord] = {}
    for record in sorted(records, key=lambda r: r.number):
        if record.is_complete:
            first.setdefault(record.policy, record)
    return list(first.values())
