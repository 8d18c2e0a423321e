"""Who proposes the policies of a Ray search: the guide, or a sampler of Optuna's kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from adq_search.guide import (
    Guide,
    additive_costs,
    decisions_of,
    forecast_end,
)
from adq_search.hardware import CostTable
from adq_search.pareto import Objective
from adq_search.plugins.optuna_objective import distribution
from adq_search.sensitivity import SensitivityTable
from adq_search.space import Params, SearchSpace, params_of_group, precision_of

Row = tuple[int, ...]

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a proposal.

    Attributes:
        state: That of a trial's result; or `failed`, `over budget`, `repeated`, all unmeasured.
        values: Of the objectives, in their order; None unless complete.
        kl: To the teacher, nats; None unless complete.
        train_losses: Mean training loss of each epoch.
        excess: By how much each budget is exceeded.
    """

    state: str
    values: tuple[float, ...] | None = None
    kl: float | None = None
    train_losses: tuple[float, ...] = ()
    excess: Mapping[str, float] = field(default_factory=dict)


class Proposals(Protocol):
    """Proposes parameters, and learns what became of them."""

    def propose(self, number: int, running: Sequence[Params]) -> Params:
        """Return the parameters of draw `number`, beside trials that run."""
        ...

    def learn(self, params: Params, told: Told) -> None:
        """Take what became of a proposal, own or not."""
        ...


class GuideProposals:
    """The guide.

    Args:
        space: Which policies exist.
        table: What every choice costs.
        axes: The objectives; the first that is no cost figure is what training measures.
        budgets: Upper limits on cost figures.
        prior: Predicted loss increases.
        seed: Of the draws, which depend on it and on their numbers.
    """

    def __init__(
        self,
        space: SearchSpace,
        table: CostTable,
        axes: Sequence[Objective],
        budgets: Mapping[str, float],
        prior: SensitivityTable | None,
        *,
        seed: int,
    ) -> None:
        self._space = space
        self._seed = seed
        self._index = [{p: i for i, p in enumerate(group.choices)} for group in space.groups]
        costs = additive_costs(table)
        names = [axis.name for axis in axes]
        self._measured = next(i for i, name in enumerate(names) if name not in costs)
        self._sign = -1.0 if axes[self._measured].direction == "maximize" else 1.0
        objectives = [name for name in names if name in costs]
        figures = [*objectives, *(name for name in budgets if name not in objectives)]
        self._guide = Guide(
            decisions_of(space, prior, [costs[name] for name in figures]),
            n_objectives=len(objectives),
            budgets={figures.index(name): limit for name, limit in budgets.items()},
        )
        self._curves: list[tuple[tuple[float, ...], float]] = []

    def propose(self, number: int, running: Sequence[Params]) -> Params:
        """Return the parameters of draw `number`, beside trials that run."""
        rng = np.random.default_rng([self._seed, number])
        row = self._guide.propose(rng, [self._row(params) for params in running])
        out: Params = {}
        for group, choice in zip(self._space.groups, row, strict=True):
            out |= params_of_group(group, group.choices[choice])
        return out

    def learn(self, params: Params, told: Told) -> None:
        """Take what became of a proposal; one stopped early counts as what it was heading for."""
        row = self._row(params)
        if told.state == "repeated":
            return
        if told.values is not None and told.kl is not None:
            log_loss = math.log(max(told.kl, _TINY))
            self._guide.tell(row, log_loss, value=self._sign * told.values[self._measured])
            self._curves.append((told.train_losses, log_loss))
        elif told.state != "stopped" or not self._learn_forecast(row, told.train_losses):
            self._guide.tell_failure(row, diverged=told.state == "diverged")

    def _learn_forecast(self, row: Row, losses: Sequence[float]) -> bool:
        epoch = len(losses)
        comparable = [(curve, end) for curve, end in self._curves if len(curve) >= epoch > 0]
        if not comparable:
            return False
        forecast = forecast_end(
            np.array([curve[epoch - 1] for curve, _ in comparable]),
            np.array([end for _, end in comparable]),
            losses[-1],
        )
        if forecast is not None:
            self._guide.tell_stopped(row, forecast.end, error=forecast.error)
        return forecast is not None

    def _row(self, params: Params) -> Row:
        return tuple(
            0 if group.pinned is not None else index[precision_of(group, params)]
            for group, index in zip(self._space.groups, self._index, strict=True)
        )


class SamplerProposals:
    """A sampler of Optuna's kind, over a study in memory.

    Args:
        space: Which policies exist.
        axes: The objectives.
        sampler: Proposes.
    """

    def __init__(self, space: SearchSpace, axes: Sequence[Objective], sampler: BaseSampler) -> None:
        self._distributions = {p.name: distribution(p) for p in space.parameters}
        self._study = optuna.create_study(
            directions=[axis.direction for axis in axes], sampler=sampler
        )
        self._running: dict[frozenset[tuple[str, Any]], list[Trial]] = {}

    def propose(self, number: int, running: Sequence[Params]) -> Params:
        """Return the parameters of the next draw. The study knows of those that run."""
        trial = self._study.ask(self._distributions)
        self._running.setdefault(_key(trial.params), []).append(trial)
        return dict(trial.params)

    def learn(self, params: Params, told: Told) -> None:
        """Take what became of a proposal; any that did not complete is pruned or failed."""
        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        state = states.get(told.state, TrialState.PRUNED)
        open_trials = self._running.get(_key(params), [])
        if not open_trials:
            added = optuna.trial.create_trial(
                params=dict(params),
                distributions=self._distributions,
                values=told.values,
                state=state,
                constraints=dict(told.excess),
            )
            self._study.add_trial(added)
            return
        trial = open_trials.pop()
        for name, amount in told.excess.items():
            trial.set_constraint(name, amount)
        self._study.tell(trial, told.values, state=state)


def _key(params: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(params.items())
