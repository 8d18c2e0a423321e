"""`PolicySearcher`: draws policies for Ray Tune, each once and within the budgets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState
from ray.tune.search import Searcher

from adq_search.errors import StorageError
from adq_search.files import read_json, write_json
from adq_search.plan import Plan
from adq_search.plugins.optuna_objective import directions, distribution
from adq_search.session import Seed
from adq_search.trial import TrialResult

_MAX_DRAWS = 200


class PolicySearcher(Searcher):
    """A Ray Tune searcher over a plan's space, by a sampler of Optuna's kind.

    A draw that is over budget, or that was proposed before, never becomes a Ray trial. Diverged
    trials are told to the sampler as pruned, so they are not on any front.

    Args:
        plan: The job, resolved.
        seeds: Policies proposed first, in order.
        known: Results measured earlier, which the sampler learns from and never repeats.
        sampler: Proposes after the seeds.
    """

    def __init__(
        self,
        plan: Plan,
        seeds: Iterable[Seed],
        known: Iterable[TrialResult],
        *,
        sampler: BaseSampler,
    ) -> None:
        axes = plan.job.search.axes
        super().__init__(
            metric=[axis.name for axis in axes],  # type: ignore[arg-type]  # lists are documented
            mode=[axis.direction.removesuffix("imize") for axis in axes],  # type: ignore[arg-type]
        )
        self._objectives = [axis.name for axis in axes]
        self._plan = plan
        self._space: dict[str, BaseDistribution] = {
            p.name: distribution(p) for p in plan.space.parameters
        }
        self._study = optuna.create_study(directions=directions(plan), sampler=sampler)
        self._open: dict[str, Trial] = {}
        self._proposed: set[str] = set()
        self.n_rejected = 0
        self.n_repeated = 0
        for result in known:
            self._learn(result)
        for proposal in seeds:
            self._study.enqueue_trial(plan.space.params_of(proposal.policy))

    def suggest(self, trial_id: str) -> Any:
        """Return the parameters of a policy not proposed before, or FINISHED when none is left."""
        for _ in range(_MAX_DRAWS):
            trial = self._study.ask(self._space)
            policy = self._plan.space.policy_of(trial.params)
            excess = self._plan.excess(self._plan.totals(policy))
            for name, amount in excess.items():
                trial.set_constraint(name, amount)
            over = any(amount > 0.0 for amount in excess.values())
            if not over and policy.hash not in self._proposed:
                self._proposed.add(policy.hash)
                self._open[trial_id] = trial
                return dict(trial.params)
            self.n_rejected += over
            self.n_repeated += not over
            self._study.tell(trial, state=TrialState.PRUNED)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignore what is measured on the way: the front never mixes fidelities."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the sampler the values of a complete trial; any other one is pruned or failed."""
        trial = self._open.pop(trial_id, None)
        if trial is None:
            return
        if error:
            self._study.tell(trial, state=TrialState.FAIL)
        elif result is None or result.get("state") != "complete":
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_user_attr("kl", result["kl"])
            self._study.tell(trial, [result[name] for name in self._objectives])

    def save(self, checkpoint_path: str) -> None:
        """Write what was proposed. Results lie in the session's folder, which is what resumes."""
        content = {
            "proposed": sorted(self._proposed),
            "n_rejected": self.n_rejected,
            "n_repeated": self.n_repeated,
        }
        write_json(Path(checkpoint_path), content)

    def restore(self, checkpoint_path: str) -> None:
        """Read back what was proposed, so that none of it is proposed again."""
        content = read_json(Path(checkpoint_path), StorageError, what="searcher")
        self._proposed |= set(content["proposed"])
        self.n_rejected = content["n_rejected"]
        self.n_repeated = content["n_repeated"]

    def _learn(self, result: TrialResult) -> None:
        self._proposed.add(result.policy.hash)
        if result.state == "complete":
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=self._plan.space.params_of(result.policy),
                    distributions=self._space,
                    values=list(self._plan.values(result)),
                    user_attrs={"kl": result.kl},
                )
            )
