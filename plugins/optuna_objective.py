"""`PolicyObjective`: a session as an objective for `study.optimize` or ask/tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from adq_search.checkpoint import TrainingCheckpoint
from adq_search.errors import StorageError
from adq_search.plan import Plan, check_fingerprint
from adq_search.plugins.optuna_lease import WORKER, worker_name
from adq_search.plugins.optuna_pruner import FrontPruner
from adq_search.policy import Policy
from adq_search.session import Session
from adq_search.space import Parameter
from adq_search.training import Monitor
from adq_search.trial import TrialResult

FINGERPRINT = "adq_search.fingerprint"
#: User attribute of a study whose search ended before its last trial: why.
STOPPED = "adq_search.stopped"
#: User attribute of a trial that trains a policy of the front again: with which seed.
REPLICATE_SEED = "replicate_seed"
_POLL_S = 0.02
_PATIENCE_S = 10.0


class Verdict(StrEnum):
    """What became of a drawn policy before any training."""

    MEASURED = "measured"
    OVER_BUDGET = "over budget"
    REPEATED = "repeated"
    SURPLUS = "surplus"
    REPLICATE = "replicate"


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's form of a parameter: ordinal dimensions are integers, not categories."""
    if parameter.kind == "categorical":
        return CategoricalDistribution(parameter.values)
    return IntDistribution(parameter.low, parameter.high, step=parameter.step)


def check_study(study: Study, plan: Plan) -> None:
    """Refuse a study whose directions or fingerprint are not this job's.

    Raises:
        StorageError: Says what differs.
    """
    stored = study.user_attrs.get(FINGERPRINT)
    where = f"study '{study.study_name}'"
    if stored is None:
        msg = f"The {where} was not made by adq_search. Choose another --study."
        raise StorageError(msg)
    check_fingerprint(stored, plan.fingerprint, where=where)
    if list(study.directions) != directions(plan):
        msg = f"The {where} has other objectives than this job. Choose another --study."
        raise StorageError(msg)


def directions(plan: Plan) -> list[StudyDirection]:
    """Return the directions of the job's objectives."""
    return [StudyDirection[axis.direction.upper()] for axis in plan.job.search.axes]


