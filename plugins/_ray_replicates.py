"""Replicates on Ray: the policies of a finished search's front, trained again with new seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adq_search.hosting import HostOptions
from adq_search.pareto import front_indices
from adq_search.plugins._ray_experiment import first_fault, run_experiment
from adq_search.plugins._ray_installed import Searcher, Trial, tune
from adq_search.plugins._ray_records import adopt, measured_records
from adq_search.plugins.ray_trainable import REPLICATE_SEED
from adq_search.progress import Progress
from adq_search.session import Session

#: Keeps the experiment apart from the search's own.
_SUFFIX = "-replicates"


def run_replicates(session: Session, options: HostOptions, progress: Progress) -> None:
    """Train what is missing of the job's replicates; one whose machine was lost is left out.

    Raises:
        StorageError: One failed again and again, for the reason told.
    """
    missing = _missing(session)
    if not missing:
        return
    results = run_experiment(
        session,
        options,
        _Listed(missing),
        [_Keeper(session, progress, len(missing))],
        name=f"{options.study}{_SUFFIX}",
        n_trials=len(missing),
    )
    if (fault := first_fault(results.errors)) is not None:
        raise fault


def _missing(session: Session) -> list[dict[str, Any]]:
    """Return the configuration of every replicate that has no result."""
    search = session.plan.job.search
    complete = [result for result, _ in measured_records(session) if result.state == "complete"]
    directions = [axis.direction for axis in search.axes]
    front = front_indices([session.plan.values(result) for result in complete], directions)
    return [
        {**session.plan.space.params_of(complete[i].policy), REPLICATE_SEED: seed}
        for i in front
        for seed in search.replicate_seeds
        if session.result_of(complete[i].policy, seed=seed) is None
    ]


class _Listed(Searcher):
    """Proposes what it is given, in order."""

    def __init__(self, configurations: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self._left = list(configurations)

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration."""
        return self._left.pop(0) if self._left else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn nothing."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: what is missing is seen from the session's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class _Keeper(tune.Callback):
    """Brings the results of replicates home."""

    def __init__(self, session: Session, progress: Progress, n_trials: int) -> None:
        self._session = session
        self._progress = progress
        self._n_trials = n_trials
        self._n_done = 0
        progress.update("replicates", 0, n_trials)

    def __getstate__(self) -> dict[str, Any]:
        """Leave nothing in what Tune saves of the experiment, which is never restored."""
        return {}

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Keep a result."""
        assert trial.checkpoint is not None, "no scheduler stops a replicate"
        name = trial.last_result["policy_hash"]
        adopt(self._session, trial.checkpoint, name, seed=trial.config[REPLICATE_SEED])
        self._n_done += 1
        self._progress.update("replicates", self._n_done, self._n_trials)
