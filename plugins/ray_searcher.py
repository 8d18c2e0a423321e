"""`PolicySearcher`: proposes policies to Ray Tune, each once and within the budgets.

Example:
    >>> # session = prepare(plan(read_job(Path("my.yaml"))), Path("results/my"))
    >>> # tune.Tuner(
    >>> #     policy_trainable(session),
    >>> #     tune_config=tune.TuneConfig(search_alg=PolicySearcher(session), num_samples=40),
    >>> # ).fit()
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler

from adq_search.errors import StorageError
from adq_search.files import read_json, write_json
from adq_search.hardware import cost, cost_table, total_of
from adq_search.plugins._ray_installed import Searcher
from adq_search.plugins._ray_proposals import GuideProposals, Proposals, SamplerProposals, Told
from adq_search.policy import Policy
from adq_search.session import Session
from adq_search.space import Params
from adq_search.trial import TrialResult

_MAX_DRAWS = 200
_SCHEMA = "adq_search.searcher/1"


class PolicySearcher(Searcher):
    """A Ray Tune searcher over a session's space: its seeds first, then the guide.

    A draw that is over budget, or that was proposed before, never becomes a trial. What Tune saves
    of it holds every proposal by Ray's trial id and what became of it, as JSON, so that after
    `Tuner.restore` it goes on where it was: trials of the experiment and of the searcher are the
    same ones. Trials that a scheduler stopped are learned from as what they were heading for, and
    never as finished.

    Args:
        session: The prepared job.
        known: Results measured before, which are learned from and never proposed.
        first: Parameters proposed before the session's seeds, such as those of interrupted trials.
        sampler: Proposes instead of the guide.
        seed: Of the draws; None for the job's.
        is_over: Asked before each proposal whether the search is to end.
    """

    def __init__(
        self,
        session: Session,
        *,
        known: Iterable[tuple[TrialResult, tuple[float, ...]]] = (),
        first: Iterable[Params] = (),
        sampler: BaseSampler | None = None,
        seed: int | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        plan = session.plan
        search = plan.job.search
        super().__init__(
            metric=[axis.name for axis in search.axes],  # type: ignore[arg-type]  # lists may be
            mode=[axis.direction.removesuffix("imize") for axis in search.axes],  # type: ignore[arg-type]
        )
        self._objectives = [axis.name for axis in search.axes]
        self._space, self._summary, self._hardware = plan.space, plan.summary, plan.hardware
        self._budgets = dict(search.budgets)
        self._proposals: Proposals = (
            SamplerProposals(plan.space, search.axes, sampler)
            if sampler is not None
            else GuideProposals(
                plan.space,
                cost_table(plan.summary, plan.space, plan.hardware),
                search.axes,
                search.budgets,
                None if search.prior is None else session.sensitivity(),
                seed=search.seed if seed is None else seed,
            )
        )
        self._is_over = is_over
        self._proposed: set[str] = set()
        self._running: dict[str, Params] = {}
        self._told: dict[str, tuple[Params, Told]] = {}
        self._n_draws = self.n_rejected = self.n_repeated = 0
        for result, losses in known:
            self._proposed.add(result.policy.hash)
            values = plan.values(result) if result.state == "complete" else None
            told = Told(result.state, values, result.kl, losses)
            self._proposals.learn(plan.space.params_of(result.policy), told)
            self._n_draws += 1
        new_seeds = [
            seed.policy for seed in session.seeds if seed.policy.hash not in self._proposed
        ]
        self._queue: deque[Params] = deque([*first, *map(plan.space.params_of, new_seeds)])

    def suggest(self, trial_id: str) -> Any:
        """Return the parameters of a policy not proposed before, or FINISHED when none is left."""
        if self._is_over is not None and self._is_over():
            return Searcher.FINISHED
        for _ in range(_MAX_DRAWS):
            if len(self._proposed) >= self._space.n_policies:
                break
            params = self._draw()
            policy = self._space.policy_of(params)
            excess = self._excess(policy)
            is_over = any(amount > 0.0 for amount in excess.values())
            if not is_over and policy.hash not in self._proposed:
                self._proposed.add(policy.hash)
                self._running[trial_id] = params
                return dict(params)
            self.n_rejected += is_over
            self.n_repeated += not is_over
            self._proposals.learn(
                params, Told("over budget" if is_over else "repeated", excess=excess)
            )
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Wait for the end: no value of an unfinished trial is learned as if it were final."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn what became of a trial, as its last report says."""
        params = self._running.pop(trial_id, None)
        if params is None and trial_id in self._told:
            params, before = self._told[trial_id]
            if before.state != "failed":
                return
        if params is None:
            return
        told = self._read(result, error=error)
        self._told[trial_id] = params, told
        self._proposals.learn(params, told)

    def save(self, checkpoint_path: str) -> None:
        """Write every proposal and what became of it."""
        told = {
            trial_id: {"params": params, "state": t.state, "values": t.values, "kl": t.kl}
            | {"train_losses": t.train_losses}
            for trial_id, (params, t) in self._told.items()
        }
        content = {
            "schema": _SCHEMA,
            "proposed": sorted(self._proposed),
            "queue": list(self._queue),
            "running": self._running,
            "told": told,
            "n_draws": self._n_draws,
            "n_rejected": self.n_rejected,
            "n_repeated": self.n_repeated,
        }
        write_json(Path(checkpoint_path), content)

    def restore(self, checkpoint_path: str) -> None:
        """Learn again what was told since this searcher was made, and go on from there.

        Raises:
            StorageError: The file is damaged, or of another version.
        """
        content = read_json(Path(checkpoint_path), StorageError, what="searcher")
        if content.get("schema") != _SCHEMA:
            msg = (
                f"{checkpoint_path} was written by another version ({content.get('schema')}, not "
                f"{_SCHEMA}). Start another search, or go on with that version."
            )
            raise StorageError(msg)
        for trial_id, found in content["told"].items():
            if trial_id in self._told:
                continue
            values = None if found["values"] is None else tuple(found["values"])
            told = Told(found["state"], values, found["kl"], tuple(found["train_losses"]))
            self._told[trial_id] = found["params"], told
            self._proposals.learn(found["params"], told)
        self._proposed = set(content["proposed"])
        self._queue = deque(content["queue"])
        self._running = dict(content["running"])
        self._n_draws = content["n_draws"]
        self.n_rejected, self.n_repeated = content["n_rejected"], content["n_repeated"]

    def _draw(self) -> Params:
        if self._queue:
            return self._queue.popleft()
        self._n_draws += 1
        return self._proposals.propose(self._n_draws, list(self._running.values()))

    def _excess(self, policy: Policy) -> dict[str, float]:
        if not self._budgets:
            return {}
        totals = total_of(cost(self._summary, policy, self._hardware))
        return {name: totals[name] - limit for name, limit in self._budgets.items()}

    def _read(self, result: Mapping[str, Any] | None, *, error: bool) -> Told:
        """Read a trial's last report; one that is not complete has no values, whatever it says."""
        if error or result is None or "state" not in result:
            return Told("failed")
        losses = tuple(float(loss) for loss in result.get("train_losses", ()))
        if result["state"] == "complete":
            values = tuple(float(result[name]) for name in self._objectives)
            if all(map(math.isfinite, values)):
                return Told("complete", values, float(result["kl"]), losses)
            return Told("diverged", train_losses=losses)
        state = "stopped" if result["state"] == "running" else str(result["state"])
        return Told(state, train_losses=losses)
