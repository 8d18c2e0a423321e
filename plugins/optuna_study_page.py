"""The page of a study in optuna-dashboard: how it stands, its front, how to repeat it.

The process of `adq-search run` keeps it; the pages of trials are written by who measures them.
"""

from __future__ import annotations

import math
import time

from optuna.study import Study

from adq_search.errors import StorageError
from adq_search.plugins.optuna_artifacts import store_of, upload
from adq_search.plugins.optuna_status import hosted_trials
from adq_search.plugins.optuna_trial_pages import DASHBOARD, has_pages, should_write
from adq_search.report import full_precision_point, make_front_report
from adq_search.report.figures import front_figure, hypervolume_figure
from adq_search.report.notes import study_note
from adq_search.report.records import TrialRecord
from adq_search.results import record_of
from adq_search.sensitivity import SensitivityTable
from adq_search.session import SENSITIVITY_FILE, Session

try:
    import optuna_dashboard
except ImportError:  # the extra `dashboard`; `has_pages` says so
    optuna_dashboard = None

#: The page takes at most this share of the time, and storage grows by a front at most so often.
_SHARE_OF_TIME = 0.01
_REST_S = 10.0


def begin_pages(study: Study, session: Session, asked: bool | None) -> None:
    """Say in a study whether all its workers write pages, and attach the job as a file.

    Args:
        study: The study, published.
        session: The prepared job.
        asked: What the user said; None leaves a study as it is, and decides for a new one by
            whether the dashboard is installed.
    """
    if asked is None and DASHBOARD in study.user_attrs:
        return
    is_wanted, was_wanted = should_write(asked), study.user_attrs.get(DASHBOARD, False)
    study.set_user_attr(DASHBOARD, is_wanted)
    if is_wanted and not was_wanted:
        upload(store_of(study), session.folder / "job.json", study)


class StudyPage:
    """Keeps the page of a study; does nothing where the study has none.

    Args:
        study: The study; `begin_pages` was called.
        session: The prepared job.
    """

    def __init__(self, study: Study, session: Session) -> None:
        self._study = study
        self._session = session
        self._has_pages = has_pages(study)
        self._next = -math.inf
        self._n_told = -1
        self._front_drawn: list[str] | None = None
        self._sensitivity = _sensitivity_of(session) if self._has_pages else None

    def refresh(self, *, is_last: bool = False) -> None:
        """Write what is new since the last time, unless that is too short ago.

        Args:
            is_last: Write it however short ago.
        """
        began = time.monotonic()
        if not self._has_pages or (began < self._next and not is_last):
            return
        records = [record_of(trial) for trial in hosted_trials(self._study)]
        if len(records) != self._n_told:
            self._write(records)
            self._n_told = len(records)
        now = time.monotonic()
        self._next = now + max(_REST_S, (now - began) / _SHARE_OF_TIME)

    def _write(self, records: list[TrialRecord]) -> None:
        plan = self._session.plan
        search = plan.job.search
        note = study_note(
            self._study.study_name,
            plan.job.task,
            records=records,
            n_trials=search.trials,
            objectives=search.axes,
            budgets=search.budgets,
            sensitivity=self._sensitivity,
        )
        optuna_dashboard.save_note(self._study, note)
        report = make_front_report(
            self._study.study_name,
            objectives=search.axes,
            budgets=search.budgets,
            records=records,
            full_precision=full_precision_point(
                accuracy=self._session.full_precision.accuracy,
                test_accuracy=None,
                loss=self._session.full_precision.loss,
                cost=plan.totals(plan.full_precision_policy()),
            ),
            test_accuracies=None,
            kept_weights=(),
        )
        front = [str(point.policy_hash) for point in report.points]
        if front == self._front_drawn:
            return
        figures = {"front": front_figure(report, records)}
        if report.hypervolume is not None:
            reference = report.hypervolume.reference
            figures["hypervolume"] = hypervolume_figure(report, records, reference)
        for name, figure in figures.items():
            optuna_dashboard.save_plotly_graph_object(self._study, figure, graph_object_id=name)
        self._front_drawn = front


def _sensitivity_of(session: Session) -> SensitivityTable | None:
    """Return what the prior predicts; None where nothing was measured, or by another version."""
    if not (session.folder / SENSITIVITY_FILE).exists():
        return None
    try:
        return session.sensitivity()
    except StorageError:
        return None
