"""Whether a trial is worth finishing, given how others went that finished: any host's rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adq_search.errors import AdqSearchError
from adq_search.guide import forecast_end
from adq_search.job import MEASURED
from adq_search.pareto import Direction, dominates
from adq_search.plan import Plan


class Finished(NamedTuple):
    """A finished trial.

    Attributes:
        values: Of the objectives.
        score: How it stood at the rung, smaller being better; None where nobody knows.
    """

    values: Sequence[float]
    score: float | None


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When to stop a trial; see `FrontPruner`.

    Args:
        rungs: Epochs at which trials may be stopped, rising.
        confidence: Probability that a condemned trial is dominated indeed, 0.5 to 1.
        spared: Share of condemned trials that run on, 0 to 1.
        seed: Of who is spared.

    Raises:
        AdqSearchError: An argument is out of range.
    """

    rungs: tuple[int, ...]
    confidence: float
    spared: float
    seed: int

    def __post_init__(self) -> None:
        rungs = self.rungs
        if not rungs or min(rungs) < 1 or list(rungs) != sorted(set(rungs)):
            msg = f"Rungs are rising epochs from 1 on, but are {rungs}. Give (2, 4)."
            raise AdqSearchError(msg)
        if not 0.5 <= self.confidence < 1.0 or not 0.0 <= self.spared <= 1.0:
            msg = (
                f"The confidence lies from 0.5 to below 1 and the spared share from 0 to 1, but "
                f"they are {self.confidence} and {self.spared}."
            )
            raise AdqSearchError(msg)

    def is_hopeless(
        self,
        finished: Sequence[Finished],
        score: float,
        known: Sequence[float],
        directions: Sequence[Direction],
        *,
        measured: int,
    ) -> bool:
        """Return whether the best end to be hoped for is dominated by a finished trial.

        Args:
            finished: The finished trials.
            score: How the trial stands at the rung, smaller being better.
            known: Its values of the objectives that are not measured, in their order.
            directions: Of all objectives.
            measured: Position of the objective that training measures.
        """
        sign = -1.0 if directions[measured] == "maximize" else 1.0
        comparable = [(t.values, t.score) for t in finished if t.score is not None]
        forecast = forecast_end(
            np.array([score for _, score in comparable]),
            np.array([sign * values[measured] for values, _ in comparable]),
            score,
        )
        if forecast is None:
            return False
        hoped = [*known[:measured], sign * forecast.at_best(self.confidence), *known[measured:]]
        return any(dominates(trial.values, hoped, directions) for trial in finished)

    def is_spared(self, luck: int) -> bool:
        """Whether a condemned trial runs on: always the same answer for the same number."""
        return float(np.random.default_rng([self.seed, luck]).random()) < self.spared


def rungs_of(plan: Plan) -> tuple[int, ...]:
    """Return the rungs of a job that asks for a pruner, none where it asks for none.

    They are all epochs from a quarter of the training on, but the last.
    """
    epochs = plan.job.training.epochs
    if plan.job.search.pruner == "none":
        return ()
    return tuple(range(max(1, epochs // 4), epochs))


def measured_axis(plan: Plan) -> int:
    """Return the position of the first objective that training measures."""
    return next(i for i, name in enumerate(plan.job.search.objectives) if name in MEASURED)
