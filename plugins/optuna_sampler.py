"""`PolicySampler`: the guide as an Optuna sampler, for anybody's study.

Example:
    >>> # study = optuna.create_study(
    >>> #     directions=["maximize", "minimize"], sampler=PolicySampler(space, seed=0))
    >>> # study.optimize(objective, n_trials=100)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from adq_search.guide import Rows, additive_costs
from adq_search.hardware import cost_table
from adq_search.plugins._optuna_history import Coder, CommonParameters, History, Reading
from adq_search.plugins.optuna_objective import distribution
from adq_search.sensitivity import SensitivityTable
from adq_search.session import Session
from adq_search.space import SearchSpace

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class PolicySampler(BaseSampler):
    """Samples the parameters of a search space by the guide, all others by a fallback.

    It learns from the trials' KL to the teacher where they have it as user attribute `kl` or
    within `result`, else from the first objective that is no known cost. Parameters that are not
    of the space but of every finished trial, such as a learning rate, are learned along as
    factors of the loss; what cannot be (conditional or changing ones) goes to the fallback, and a
    study without the space's parameters goes there whole.

    Nothing is kept outside the study: any process that opens it learns from all its trials. Draws
    follow the seed and the number of the trial. One process in sequence repeats itself exactly; one
    that resumes differs in when the model's spreads were last fitted.

    Args:
        space: Which policies exist. The objective suggests its `parameters`, as `PolicyObjective`
            does.
        prior: Predicted loss increases; None assumes noise that falls by four a bit, everywhere.
        costs: Cost of every choice of every group, by figure; see `guide.additive_costs`.
        objectives: Names of the study's objectives, in order. Those in `costs` are known before
            training; the first other one is what training measures, and costs are learned of the
            rest. Empty where `costs` is: the first is measured.
        budgets: Upper limits on figures of `costs`, met by every proposal.
        seed: Of everything random; None draws one.
        fallback: For parameters that are not the space's; None for multivariate TPE.

    Raises:
        CostError: A budget is on no figure of `costs`.
    """

    _look: tuple[int, list[FrozenTrial]] | None

    def __init__(
        self,
        space: SearchSpace,
        *,
        prior: SensitivityTable | None = None,
        costs: Mapping[str, Rows] | None = None,
        objectives: Sequence[str] = (),
        budgets: Mapping[str, float] | None = None,
        seed: int | None = None,
        fallback: BaseSampler | None = None,
    ) -> None:
        self._ours: dict[str, BaseDistribution] = {
            p.name: distribution(p) for p in space.parameters
        }
        self._reading = Reading(
            space, prior, dict(costs or {}), tuple(objectives), dict(budgets or {})
        )
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._fallback = fallback or TPESampler(multivariate=True, seed=self._seed)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is read from the study again."""
        kept = ("_ours", "_reading", "_seed", "_fallback")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def reseed_rng(self) -> None:
        """Reseed the fallback. The guide's draws differ by trial already."""
        self._fallback.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the space's parameters and those of every finished trial."""
        with self._lock:
            self._turn_to(study)
            trials = study.get_trials(deepcopy=False)
            self._look = trial.number, trials
            common = self._common.of(trials)
        if common and not self._ours.keys() <= common.keys():
            return self._fallback.infer_relative_search_space(study, trial)
        return common | self._ours

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return one proposal of the guide, or of the fallback where no parameter is ours."""
        if not self._ours.keys() & search_space.keys():
            drawn = self._fallback.sample_relative(study, trial, search_space)
            # Some samplers draw nothing jointly at first.
            return drawn | {
                name: self._fallback.sample_independent(study, trial, name, found)
                for name, found in search_space.items()
                if name not in drawn
            }
        extras = {n: d for n, d in search_space.items() if n not in self._ours}
        rng = np.random.default_rng([self._seed, trial.number])
        with self._lock:
            self._turn_to(study)
            history = self._history_with(study, extras)
            trials = self._trials_for(study, trial)
            guide = history.read(study.directions, [t for t in trials if t.state in _FINISHED])
            running = [
                t for t in trials if t.state == TrialState.RUNNING and t.number != trial.number
            ]
            row = guide.propose(rng, history.pending(running))
            history.proposed[trial.number] = row
        return {n: v for n, v in history.coder.params_of(row).items() if n in search_space}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a value from the fallback."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Pass on to the fallback."""
        self._fallback.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Pass on to the fallback."""
        self._fallback.after_trial(study, trial, state, values)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._study: str | None = None
        self._history: History | None = None
        self._common = CommonParameters()
        self._look = None

    def _turn_to(self, study: Study) -> None:
        """Start afresh where the study is another one than before."""
        if self._study != study.study_name:
            self._forget_study(study.study_name)

    def _forget_study(self, name: str) -> None:
        self._study, self._history = name, None
        self._common = CommonParameters()
        self._look = None

    def _trials_for(self, study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
        """Return all trials, as they were read for this one's search space just before.

        A database that many workers share takes longer to read them than a proposal takes.
        """
        look, self._look = self._look, None
        if look is not None and look[0] == trial.number:
            return look[1]
        return study.get_trials(deepcopy=False)

    def _history_with(self, study: Study, extras: dict[str, BaseDistribution]) -> History:
        """Return the study's history as seen with these further parameters."""
        if self._history is None or self._history.coder.extras != extras:
            proposed = {} if self._history is None else self._history.proposed
            self._history = History(self._reading, Coder(self._reading, extras))
            if not extras:
                self._history.proposed = proposed
        return self._history


def make_sampler(session: Session, *, seed: int) -> BaseSampler:
    """Return the sampler that the session's job asks for.

    Args:
        session: A prepared session; the guide takes its prior and its budgets.
        seed: Of everything random. Workers that share a study take different ones.
    """
    plan = session.plan
    settings = plan.job.search
    if settings.sampler == "guide":
        costs = additive_costs(cost_table(plan.summary, plan.space, plan.hardware))
        return PolicySampler(
            plan.space,
            prior=None if settings.prior is None else session.sensitivity(),
            costs=costs,
            objectives=settings.objectives,
            budgets={n: limit for n, limit in settings.budgets.items() if n in costs},
            seed=seed,
        )
    if settings.sampler == "tpe":
        return TPESampler(multivariate=True, seed=seed)
    if settings.sampler == "nsga2":
        return NSGAIISampler(seed=seed)
    return GPSampler(seed=seed) if settings.sampler == "gp" else RandomSampler(seed=seed)
