"""What `PolicySampler` reads out of a study: trials as the guide's choices and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from adq_search.errors import CostError, SpaceError, did_you_mean
from adq_search.guide import (
    Decision,
    Guide,
    Rows,
    bit_products,
    decisions_of,
    extra_decision,
    forecast_end,
    learned_costs,
)
from adq_search.plugins.optuna_objective import Verdict
from adq_search.plugins.optuna_pruner import scores_of
from adq_search.sensitivity import SensitivityTable
from adq_search.space import SearchSpace, params_of_group, precision_of

Row = tuple[int, ...]

#: Values that a continuous parameter is tried at.
_N_GRID = 65
#: Learned costs and ranks are learned anew when this many times more trials have finished.
_GROWTH = 1.15
#: The best of an objective that has no zero is taken to lie this share of the spread above it.
_MARGIN = 0.02
_TINY = 1e-12
_WITH_PARAMETERS = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True, eq=False)
class Reading:
    """How a study is read; see `PolicySampler`."""

    space: SearchSpace
    prior: SensitivityTable | None
    costs: Mapping[str, Rows]
    objectives: tuple[str, ...]
    budgets: dict[str, float]

    def __post_init__(self) -> None:
        for name in self.budgets:
            if name not in self.costs:
                msg = (
                    f"There is a budget on '{name}', but no such cost figure. "
                    f"{did_you_mean(name, self.costs)}"
                )
                raise CostError(msg)

    def measured(self) -> int:
        """Return the position of the objective that training measures."""
        unknown = [i for i, name in enumerate(self.objectives) if name not in self.costs]
        return unknown[0] if unknown else 0


class Coder:
    """Translates between parameters and the guide's choices.

    Args:
        reading: How the study is read.
        extras: Parameters beside the space's that every finished trial has.
    """

    def __init__(self, reading: Reading, extras: dict[str, BaseDistribution]) -> None:
        self.extras = extras
        self._groups = reading.space.groups
        self._precisions = [group.choices for group in self._groups]
        self._index = [{p: i for i, p in enumerate(row)} for row in self._precisions]
        self._params = [
            [params_of_group(group, p) for p in row]
            for group, row in zip(self._groups, self._precisions, strict=True)
        ]
        self._grids = {name: _grid(found) for name, found in extras.items()}

    def decisions(self, groups: Sequence[Decision], n_costs: int) -> tuple[Decision, ...]:
        """Return the groups' decisions and those of the further parameters."""
        further = [
            extra_decision(name, _positions(found, self._grids[name]), n_costs)
            for name, found in self.extras.items()
        ]
        return (*groups, *further)

    def params_of(self, row: Row) -> dict[str, Any]:
        """Return the parameters of a proposal."""
        out: dict[str, Any] = {}
        n = len(self._groups)
        for params, c in zip(self._params, row[:n], strict=True):
            out |= params[c]
        for (name, grid), c in zip(self._grids.items(), row[n:], strict=True):
            out[name] = grid[c]
        return out

    def row_of(self, params: Mapping[str, Any]) -> Row | None:
        """Return the choices of a trial; None where it lacks parameters or is no policy of ours."""
        try:
            row = [
                0 if group.pinned is not None else index[precision_of(group, params)]
                for group, index in zip(self._groups, self._index, strict=True)
            ]
            for name, grid in self._grids.items():
                row.append(_nearest(self.extras[name], grid, params[name]))
        except (KeyError, SpaceError):
            return None
        return tuple(row)


