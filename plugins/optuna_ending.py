"""How a search in a study ends: it settles before its last trial, and its front is replicated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from adq_search.pareto import front_indices
from adq_search.plugins.optuna_lease import CHECKPOINT, MAX_RETRIES
from adq_search.plugins.optuna_objective import (
    REPLICATE_SEED,
    STOPPED,
    Verdict,
    measuring,
    result_of,
)
from adq_search.policy import Policy
from adq_search.progress import Progress
from adq_search.session import Session
from adq_search.stopping import SearchEnd, settled
from adq_search.trial import TrialResult

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_POLL_S = 0.2
_ALIVE = (TrialState.WAITING, TrialState.RUNNING)


class StopRule:
    """The job's stop rule, applied to a study by each of its workers.

    Whoever finds it met writes that into the study, where the others read it.

    Args:
        study: The study.
        session: The prepared job.
    """

    def __init__(self, study: Study, session: Session) -> None:
        self._study = study
        self._plan = session.plan
        self._n_judged = 0

    def is_met(self, finished: Sequence[FrozenTrial]) -> bool:
        """Whether the search has settled, and nobody is at a trial any more.

        Args:
            finished: The finished trials of the study.
        """
        if self._plan.job.search.stop is None:
            return False
        if not is_stopped(self._study) and not self._judge(measuring(finished)):
            return False
        # Read anew: one that began before the end was written is waited for.
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return not measuring(running)

    def _judge(self, trials: Sequence[FrozenTrial]) -> bool:
        if len(trials) == self._n_judged:
            return False
        self._n_judged = len(trials)
        results = [result for t in trials if (result := result_of(t)) is not None]
        again: dict[Policy, list[TrialResult]] = {}
        for result in replicated(self._study):
            again.setdefault(result.policy, []).append(result)
        found = settled(self._plan, results, again)
        if found is not None:
            self._study.set_user_attr(STOPPED, found.to_json())
        return found is not None


def is_stopped(study: Study) -> bool:
    """Whether the stop rule has ended a study's search."""
    return study.user_attrs.get(STOPPED) is not None


def why_stopped(study: Study) -> SearchEnd | None:
    """Return why a study's search ended before its last trial, None where it did not."""
    found = study.user_attrs.get(STOPPED)
    return None if found is None else SearchEnd(**found)


class Replicates:
    """The trials that train the policies of a finished search's front again.

    Each is a trial of the study with the user attribute `replicate_seed`, queued by any worker and
    run by any. Of two alike the later one is pruned untrained; one that was lost is queued again.

    Args:
        study: A study whose search has ended.
        session: The prepared job.
    """

    def __init__(self, study: Study, session: Session) -> None:
        self._study = study
        self._plan = session.plan

    def advance(self, progress: Progress, run_one: Callable[[], None]) -> bool:
        """Queue what is missing, and run what is queued; return whether nothing is left to do.

        Args:
            progress: Told how many replicates are finished.
            run_one: Runs the next trial of the queue.
        """
        if not self._plan.job.search.replicates:
            return True
        by_key: dict[tuple[str, int], list[FrozenTrial]] = {key: [] for key in self._wanted}
        for trial in self._study.get_trials(deepcopy=False):
            key = trial.user_attrs.get("policy_hash"), trial.user_attrs.get(REPLICATE_SEED)
            if key in by_key:
                by_key[key].append(trial)
        left = {key: trials for key, trials in by_key.items() if not _is_settled(trials)}
        progress.update("replicates", len(by_key) - len(left), len(by_key))
        is_queued = any(t.state == TrialState.WAITING for of_key in by_key.values() for t in of_key)
        for (policy_hash, seed), trials in left.items():
            if not any(t.state in _ALIVE for t in trials):
                attributes = {
                    "policy_hash": policy_hash,
                    REPLICATE_SEED: seed,
                    "verdict": Verdict.REPLICATE.value,
                }
                if trials and CHECKPOINT in trials[-1].user_attrs:  # of the one that was lost
                    attributes[CHECKPOINT] = trials[-1].user_attrs[CHECKPOINT]
                self._study.enqueue_trial(self._wanted[policy_hash, seed], user_attrs=attributes)
                is_queued = True
        if is_queued:
            run_one()
        elif left:  # others are at them
            time.sleep(_POLL_S)
        return not left and not is_queued

    @cached_property
    def _wanted(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The parameters of every replicate, by policy and seed."""
        search = self._plan.job.search
        complete = measuring(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        directions = [axis.direction for axis in search.axes]
        front = [complete[i] for i in front_indices([t.values for t in complete], directions)]
        return {
            (t.user_attrs["policy_hash"], seed): t.params
            for t in front
            for seed in search.replicate_seeds
        }


def replicated(study: Study) -> list[TrialResult]:
    """Return the results of a study's replicates."""
    trials = study.get_trials(deepcopy=False, states=_FINISHED)
    results = (result_of(t) for t in trials if REPLICATE_SEED in t.user_attrs)
    return [result for result in results if result is not None]


def _is_settled(trials: list[FrozenTrial]) -> bool:
    """Whether one of some equal replicates has a result, or too many of them were lost."""
    n_lost = sum(t.state == TrialState.FAIL for t in trials)
    return n_lost > MAX_RETRIES or any("result" in t.user_attrs for t in trials)
