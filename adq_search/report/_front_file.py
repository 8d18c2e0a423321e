"""The file `front.json`, field by field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from adq_search.pareto import Direction
from adq_search.report._read import StrictFile
from adq_search.report.records import TrialState
from adq_search.report.replicated import ReplicatedFile


class _ObjectiveFile(StrictFile):
    name: str
    direction: Direction


class PointFile(StrictFile):
    """A `FrontPoint`."""

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
    state: TrialState
    # Not in files of versions that did not lower the front.
    integer_verified: bool | None = None
    integer_samples: int = 0
    integer_reason: str | None = None
    # Not in files of versions that knew neither warm starts nor replicates.
    donor: str | None = None
    replicated: ReplicatedFile | None = None


class _HypervolumeFile(StrictFile):
    value: float
    share: float
    reference: dict[str, float]
    seeds_share: float | None = None
    retrained_share: float | None = None


class FrontFile(StrictFile):
    """A `FrontReport`."""

    schema_: Literal["adq_search.front/1"] = Field(alias="schema")
    study: str
    objectives: list[_ObjectiveFile] = Field(min_length=1)
    budgets: dict[str, float]
    points: list[PointFile]
    baselines: list[PointFile]
    closest: list[PointFile]
    counts: dict[str, int]
    prior: dict[str, Any] | None
    seconds: dict[str, float]
    hypervolume: _HypervolumeFile | None
    knee: str | None
    end: dict[str, Any] | None = None
    false_stops: dict[str, int] | None = None
