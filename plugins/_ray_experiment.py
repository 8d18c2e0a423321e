"""One Tune experiment of a search: how it is stored, how often a trial is tried, when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adq_search.errors import StorageError
from adq_search.hosting import HostOptions
from adq_search.plugins._ray_installed import (
    RayTaskError,
    Searcher,
    Trial,
    TrialScheduler,
    cloudpickle,
    tune,
)
from adq_search.plugins._ray_room import disk_error, fault_of_disk
from adq_search.plugins.optuna_artifacts import absolute_place
from adq_search.plugins.ray_trainable import policy_trainable
from adq_search.session import Session

#: Times that a trial is tried again where its worker failed.
_MAX_FAILURES = 3
#: Checkpoints of a trial that Tune keeps; it saves the experiment's state as often.
_N_CHECKPOINTS = 2


def storage_place(folder: Path, options: HostOptions) -> str:
    """Return where Ray keeps the experiments of a session."""
    return absolute_place(options.artifacts or str(folder / "ray"))


def run_experiment(
    session: Session,
    options: HostOptions,
    searcher: Searcher,
    callbacks: Sequence[tune.Callback],
    *,
    name: str,
    n_trials: int,
    scheduler: TrialScheduler | None = None,
    interrupted: Mapping[str, tune.Checkpoint] | None = None,
) -> tune.ResultGrid:
    """Run trials until so many are finished, or none is left to try.

    Args:
        session: The prepared job.
        options: What the user asked of the host.
        searcher: Proposes.
        callbacks: Keep what is measured.
        name: Of the experiment, below the storage place.
        n_trials: How many to run.
        scheduler: Stops trials; None for none.
        interrupted: Last checkpoints of earlier trials, by the hash of the policy.
    """
    broken = _Broken()
    tuner = tune.Tuner(
        policy_trainable(
            session,
            cpus=options.cpus_per_trial,
            gpus=options.gpus_per_trial,
            interrupted=interrupted,
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=n_trials,
            max_concurrent_trials=options.workers or None,
            reuse_actors=True,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage_place(session.folder, options),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=_N_CHECKPOINTS),
            failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
            callbacks=[*callbacks, broken],
            stop=broken,
            verbose=0,
        ),
    )
    return tuner.fit()


def first_fault(errors: Iterable[object]) -> StorageError | None:
    """Return the first fault of a trial's own as the user's error; None where machines failed.

    Args:
        errors: Of the trials that were not tried again: what they raised, or Tune's text.

    Returns:
        A `DiskError` where the disk of the trial's machine is at fault.
    """
    for error in errors:
        if isinstance(error, RayTaskError):
            if (fault := fault_of_disk(error.cause)) is not None:
                return disk_error(fault)
            told = str(error).strip().splitlines()[-1].rstrip(".")
            msg = (
                f"A Ray trial failed {_MAX_FAILURES + 1} times: {told}. Mend the cause, then give "
                "--resume; nothing finished is lost."
            )
            return StorageError(msg)
    return None


class _Broken(tune.Callback, tune.Stopper):
    """Ends the experiment at the first trial that fails for good by a fault of its own."""

    def __init__(self) -> None:
        self._is_broken = False

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Note a trial that is not tried again, unless its worker or node was lost."""
        raised = Path(trial.pickled_error_file or "")  # Tune has just written it, on this machine
        if raised.is_file():
            self._is_broken |= isinstance(cloudpickle.loads(raised.read_bytes()), RayTaskError)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Leave the trials alone."""
        return False

    def stop_all(self) -> bool:
        """Whether to end the experiment."""
        return self._is_broken


def _name_of(trial: Trial) -> str:
    return str(trial.trial_id)
