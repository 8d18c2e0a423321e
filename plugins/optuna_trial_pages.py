"""The pages of trials in optuna-dashboard: a note, the policy's file, the weights.

Everything lies in the study's own storage and artifact store, so the dashboard needs nothing of
adq_search: `optuna-dashboard STORAGE --artifact-dir FOLDER/artifacts`.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import Trial, TrialState

from adq_search.errors import MissingExtraError
from adq_search.hosting import HostedTrial
from adq_search.pareto import front_indices
from adq_search.plugins.optuna_artifacts import store_of, upload
from adq_search.plugins.optuna_lease import WORKER
from adq_search.provenance import provenance
from adq_search.report.notes import trial_note
from adq_search.results import record_of, save_measured_policy
from adq_search.session import Session
from adq_search.trial import TrialResult

try:
    import optuna_dashboard
except ImportError:  # the extra `dashboard`
    optuna_dashboard = None

#: User attribute of a study: whether its workers write for the dashboard.
DASHBOARD = "adq_search.dashboard"


def should_write(asked: bool | None) -> bool:
    """Whether a run writes for the dashboard: as asked, else where the dashboard is installed.

    Raises:
        MissingExtraError: It was asked for and is not installed.
    """
    if asked and optuna_dashboard is None:
        msg = "Notes for optuna-dashboard need it. Install it: pip install 'adq-search[dashboard]'"
        raise MissingExtraError(msg)
    return optuna_dashboard is not None if asked is None else asked


def has_pages(study: Study) -> bool:
    """Whether a study has pages that this process can write."""
    return optuna_dashboard is not None and bool(study.user_attrs.get(DASHBOARD))


class TrialPages:
    """Writes the pages of the trials that this process measures; none where the study has none.

    Args:
        study: The study.
        session: The prepared job.
        has_weights: Whether weights are attached by others; if not, those of trials that are on
            the front when they end are attached here.
    """

    def __init__(self, study: Study, session: Session, *, has_weights: bool) -> None:
        self._session = session
        self._store = store_of(study) if has_pages(study) else None
        self._has_weights = has_weights

    def write(self, trial: Trial, result: TrialResult) -> None:
        """Attach note and files to a trial that is not told yet.

        The policy's file is one that `adq-search train --policy` takes.
        """
        if self._store is None:
            return
        record = record_of(
            HostedTrial(
                number=trial.number,
                parameters=dict(trial.params),
                result=result,
                origin=trial.user_attrs.get("origin", "sampler"),
                worker=trial.user_attrs.get(WORKER, ""),
            )
        )
        with tempfile.TemporaryDirectory(prefix="adq-search-") as folder:
            file = Path(folder) / "policy.json"
            made = _provenance(self._session.plan.job.search.seed)
            save_measured_policy(self._session, record, file, {**made, "trial": trial.number})
            upload(self._store, file, trial)
        weights = self._session.weights_file(result.policy)
        if not self._has_weights and weights.exists() and self._is_on_front(trial, result):
            upload(self._store, weights, trial)
        axes = self._session.plan.job.search.axes
        optuna_dashboard.save_note(trial, trial_note(record, axes))

    def _is_on_front(self, trial: Trial, result: TrialResult) -> bool:
        complete = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = [*(t.values for t in complete), self._session.plan.values(result)]
        directions = [axis.direction for axis in self._session.plan.job.search.axes]
        return len(complete) in front_indices(values, directions)


@functools.cache
def _provenance(seed: int) -> dict[str, Any]:
    """Return how this process's files are made; once, since it asks git."""
    return provenance(seed=seed)
