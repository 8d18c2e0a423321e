"""The trials as a data frame and as CSV, the front as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import HORIZONTALS
from rich.table import Table

from adq_search.files import write_atomic
from adq_search.report.front import FrontPoint, FrontReport
from adq_search.report.records import TrialRecord
from adq_search.report.units import amount, short_title_of, title_of

#: How tables say that a policy was verified in integers, was found different, was not tried.
INTEGER_MARKS = {True: "✓", False: "✗", None: "–"}
INTEGER_CAPTION = "integer network: ✓ same codes (but ties) and classes, ✗ other ones, – not tried"
_TRIAL_COLUMNS = (
    "number",
    "policy_hash",
    "state",
    "origin",
    "accuracy",
    "loss",
    "kl",
    "epochs",
    "wall_s",
    "reason",
    "host_label",
    "started_at",
    "donor",
    "epochs_before",
)


def trials_frame(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return every trial as one row, in the order of their numbers.

    Columns: number, policy_hash, state, origin, accuracy, loss, kl, epochs, wall_s, reason,
    host_label, started_at, donor, epochs_before, then `cost.*`, `health.*` (totals) and `param.*`.
    What was not measured or not drawn is missing, never zero.
    """
    rows = [_row(record) for record in sorted(records, key=lambda r: r.number)]
    extra = list(dict.fromkeys(key for row in rows for key in row if key not in _TRIAL_COLUMNS))
    kinds = ("cost.", "health.", "param.")
    ordered = [key for kind in kinds for key in extra if key.startswith(kind)]
    frame = pd.DataFrame(rows, columns=[*_TRIAL_COLUMNS, *ordered])
    parameters = [key for key in ordered if key.startswith("param.")]
    return frame.astype({key: frame[key].convert_dtypes().dtype for key in parameters})


def _row(record: TrialRecord) -> dict[str, Any]:
    totals = {k: v for k, v in record.health.items() if isinstance(v, int | float | str)}
    return {
        **{key: getattr(record, key) for key in _TRIAL_COLUMNS},
        **{f"cost.{key}": value for key, value in record.cost.items()},
        **{f"health.{key}": value for key, value in totals.items()},
        **{f"param.{key}": value for key, value in record.parameters.items()},
    }


def write_trials_csv(records: Sequence[TrialRecord], path: Path) -> None:
    """Write `trials_frame` as CSV; numbers keep all their digits."""
    frame = trials_frame(records)
    write_atomic(path, lambda temporary: frame.to_csv(temporary, index=False))


def front_table(report: FrontReport) -> Table:
    """Return the front as a table for the terminal, the baselines below a rule.

    Fits into 80 columns for one cost objective.
    """
    axis, quality = report.axes
    figures = list(dict.fromkeys([axis, "weight_bytes", "average_bits_weighted"]))
    shown = [name for name in figures if name in report.full_precision.cost]
    measured = list(dict.fromkeys(["accuracy", "test_accuracy", quality]))
    table = Table(
        title=front_title(report),
        title_justify="left",
        box=HORIZONTALS,
        padding=0,
        show_edge=False,
        caption=INTEGER_CAPTION,
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True, min_width=16)
    table.add_column("", no_wrap=True)
    for name in [*measured, *shown]:
        table.add_column(short_title_of(name), justify="right", no_wrap=True)
    table.add_column("saving", justify="right", no_wrap=True)
    table.add_column("proposed by")

    def add(point: FrontPoint) -> None:
        table.add_row(
            point.policy_hash or "–",
            INTEGER_MARKS[point.integer_verified],
            *(amount(name, getattr(point, name)) for name in measured),
            *(amount(name, point.cost[name]) for name in shown),
            f"{report.full_precision.cost[axis] / point.cost[axis]:.1f}x",
            point.origin if point.state == "complete" else f"{point.origin} ({point.state})",
        )

    for point in report.points or report.closest:
        add(point)
    table.add_section()
    for point in report.baselines:
        add(point)
    return table


def front_title(report: FrontReport) -> str:
    """Return what the table's rows are, honest about a front that is not there."""
    if report.points:
        return f"{report.study}: {len(report.points)} policies on the front"
    if report.closest:
        limits = ", ".join(f"{title_of(k)} <= {amount(k, v)}" for k, v in report.budgets.items())
        return f"{report.study}: no trial meets {limits}; these come nearest"
    return f"{report.study}: no trial completed"