class CommonParameters:
    """The parameters of every finished trial of a study, as `IntersectionSearchSpace` has them.

    That one copies them all at each call, which takes longer than a proposal.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._n_settled = 0
        self._found: dict[str, BaseDistribution] = {}

    def of(self, trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
        """Return them by name, with the distribution they all have.

        Args:
            trials: All trials of the study.
        """
        while self._n_settled < len(trials) and trials[self._n_settled].number in self._seen:
            self._n_settled += 1
        for trial in trials[self._n_settled :]:
            if trial.number in self._seen or trial.state not in _WITH_PARAMETERS:
                continue
            theirs = trial.distributions
            if self._seen:
                kept = self._found.items()
                self._found = {n: d for n, d in kept if theirs.get(n) == d}
            else:
                self._found = dict(theirs)
            self._seen.add(trial.number)
        return dict(self._found)


@dataclass
class History:
    """The trials of one study, as told to a guide.

    Attributes:
        reading: How the study is read.
        coder: Translates parameters.
        proposed: What was proposed for trials by this process, by their numbers.
    """

    reading: Reading
    coder: Coder
    proposed: dict[int, Row] = field(default_factory=dict)
    _rows: dict[int, Row | None] = field(default_factory=dict)
    _told: set[int] = field(default_factory=set)
    _guide: Guide | None = None
    _n_at_start: int = 0
    _has_kl: bool | None = None
    _curves: list[tuple[dict[int, float], float]] = field(default_factory=list)
    _zero: float = 0.0
    _least: float = 0.0

    def read(self, directions: Sequence[StudyDirection], finished: Sequence[FrozenTrial]) -> Guide:
        """Return a guide that was told of all finished trials."""
        if self._guide is None or self._is_stale(directions, len(finished)):
            self._guide = self._start(directions, finished)
            self._told.clear()
            self._curves.clear()
            self._n_at_start = len(finished)
        for trial in finished:
            if trial.number not in self._told:
                self._tell(self._guide, directions, trial)
                self._told.add(trial.number)
                self.proposed.pop(trial.number, None)
        return self._guide

    def pending(self, running: Sequence[FrozenTrial]) -> list[Row]:
        """Return the policies of running trials, as far as they are known."""
        rows = [self.proposed.get(t.number) or self._row(t) for t in running]
        return [row for row in rows if row is not None]

    def _row(self, trial: FrozenTrial) -> Row | None:
        if trial.number in self._rows:
            return self._rows[trial.number]
        row = self.coder.row_of(trial.params)
        if row is not None or trial.state.is_finished():
            self._rows[trial.number] = row
        return row

    def _is_stale(self, directions: Sequence[StudyDirection], n: int) -> bool:
        """Whether something learned outside the guide should be learned anew."""
        learns = bool(self._learned(directions)) or not self._has_kl
        return learns and n >= max(_GROWTH * self._n_at_start, self._n_at_start + 1)

    def _learned(self, directions: Sequence[StudyDirection]) -> list[int]:
        """Return the positions of objectives whose costs are learned."""
        names = [*self.reading.objectives, *[""] * len(directions)][: len(directions)]
        measured = self.reading.measured()
        return [i for i, n in enumerate(names) if i != measured and n not in self.reading.costs]

    def _start(
        self, directions: Sequence[StudyDirection], finished: Sequence[FrozenTrial]
    ) -> Guide:
        """Return a guide that knows the decisions and costs, and no trial yet."""
        reading = self.reading
        known = [n for n in reading.objectives[: len(directions)] if n in reading.costs]
        figures = list(dict.fromkeys([*known, *reading.budgets]))
        complete = [
            (t, row)
            for t in finished
            if t.state == TrialState.COMPLETE
            and not _is_repeat(t)
            and (row := self._row(t)) is not None
        ]
        self._has_kl = all(_kl_of(t) is not None for t, _ in complete) if complete else None
        self._scale(directions, [t for t, _ in complete])
        learned = [
            self._learn_costs(directions, position, complete)
            for position in self._learned(directions)
        ]
        costs = [*learned, *(reading.costs[name] for name in figures)]
        groups = decisions_of(reading.space, reading.prior, costs)
        budgets = {
            len(learned) + figures.index(name): limit for name, limit in reading.budgets.items()
        }
        return Guide(
            self.coder.decisions(groups, len(costs)),
            n_objectives=len(learned) + len(known),
            budgets=budgets,
        )

    def _learn_costs(
        self,
        directions: Sequence[StudyDirection],
        position: int,
        complete: Sequence[tuple[FrozenTrial, Row]],
    ) -> Rows:
        """Return what choices cost in an objective, as far as the trials tell."""
        space = self.reading.space
        guess = bit_products(space)
        if len(complete) < 2:
            return guess
        sign = _sign(directions[position])
        values = np.array([sign * t.values[position] for t, _ in complete])
        rows = np.array([row for _, row in complete])[:, : len(space.groups)]
        return learned_costs(decisions_of(space), guess, rows, values)

    def _scale(self, directions: Sequence[StudyDirection], complete: Sequence[FrozenTrial]) -> None:
        """Choose how values become losses, for studies without KL: distance from the best."""
        self._zero, self._least = 0.0, _TINY
        if self._has_kl or not complete:
            return
        values = [self._value(directions, t) for t in complete]
        if min(values) <= 0.0:
            spread = (max(values) - min(values)) or 1.0
            self._zero, self._least = min(values) - _MARGIN * spread, 0.2 * _MARGIN * spread

    def _value(self, directions: Sequence[StudyDirection], trial: FrozenTrial) -> float:
        measured = self.reading.measured()
        return _sign(directions[measured]) * float(trial.values[measured])

    def _tell(self, guide: Guide, directions: Sequence[StudyDirection], trial: FrozenTrial) -> None:
        row = self._row(trial)
        if row is None or _is_repeat(trial):
            return
        if trial.state == TrialState.COMPLETE:
            value = self._value(directions, trial)
            kl = _kl_of(trial)
            if self._has_kl and kl is None:
                guide.tell_failure(row, diverged=False)
                return
            loss = kl if self._has_kl and kl else max(value - self._zero, self._least)
            guide.tell(row, math.log(loss), value=value)
            self._curves.append((scores_of(trial), math.log(loss)))
        elif not self._tell_forecast(guide, trial, row):
            result = trial.user_attrs.get("result") or {}
            guide.tell_failure(row, diverged=result.get("state") == "diverged")

    def _tell_forecast(self, guide: Guide, trial: FrozenTrial, row: Row) -> bool:
        """Tell what a trial stopped by a pruner would have come to; False where none can say."""
        scores = scores_of(trial)
        if trial.state != TrialState.PRUNED or not scores:
            return False
        epoch = max(scores)
        forecast = forecast_end(
            np.array([s[epoch] for s, _ in self._curves if epoch in s]),
            np.array([end for s, end in self._curves if epoch in s]),
            scores[epoch],
        )
        if forecast is None:
            return False
        guide.tell_stopped(row, forecast.end, error=forecast.error)
        return True


def _is_repeat(trial: FrozenTrial) -> bool:
    """Whether `PolicyObjective` answered from an earlier trial."""
    return bool(trial.user_attrs.get("verdict") == Verdict.REPEATED)


def _sign(direction: StudyDirection) -> float:
    return -1.0 if direction == StudyDirection.MAXIMIZE else 1.0


def _kl_of(trial: FrozenTrial) -> float | None:
    """Return the KL to the teacher that a trial measured, nats; None without a positive one."""
    attrs = trial.user_attrs
    found = attrs.get("kl", (attrs.get("result") or {}).get("kl"))
    return float(found) if found is not None and found > 0.0 else None


def _grid(found: BaseDistribution) -> tuple[Any, ...]:
    """Return the values that a parameter is tried at, ascending where it is ordered."""
    if isinstance(found, CategoricalDistribution):
        return tuple(found.choices)
    assert isinstance(found, FloatDistribution | IntDistribution)
    step = found.step
    if step is not None and not found.log and (found.high - found.low) / step < _N_GRID:
        n = round((found.high - found.low) / step)
        return tuple(found.low + i * step for i in range(n + 1))
    low, high = float(found.low), float(found.high)
    points = np.geomspace(low, high, _N_GRID) if found.log else np.linspace(low, high, _N_GRID)
    if step is not None:
        points = low + np.round((points - low) / step) * step
    points = np.unique(np.clip(points, low, high))
    if isinstance(found, IntDistribution):
        return tuple(dict.fromkeys(round(p) for p in points))
    return tuple(float(p) for p in points)


def _place(found: BaseDistribution, value: float) -> float:
    """Return where a value lies in its range, 0 to 1."""
    assert isinstance(found, FloatDistribution | IntDistribution)
    low, high = float(found.low), float(found.high)
    if high == low:
        return 0.0
    if found.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _positions(found: BaseDistribution, grid: tuple[Any, ...]) -> list[float] | int:
    if isinstance(found, CategoricalDistribution):
        return len(grid)
    return [_place(found, value) for value in grid]


def _nearest(found: BaseDistribution, grid: tuple[Any, ...], value: Any) -> int:
    if isinstance(found, CategoricalDistribution):
        return grid.index(value)
    place = _place(found, value)
    return min(range(len(grid)), key=lambda i: abs(_place(found, grid[i]) - place))
