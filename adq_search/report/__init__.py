"""Results of a run: numbers first (`FrontReport`), then table, CSV, figures and one HTML page."""

from adq_search.report.folder import read_front, read_trials, rebuild, write_results
from adq_search.report.front import (
    FULL_PRECISION,
    FrontPoint,
    FrontReport,
    IntegerCheck,
    full_precision_point,
    make_front_report,
)
from adq_search.report.headline import certainty, headline, within_budgets
from adq_search.report.indicators import Hypervolume, hypervolume_history
from adq_search.report.page import render_page
from adq_search.report.records import (
    TrialRecord,
    least_violating,
    select_front,
    uniform_records,
)
from adq_search.report.replicated import Replicate, Replicated
from adq_search.report.svg import front_svg
from adq_search.report.tables import front_table, trials_frame

__all__ = [
    "FULL_PRECISION",
    "FrontPoint",
    "FrontReport",
    "Hypervolume",
    "IntegerCheck",
    "Replicate",
    "Replicated",
    "TrialRecord",
    "certainty",
    "front_svg",
    "front_table",
    "full_precision_point",
    "headline",
    "hypervolume_history",
    "least_violating",
    "make_front_report",
    "read_front",
    "read_trials",
    "rebuild",
    "render_page",
    "select_front",
    "trials_frame",
    "uniform_records",
    "within_budgets",
    "write_results",
]
