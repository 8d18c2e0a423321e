"""Ray Tune as the host of a search, on this machine."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import optuna
import torch

from adq_search.errors import StorageError
from adq_search.files import read_json, write_json
from adq_search.hosting import HostedTrial, HostOptions, HostOutcome
from adq_search.plan import Plan, check_fingerprint
from adq_search.plugins._ray_installed import ray, tune
from adq_search.plugins.optuna_sampler import make_sampler
from adq_search.plugins.ray_searcher import PolicySearcher
from adq_search.progress import Progress
from adq_search.provenance import now
from adq_search.session import Session, reopen

_TRIALS = "ray_trials"


class RayHost:
    """Runs a session as a Ray Tune experiment with as many concurrent trials as workers."""

    def check(self, plan: Plan, folder: Path, options: HostOptions) -> None:
        """Refuse a folder that holds trials unasked, or of another job."""
        if options.storage is not None:
            msg = "The host 'ray' keeps its trials in --out. Leave --storage out."
            raise StorageError(msg)
        n_known = len(list((folder / _TRIALS).glob("*.json")))
        if n_known == 0 and options.resume and not (folder / "session.json").exists():
            msg = f"There is nothing to resume in {folder}. Leave --resume out."
            raise StorageError(msg)
        if (folder / "session.json").exists():
            stored = read_json(folder / "session.json", StorageError, what="session")
            check_fingerprint(stored["fingerprint"], plan.fingerprint, where=f"folder {folder}")
            if not options.resume:
                msg = (
                    f"{folder} holds a search with {n_known} measured trials. Give --resume to go "
                    "on, or choose another --out."
                )
                raise StorageError(msg)

    def run(self, session: Session, options: HostOptions, progress: Progress) -> HostOutcome:
        """Measure policies until the job's number of trials is reached."""
        known = _hosted(session)
        n_missing = session.plan.job.search.trials - len(known)
        if n_missing <= 0:
            return HostOutcome(trials=known)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            searcher = PolicySearcher(
                session.plan,
                session.seeds,
                [trial.result for trial in known],
                sampler=make_sampler(session, seed=session.plan.job.search.seed + len(known)),
            )
        was_running = ray.is_initialized()
        if not was_running:
            ray.init(include_dashboard=False, log_to_driver=False, num_cpus=options.workers)
        try:
            results = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(
                        _train,
                        folder=str(session.folder.resolve()),
                        n_threads=torch.get_num_threads(),
                    ),
                    {"cpu": 1},
                ),
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    num_samples=n_missing,
                    max_concurrent_trials=options.workers,
                ),
                run_config=tune.RunConfig(
                    name=options.study,
                    storage_path=str((session.folder / "ray").resolve()),
                    verbose=0,
                    callbacks=[_Counter(progress, len(known), session.plan.job.search.trials)],
                ),
            ).fit()
        finally:
            if not was_running:
                ray.shutdown()
        if results.num_errors:
            first = str(results.errors[0]).strip().splitlines()[-1]
            msg = (
                f"{results.num_errors} of {n_missing} Ray trials failed; the first: {first}. Mend "
                "the cause, then give --resume."
            )
            raise StorageError(msg)
        return HostOutcome(
            trials=_hosted(session),
            n_rejected=searcher.n_rejected,
            n_repeated=searcher.n_repeated,
        )


class _Counter(tune.Callback):
    """Tells how many trials are finished."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress = progress
        self._done = done
        self._total = total
        progress.update("trials", done, total)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial."""
        self._done += 1
        self._progress.update("trials", self._done, self._total)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the terminal's progress bar out of Ray's checkpoints of the experiment."""
        return {"_done": self._done, "_total": self._total}


@functools.lru_cache(maxsize=1)
def _session(folder: str) -> Session:
    return reopen(Path(folder))


def _train(config: dict[str, Any], *, folder: str, n_threads: int) -> None:
    """Be a Ray trial: measure the policy the configuration stands for, and report it once."""
    torch.set_num_threads(n_threads)
    session = _session(folder)
    started_at = now()
    policy = session.plan.space.policy_of(config)
    result = session.measure(policy)
    file = session.folder / _TRIALS / f"{policy.hash}.json"
    write_json(
        file,
        {
            "parameters": dict(config),
            "origin": session.origin_of(policy),
            "worker": tune.get_context().get_trial_id(),
            "started_at": started_at,
        },
    )
    measured = {"accuracy": result.accuracy, "loss": result.loss, "kl": result.kl}
    tune.report({**result.cost, **measured, "state": result.state, "policy_hash": policy.hash})


def _hosted(session: Session) -> tuple[HostedTrial, ...]:
    """Return every trial whose record and result are in the folder, numbered as they started."""
    found = []
    for file in sorted((session.folder / _TRIALS).glob("*.json")):
        record = read_json(file, StorageError, what="Ray trial")
        result = session.result_of_hash(file.stem)
        if result is not None:
            found.append((record, result))
    found.sort(key=lambda pair: (pair[0]["started_at"], pair[1].policy.hash))
    return tuple(
        HostedTrial(number=i, result=result, **record) for i, (record, result) in enumerate(found)
    )
