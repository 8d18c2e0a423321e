"""`FrontPruner`: early stopping for studies with several objectives, which Optuna itself lacks.

Example:
    >>> # pruner = FrontPruner(rungs=(2, 4), seed=0)
    >>> # def objective(trial):
    >>> #     cost = ...  # known before training
    >>> #     for epoch in range(1, 9):
    >>> #         loss = train_one_epoch()
    >>> #         if pruner.should_stop(trial, epoch, loss, known=[cost]):
    >>> #             raise optuna.TrialPruned
    >>> #     return accuracy, cost
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from adq_search.errors import AdqSearchError
from adq_search.pareto import Direction, front_indices
from adq_search.plan import Plan
from adq_search.plugins._stopping_rule import Finished, StoppingRule, measured_axis, rungs_of
from adq_search.stopping import FalseStops

#: User attribute that holds a trial's scores, and the epoch at which it was condemned.
SCORES = "front_pruner.scores"
CONDEMNED = "front_pruner.condemned"


class FrontPruner(BasePruner):
    """Stops a trial that, at its best, would be dominated by a finished one.

    One objective is measured by training; all others are known before, as costs are. At a rung, a
    score of the unfinished training, in any unit, is compared with the scores that finished trials
    had there, and with what became of them. That gives the best end to be hoped for. Where a
    finished trial is better than even that at no more cost, the trial is condemned. A share of the
    condemned trials runs on all the same, so that the rate of false stops is known.

    Scores are kept as user attributes: `Trial.report`, which refuses studies with several
    objectives, is not used. In a study with one objective the pruner also answers
    `Trial.should_prune`, from reported values.

    Args:
        rungs: Epochs at which trials may be stopped, rising.
        measured: Position of the objective that training measures.
        is_score_maximized: Whether larger scores are better, as accuracies are.
        confidence: Probability that a condemned trial is dominated indeed, 0.5 to 1.
        spared: Share of condemned trials that run on, 0 to 1.
        seed: Of who is spared; a trial's luck depends on it and on the trial's number.

    Raises:
        AdqSearchError: An argument is out of range.
    """

    def __init__(
        self,
        rungs: Sequence[int],
        *,
        measured: int = 0,
        is_score_maximized: bool = False,
        confidence: float = 0.9,
        spared: float = 0.1,
        seed: int = 0,
    ) -> None:
        self._rule = StoppingRule(tuple(rungs), confidence, spared, seed)
        self._measured = measured
        self._sign = -1.0 if is_score_maximized else 1.0

    def should_stop(
        self, trial: Trial, epoch: int, score: float, *, known: Sequence[float] = ()
    ) -> bool:
        """Keep a score, and say whether to stop the trial.

        Args:
            trial: The running trial.
            epoch: Epochs trained, from 1.
            score: How well it stands.
            known: Values of the objectives that are not measured, in their order.

        Raises:
            AdqSearchError: `known` has not one value for each objective but the measured one.
        """
        study = trial.study
        if len(known) != len(study.directions) - 1:
            msg = (
                f"The study has {len(study.directions)} objectives, of which training measures "
                f"one, but {len(known)} known values were given. Give one for each of the others."
            )
            raise AdqSearchError(msg)
        oriented = self.keep(trial, epoch, score)
        if epoch not in self._rule.rungs or CONDEMNED in trial.user_attrs:
            return False
        finished = {
            t.number: scores[epoch] for t in _complete(study) if epoch in (scores := scores_of(t))
        }
        if not self._is_hopeless(study, finished, oriented, list(map(float, known))):
            return False
        trial.set_user_attr(CONDEMNED, epoch)
        return not self._rule.is_spared(trial.number)

    def keep(self, trial: Trial, epoch: int, score: float) -> float:
        """Keep a score and decide nothing, as of an epoch before an interruption.

        Returns:
            The score, oriented: smaller is better.
        """
        oriented = self._sign * float(score)
        scores = trial.user_attrs.get(SCORES, {})
        if scores.get(str(epoch)) != oriented:
            trial.set_user_attr(SCORES, {**scores, str(epoch): oriented})
        return oriented

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Answer `Trial.should_prune` in a study with one objective."""
        step = trial.last_step
        if step is None or step not in self._rule.rungs:
            return False
        finished = {
            t.number: self._sign * t.intermediate_values[step]
            for t in _complete(study)
            if step in t.intermediate_values
        }
        score = self._sign * trial.intermediate_values[step]
        hopeless = self._is_hopeless(study, finished, score, [])
        return hopeless and not self._rule.is_spared(trial.number)

    def false_stops(self, study: Study) -> FalseStops:
        """Return what became of the condemned trials that were spared."""
        condemned = [t for t in study.get_trials(deepcopy=False) if CONDEMNED in t.user_attrs]
        spared = {t.number for t in condemned if t.state == TrialState.COMPLETE}
        complete = _complete(study)
        front = front_indices([t.values for t in complete], _directions(study))
        n_on_front = len(spared & {complete[i].number for i in front})
        return FalseStops(len(condemned), len(spared), n_on_front)

    def _is_hopeless(
        self, study: Study, finished: dict[int, float], score: float, known: list[float]
    ) -> bool:
        """Whether the best end to be hoped for is dominated.

        Args:
            study: Holds the finished trials.
            finished: Their scores at the rung, by number, smaller being better.
            score: The running trial's, likewise.
            known: Its values of the other objectives.
        """
        trials = [Finished(t.values, finished.get(t.number)) for t in _complete(study)]
        return self._rule.is_hopeless(
            trials, score, known, _directions(study), measured=self._measured
        )


def make_pruner(plan: Plan) -> FrontPruner | None:
    """Return the pruner that a job asks for, None where it asks for none."""
    rungs = rungs_of(plan)
    if not rungs:
        return None
    return FrontPruner(rungs, measured=measured_axis(plan), seed=plan.job.search.seed)


def scores_of(trial: FrozenTrial) -> dict[int, float]:
    """Return the scores that a trial kept, by epoch; smaller is better."""
    return {int(epoch): score for epoch, score in trial.user_attrs.get(SCORES, {}).items()}


def _complete(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _directions(study: Study) -> list[Direction]:
    is_maximized = [d == StudyDirection.MAXIMIZE for d in study.directions]
    return ["maximize" if m else "minimize" for m in is_maximized]
