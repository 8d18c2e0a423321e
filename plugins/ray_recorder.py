"""`SessionRecorder`: writes what Ray trials measure into a session's folder as they finish."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from adq_search.errors import AdqSearchWarning
from adq_search.plugins._ray_home import serve
from adq_search.plugins._ray_installed import Trial, ray, tune
from adq_search.plugins._ray_records import (
    RayRecord,
    adopt,
    measured_records,
    records_of,
    remove_record,
    write_record,
)
from adq_search.plugins.ray_scheduler import FrontScheduler
from adq_search.plugins.ray_trainable import OVER_BUDGET, RUNNING
from adq_search.progress import NoProgress, Progress
from adq_search.provenance import now
from adq_search.session import Session, reopen
from adq_search.stopping import SearchEnd, settled
from adq_search.trial import TrialResult


class SessionRecorder(tune.Callback):
    """A Tune callback that keeps one record of every trial in the session's folder.

    A trial has a record from its start, and its result and weights lie beside those of other hosts
    as soon as it ends, whatever becomes of the driver afterwards. A trial that a scheduler stopped
    is recorded as stopped, without accuracy: it is on no front.

    While the experiment runs, its trials may ask about the folder: a policy that has ended already
    is not trained again, whoever proposes it, one that another trial is measuring is waited for,
    and a warm trial gets its donor's weights.

    Args:
        session: The prepared job, the one that `policy_trainable` was made of.
        progress: Told how many trials are finished.
        scheduler: The experiment's, where it is ours: what it condemned and spared is recorded.
        serves: Whether trials may ask about the folder; a process on the driver's machine answers.

    Attributes:
        n_repeated: Trials of this experiment whose policy had ended already.
        end: Why the search is to end before its last trial, by the job's stop rule; None where it
            is not.
    """

    def __init__(
        self,
        session: Session,
        progress: Progress | None = None,
        *,
        scheduler: FrontScheduler | None = None,
        serves: bool = True,
    ) -> None:
        self._session = session
        self._progress = progress or NoProgress()
        self._scheduler = scheduler
        self._serves = serves
        self._home: Any = None
        self._turns = _Turns()
        self.n_repeated = 0
        self.end: SearchEnd | None = None
        self._records = {record.policy_hash: record for record in records_of(session.folder)}
        self._results = {r.policy.hash: r for r, _ in measured_records(session)}
        self._tell()

    def __getstate__(self) -> dict[str, Any]:
        """Leave only the folder in what Tune saves of the experiment."""
        return {"folder": str(self._session.folder.resolve())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(reopen(Path(state["folder"])))  # type: ignore[misc]  # from the folder alone

    def setup(
        self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any
    ) -> None:
        """Let the trials ask about the folder."""
        if self._serves:
            self._home = serve(self._session.folder)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Leave no policy to a trial that is over."""
        if self._home is not None:
            ray.get(self._home.give_back.remote())

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Have a waiting trial measure the policy of one that runs no longer and has no result."""
        for policy_hash, trial in self._turns.passed_on():
            if policy_hash not in self._results:
                self._begin(trial)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record a trial, or another attempt of one, unless its policy has a result.

        A trial whose policy another one is measuring waits, and has no record.
        """
        session = self._session
        policy = session.plan.space.policy_of(trial.config)
        if session.result_of(policy) is None and self._turns.is_next(policy.hash, trial):
            self._begin(trial)

    def _begin(self, trial: Trial) -> None:
        session = self._session
        policy = session.plan.space.policy_of(trial.config)
        assert trial.storage is not None
        place = f"{trial.storage.experiment_dir_name}/{trial.storage.trial_dir_name}"
        known = self._records.get(policy.hash)
        self._keep(
            replace(known, trial_id=trial.trial_id, place=place)
            if known is not None
            else RayRecord(
                policy_hash=policy.hash,
                number=max((r.number for r in self._records.values()), default=-1) + 1,
                trial_id=trial.trial_id,
                place=place,
                parameters=dict(trial.config),
                origin=session.origin_of(policy),
                worker="",
                started_at=now(),
            )
        )
        if self._home is not None:
            ray.get(self._home.give.remote(policy.hash, trial.trial_id))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Record who runs a trial, for who looks at the search meanwhile."""
        if result.get("repeated"):
            return
        record = self._records.get(result.get("policy_hash", ""))
        if record is not None and record.worker != _worker_of(result):
            self._keep(replace(record, worker=_worker_of(result)))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Bring home what a trial measured, or record that it was stopped."""
        last = trial.last_result or {}
        if last.get("repeated"):
            self.n_repeated += 1
            return
        record = self._records.get(last.get("policy_hash", ""))
        if record is None:
            return
        if last["state"] == OVER_BUDGET:
            remove_record(self._session.folder, self._records.pop(record.policy_hash))
            return
        if last["warning"]:
            warnings.warn(last["warning"], AdqSearchWarning, stacklevel=2)
        losses = tuple(last["train_losses"])
        condemned = self._scheduler is not None and trial.trial_id in self._scheduler.condemned
        # The record goes first: who finds the result finds its curve.
        self._keep(
            replace(record, worker=_worker_of(last), train_losses=losses, condemned=condemned)
        )
        self._results[record.policy_hash] = self._brought_home(trial)
        self.end = settled(self._session.plan, list(self._results.values()))
        self._tell()

    def is_over(self) -> bool:
        """Whether the job's stop rule is met."""
        return self.end is not None

    def _keep(self, record: RayRecord) -> None:
        write_record(self._session.folder, record)
        self._records[record.policy_hash] = record

    def _brought_home(self, trial: Trial) -> TrialResult:
        last = trial.last_result
        if last["state"] == RUNNING:
            result = self._stopped(trial)
            self._session.adopt(result)
            return result
        assert trial.checkpoint is not None, "the last report has one"
        return adopt(self._session, trial.checkpoint, last["policy_hash"])

    def _stopped(self, trial: Trial) -> TrialResult:
        plan = self._session.plan
        last = trial.last_result
        policy = plan.space.policy_of(trial.config)
        epochs = int(last["training_iteration"])
        return TrialResult(
            policy=policy,
            state="stopped",
            accuracy=None,
            loss=None,
            kl=None,
            cost=plan.totals(policy),
            epochs=epochs,
            wall_s=float(last["time_total_s"]),
            train_s=float(last["time_total_s"]),
            reason=f"stopped by Tune's scheduler after epoch {epochs}",
            seed=plan.job.search.seed,
            donor=last["donor"],
            epochs_before=int(last["epochs_before"]),
        )

    def _tell(self) -> None:
        n_trials = self._session.plan.job.search.trials
        self._progress.update("trials", min(len(self._results), n_trials), n_trials)


class _Turns:
    """Which trial measures a policy, and which ones wait for it."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Trial]] = {}

    def is_next(self, policy_hash: str, trial: Trial) -> bool:
        """Return whether a trial that starts may measure its policy; else it waits."""
        queue = self._queues.setdefault(policy_hash, [])
        queue[:] = [t for t in queue if t.status == Trial.RUNNING and t is not trial]
        queue.append(trial)
        return len(queue) == 1

    def passed_on(self) -> list[tuple[str, Trial]]:
        """Return those whose turn has come, as the one before them runs no longer."""
        out = []
        for policy_hash, queue in list(self._queues.items()):
            first = queue[0]
            queue[:] = [t for t in queue if t.status == Trial.RUNNING]
            if not queue:
                del self._queues[policy_hash]
            elif queue[0] is not first:
                out.append((policy_hash, queue[0]))
        return out


def _worker_of(report: dict[str, Any]) -> str:
    """Return what ran a trial, from what Tune adds to its reports: machine and process number."""
    return f"{report.get('hostname', '')}:{report.get('pid', '')}"