class PolicyObjective:
    """Measures the policy that a trial draws.

    Works with `study.optimize(objective, ...)`, with ask/tell, and from several processes that
    share one storage. Before any training it computes the cost and sets one Optuna constraint for
    each budget (feasible at zero or less); a draw over budget is pruned. A policy measured before
    returns its stored values; a trial that diverged is pruned, with its reason in the user
    attributes. Every figure is kept as user attribute `result`.

    Args:
        session: A prepared session.
        n_trials: Distinct policies to measure in the whole study; draws past it are pruned
            untrained, as are those after the search was stopped. None sets no limit.
        pruner: Stops hopeless trials by their training loss, but no seeds; their state is PRUNED,
            their scores stay in the user attributes. None lets every trial finish.
        checkpoint_of: Returns where a trial that measures a policy, with a seed of its own or the
            job's (None), saves itself, and goes on from if its worker died; by default a file in
            the session's folder.
        on_measured: Called with a trial and its result before the result is written into it.
        while_waiting: Called again and again while trials drawn earlier have no verdict yet; ends
            those of workers that are gone. None waits ten seconds for them and goes on.

    Example:
        >>> # study = optuna.create_study(directions=["maximize", "minimize"])
        >>> # study.optimize(PolicyObjective(session), n_trials=20)
    """

    def __init__(
        self,
        session: Session,
        *,
        n_trials: int | None = None,
        pruner: FrontPruner | None = None,
        checkpoint_of: Callable[[Trial, Policy, int | None], TrainingCheckpoint] | None = None,
        on_measured: Callable[[Trial, TrialResult], None] | None = None,
        while_waiting: Callable[[Trial], None] | None = None,
    ) -> None:
        self.session = session
        self.distributions = {p.name: distribution(p) for p in session.plan.space.parameters}
        self._n_trials = n_trials
        self._pruner = pruner
        self._checkpoint_of = checkpoint_of
        self._on_measured = on_measured
        self._while_waiting = while_waiting

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        """Return the objective values, or raise `optuna.TrialPruned`."""
        if REPLICATE_SEED in trial.user_attrs:
            return self._replicate(trial)
        found = self.settle(trial)
        if not isinstance(found, Policy):
            return found
        return self.finish(trial, self._measure(trial, found, self._monitor(trial, found)))

    def settle(self, trial: Trial) -> Policy | tuple[float, ...]:
        """Draw; return the policy that has to be measured, or the values where they are known.

        Raises:
            optuna.TrialPruned: The draw is not to be measured.
        """
        plan = self.session.plan
        policy = plan.space.policy_of(self._draw(trial))
        totals = plan.totals(policy)
        trial.set_user_attr("policy_hash", policy.hash)
        _sign(trial)
        excess = plan.excess(totals)
        for name, amount in excess.items():
            trial.set_constraint(name, amount)
        if any(amount > 0.0 for amount in excess.values()):
            over = ", ".join(f"{n} by {a:.6g}" for n, a in excess.items() if a > 0.0)
            self._settle(trial, Verdict.OVER_BUDGET)
            msg = f"over budget: {over}"
            raise optuna.TrialPruned(msg)
        earlier = self._settled_before(trial)
        same = next((t for t in earlier if t.user_attrs["policy_hash"] == policy.hash), None)
        if same is not None:
            return self._repeat(trial, same)
        is_full = self._n_trials is not None and len(earlier) >= self._n_trials
        if is_full or self._was_stopped(trial.study):
            self._settle(trial, Verdict.SURPLUS)
            msg = "the requested number of trials is reached, or the search was stopped"
            raise optuna.TrialPruned(msg)
        self._settle(trial, Verdict.MEASURED)
        trial.set_user_attr("origin", self.session.origin_of(policy))
        carried = trial.user_attrs.get("result")
        if carried is not None:  # queued again: its worker died after it had measured
            return self._values(TrialResult.from_json(carried))
        return policy

    def finish(self, trial: Trial, result: TrialResult) -> tuple[float, ...]:
        """Keep what the policy of a trial was measured to be; return the objective values.

        Raises:
            optuna.TrialPruned: The trial did not complete.
        """
        if self._on_measured is not None:
            self._on_measured(trial, result)
        trial.set_user_attr("result", result.to_json())
        return self._values(result)

    def _replicate(self, trial: Trial) -> tuple[float, ...]:
        """Train a policy of the front again with the seed that the trial names."""
        seed = int(trial.user_attrs[REPLICATE_SEED])
        policy = self.session.plan.space.policy_of(self._draw(trial))
        _sign(trial)
        for other in _live_trials(trial.study):
            theirs = other.user_attrs.get("policy_hash"), other.user_attrs.get(REPLICATE_SEED)
            if other.number < trial.number and theirs == (policy.hash, seed):
                msg = f"repeats trial {other.number}"
                raise optuna.TrialPruned(msg)
        result = self._measure(trial, policy, seed=seed)
        trial.set_user_attr("result", result.to_json())
        return self._values(result)

    def _measure(
        self, trial: Trial, policy: Policy, monitor: Monitor | None = None, seed: int | None = None
    ) -> TrialResult:
        saved = None if self._checkpoint_of is None else self._checkpoint_of(trial, policy, seed)
        return self.session.measure(policy, monitor, checkpoint=saved, seed=seed)

    def _monitor(self, trial: Trial, policy: Policy) -> _Rungs | None:
        """Return who watches a trial; seeds, which others are compared with, finish."""
        if self._pruner is None:
            return None
        is_seed = any(seed.policy == policy for seed in self.session.seeds)
        return _Rungs(trial, self._pruner, self._known(policy), can_stop=not is_seed)

    def _known(self, policy: Policy) -> list[float]:
        """Return the objectives that are known before training, in the study's order."""
        totals = self.session.plan.totals(policy)
        return [totals[n] for n in self.session.plan.job.search.objectives if n in totals]

    def _was_stopped(self, study: Study) -> bool:
        has_rule = self.session.plan.job.search.stop is not None
        return has_rule and study.user_attrs.get(STOPPED) is not None

    def _values(self, result: TrialResult) -> tuple[float, ...]:
        if result.state != "complete":
            raise optuna.TrialPruned(result.reason or result.state)
        return self.session.plan.values(result)

    def _draw(self, trial: Trial) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        for name, found in self.distributions.items():
            if isinstance(found, IntDistribution):
                drawn[name] = trial.suggest_int(name, found.low, found.high, step=found.step)
            elif isinstance(found, CategoricalDistribution):
                drawn[name] = trial.suggest_categorical(name, found.choices)
        return drawn

    def _settle(self, trial: Trial, verdict: Verdict) -> None:
        trial.set_user_attr("verdict", verdict.value)

    def _repeat(self, trial: Trial, same: FrozenTrial) -> tuple[float, ...]:
        self._settle(trial, Verdict.REPEATED)
        trial.set_user_attr("repeat_of", same.number)
        stored = result_of(same)
        if stored is None or stored.state != "complete":
            msg = f"repeats trial {same.number}, which is running or did not complete"
            raise optuna.TrialPruned(msg)
        return self.session.plan.values(stored)

    def _settled_before(self, trial: Trial) -> list[FrozenTrial]:
        """Return the earlier trials that measure a policy, once all earlier draws have a verdict.

        The order of trial numbers decides who measures a policy that two workers drew at once, and
        which draw is one too many: every worker sees the same order. A policy in the queue counts
        as measured, since whoever takes it sees no later trial.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            earlier = [t for t in _live_trials(trial.study) if t.number < trial.number]
            undecided = [
                t
                for t in earlier
                if t.state == TrialState.RUNNING and "verdict" not in t.user_attrs
            ]
            if not undecided or (self._while_waiting is None and time.monotonic() > deadline):
                return [t for t in earlier if _is_claim(t)]
            if self._while_waiting is not None:
                self._while_waiting(trial)
            time.sleep(_POLL_S)


class _Rungs:
    """A monitor that asks a pruner after each epoch that this process has trained."""

    def __init__(
        self, trial: Trial, pruner: FrontPruner, known: Sequence[float], *, can_stop: bool
    ) -> None:
        self._trial = trial
        self._pruner = pruner
        self._known = known
        self._can_stop = can_stop
        self._at = (0, 0.0)

    def report(self, epoch: int, loss: float) -> None:
        """Show the pruner where the training stands, or stood before it was interrupted."""
        self._at = epoch, loss
        self._pruner.keep(self._trial, epoch, loss)

    def should_stop(self) -> bool:
        """Whether the pruner gives the trial up; it is asked of seeds too, to learn its errors."""
        gives_up = self._pruner.should_stop(self._trial, *self._at, known=self._known)
        return gives_up and self._can_stop


def measuring(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that train, or have trained, a policy of their own."""
    return [t for t in trials if t.user_attrs.get("verdict") == Verdict.MEASURED]


def result_of(trial: FrozenTrial) -> TrialResult | None:
    """Return what a trial measured, None while it runs or where it measured nothing itself."""
    stored = trial.user_attrs.get("result")
    return None if stored is None else TrialResult.from_json(stored)


def _sign(trial: Trial) -> None:
    """Write who is at a trial, unless whoever holds its lease has: a write is a transaction."""
    if trial.user_attrs.get(WORKER) != worker_name():
        trial.set_user_attr(WORKER, worker_name())


def _is_claim(trial: FrozenTrial) -> bool:
    if trial.state == TrialState.WAITING:
        return "policy_hash" in trial.user_attrs and REPLICATE_SEED not in trial.user_attrs
    return trial.user_attrs.get("verdict") == Verdict.MEASURED


def _live_trials(study: Study) -> list[FrozenTrial]:
    states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    return study.get_trials(deepcopy=False, states=states)
