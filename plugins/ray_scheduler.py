"""`FrontScheduler`: early stopping for Tune experiments with several objectives.

Example:
    >>> # tune.TuneConfig(search_alg=PolicySearcher(session), scheduler=FrontScheduler(
    >>> #     (2, 4), objectives={"accuracy": "max", "energy_pj": "min"}, measured="accuracy"))
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from adq_search.errors import AdqSearchError, did_you_mean
from adq_search.pareto import Direction
from adq_search.plan import Plan
from adq_search.plugins._ray_installed import FIFOScheduler, Trial, TrialScheduler
from adq_search.plugins._stopping_rule import Finished, StoppingRule, measured_axis, rungs_of
from adq_search.trial import TrialResult

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class FrontScheduler(FIFOScheduler):
    """Stops a trial that, at its best, would be dominated by a finished one.

    It is `FrontPruner` for Tune: one objective is measured by training, all others are known from
    the first report on, as costs are. At a rung the training loss is compared with the losses that
    finished trials had there, and with what became of them; that gives the best end to be hoped
    for. A share of the condemned trials runs on all the same, so that the rate of false stops is
    known.

    Its rungs are read from the trials themselves, whose reports carry their curve (`train_losses`),
    as those of `policy_trainable` do. Nothing is kept beside them, so nothing is lost when Tune,
    which saves no scheduler, restores an experiment.

    Attributes:
        condemned: Ray's names of the trials that a rung condemned, spared ones too.

    Args:
        rungs: Epochs at which trials may be stopped, rising.
        objectives: `max` or `min` of every objective, by its name in the reports.
        measured: The one that training measures.
        confidence: Probability that a condemned trial is dominated indeed, 0.5 to 1.
        spared: Share of condemned trials that run on, 0 to 1.
        seed: Of who is spared; a trial's luck depends on it and on its policy.
        known: Values of the objectives and training losses of trials finished before.

    Raises:
        AdqSearchError: An argument is out of range, or `measured` is no objective.
    """

    def __init__(
        self,
        rungs: Sequence[int],
        *,
        objectives: Mapping[str, Literal["max", "min"]],
        measured: str,
        confidence: float = 0.9,
        spared: float = 0.1,
        seed: int = 0,
        known: Iterable[tuple[tuple[float, ...], Sequence[float]]] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule = StoppingRule(tuple(rungs), confidence, spared, seed)
        if measured not in objectives:
            msg = f"'{measured}' is no objective. {did_you_mean(measured, objectives)}"
            raise AdqSearchError(msg)
        self._names = tuple(objectives)
        self._directions: list[Direction] = [
            "maximize" if mode == "max" else "minimize" for mode in objectives.values()
        ]
        self._measured = self._names.index(measured)
        self._known = tuple(known)
        self.condemned: set[str] = set()

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        """Say whether a trial goes on after a report."""
        epoch = result["training_iteration"]
        if result.get("state") != "running" or epoch not in self._rule.rungs:
            return TrialScheduler.CONTINUE
        if trial.trial_id in self.condemned:  # and spared
            return TrialScheduler.CONTINUE
        known = [float(result[name]) for i, name in enumerate(self._names) if i != self._measured]
        hopeless = self._rule.is_hopeless(
            [*self._finished(tune_controller, epoch)],
            result["train_loss"],
            known,
            self._directions,
            measured=self._measured,
        )
        if not hopeless:
            return TrialScheduler.CONTINUE
        self.condemned.add(trial.trial_id)
        is_spared = self._rule.is_spared(zlib.crc32(str(result["policy_hash"]).encode()))
        return TrialScheduler.CONTINUE if is_spared else TrialScheduler.STOP

    def debug_string(self) -> str:
        """Return a line on what was done, for Tune's own progress output."""
        return (
            f"FrontScheduler at epochs {self._rule.rungs}: {len(self.condemned)} trials condemned"
        )

    def _finished(self, tune_controller: TuneController, epoch: int) -> Iterator[Finished]:
        """Yield the trials that are finished and complete; one that was stopped is neither."""
        trials = {  # one of each policy: a repeated one tells nothing new
            last["policy_hash"]: (
                tuple(float(last[name]) for name in self._names),
                last["train_losses"],
            )
            for trial in tune_controller.get_trials()  # type: ignore[no-untyped-call]
            if trial.status == Trial.TERMINATED
            and (last := trial.last_result or {}).get("state") == "complete"
        }
        for values, losses in (*self._known, *trials.values()):
            yield Finished(values, losses[epoch - 1] if len(losses) >= epoch else None)


def make_scheduler(
    plan: Plan, known: Iterable[tuple[TrialResult, Sequence[float]]]
) -> FrontScheduler | None:
    """Return the scheduler that a job asks for, None where it asks for none.

    Args:
        plan: The job, resolved.
        known: Earlier trials' results and training losses.
    """
    rungs = rungs_of(plan)
    if not rungs:
        return None
    axes = plan.job.search.axes
    return FrontScheduler(
        rungs,
        objectives={a.name: "max" if a.direction == "maximize" else "min" for a in axes},
        measured=axes[measured_axis(plan)].name,
        seed=plan.job.search.seed,
        known=[(plan.values(r), losses) for r, losses in known if r.state == "complete"],
    )
