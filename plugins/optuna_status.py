"""What an Optuna study tells of itself while it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from optuna.study import Study, get_all_study_names
from optuna.trial import FrozenTrial, TrialState

from adq_search.errors import StorageError
from adq_search.hosting import HostedTrial
from adq_search.job import Job
from adq_search.plugins.optuna_artifacts import JOB
from adq_search.plugins.optuna_ending import is_stopped
from adq_search.plugins.optuna_lease import WORKER, LeaseTerms, is_alive
from adq_search.plugins.optuna_objective import REPLICATE_SEED, measuring, result_of
from adq_search.plugins.optuna_storage import JOURNAL, open_storage
from adq_search.plugins.optuna_worker import FINISHED, load_study
from adq_search.status import StudyStatus, study_status
from adq_search.validation import validated


def read_status(storage: str, name: str) -> StudyStatus:
    """Look at a study without touching it.

    Args:
        storage: Its URL.
        name: Its name.

    Raises:
        StorageError: There is no such study, or it was not made by adq_search.
    """
    study = load_study(open_storage(storage, is_there=True), name)
    attributes = study.user_attrs
    if JOB not in attributes:
        msg = f"Study '{name}' was not made by this version of adq_search. Choose another --study."
        raise StorageError(msg)
    terms = LeaseTerms.of(attributes)
    trials = study.get_trials(deepcopy=False)
    running = [t for t in trials if t.state == TrialState.RUNNING]
    alive = {t.user_attrs[WORKER] for t in running if is_alive(t, terms)}
    return study_status(
        name,
        validated(Job, attributes[JOB], StorageError, what="the study's job"),
        hosted_trials(study),
        counts=Counter(_what_became_of(t) for t in trials),
        workers=sorted(alive),
        is_over=is_stopped(study),
    )


def read_status_in(folder: Path) -> StudyStatus:
    """Look at the study in a run's folder without touching it.

    Raises:
        StorageError: The folder has no study, or several.
    """
    journal = folder / JOURNAL
    if not journal.exists():
        msg = (
            f"There is no {JOURNAL} in {folder}. Where the run has a --storage, give that and "
            "--study in place of the folder."
        )
        raise StorageError(msg)
    names = get_all_study_names(open_storage(str(journal)))
    if len(names) != 1:
        known = ", ".join(names) or "none"
        msg = f"{journal} must hold one study, but has: {known}. Give --storage {journal} --study."
        raise StorageError(msg)
    return read_status(str(journal), names[0])


def hosted_trials(study: Study) -> tuple[HostedTrial, ...]:
    """Return the finished trials that measured a policy.

    Raises:
        StorageError: One of them has lost its result.
    """
    hosted = []
    for trial in measuring(study.get_trials(deepcopy=False, states=FINISHED)):
        result = result_of(trial)
        if result is None:
            msg = (
                f"Trial {trial.number} of study '{study.study_name}' has lost its result. The "
                "storage is damaged; restore it from a copy."
            )
            raise StorageError(msg)
        started = trial.datetime_start
        hosted.append(
            HostedTrial(
                number=trial.number,
                parameters=dict(trial.params),
                result=result,
                origin=trial.user_attrs.get("origin", "sampler"),
                worker=trial.user_attrs.get(WORKER, ""),
                started_at="" if started is None else started.isoformat(timespec="seconds"),
            )
        )
    return tuple(hosted)


def _what_became_of(trial: FrozenTrial) -> str:
    """Return a measured trial's state as measured, of others why they were not measured."""
    if trial.state not in FINISHED:
        return {TrialState.FAIL: "failed"}.get(trial.state, trial.state.name.lower())
    if REPLICATE_SEED in trial.user_attrs:
        return "replicates" if "result" in trial.user_attrs else "repeated"
    result = trial.user_attrs.get("result")
    return str(trial.user_attrs.get("verdict", "pruned") if result is None else result["state"])
