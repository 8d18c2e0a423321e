"""What an Optuna study tells of itself while it runs."""

from __future__ import annotations

from collections import Counter

from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from adq_search.errors import StorageError
from adq_search.hosting import HostedTrial
from adq_search.job import Job
from adq_search.plugins.optuna_artifacts import JOB
from adq_search.plugins.optuna_lease import WORKER, LeaseTerms, is_alive
from adq_search.plugins.optuna_objective import measuring, result_of
from adq_search.plugins.optuna_storage import open_storage
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
    silent = _without_heartbeat(storage, study, terms)
    alive = {t.user_attrs[WORKER] for t in running if is_alive(t, terms) and t.number not in silent}
    return study_status(
        name,
        validated(Job, attributes[JOB], StorageError, what="the study's job"),
        hosted_trials(study),
        counts=Counter(_what_became_of(t) for t in trials),
        workers=sorted(alive),
    )


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
    result = trial.user_attrs.get("result")
    return str(trial.user_attrs.get("verdict", "pruned") if result is None else result["state"])


def _without_heartbeat(storage: str, study: Study, terms: LeaseTerms) -> set[int]:
    """Return the numbers of running trials whose heartbeats ended, none where there are none."""
    judge = open_storage(storage, terms)
    if not isinstance(judge, RDBStorage):
        return set()
    # Optuna's public way to ask, `fail_stale_trials`, would fail them.
    stale = set(judge._get_stale_trial_ids(judge.get_study_id_from_name(study.study_name)))
    return {judge.get_trial(trial_id).number for trial_id in stale}
