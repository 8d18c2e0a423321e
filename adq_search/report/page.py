"""The report as one HTML file that needs no network: figures, tables, and how it was made."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from adq_search.report._read import MEASURED
from adq_search.report.figures import front_figure, hypervolume_figure, undrawn
from adq_search.report.front import FrontPoint, FrontReport
from adq_search.report.headline import headline, saving_of
from adq_search.report.layer_figures import Costs, bits_figure, shares_figure
from adq_search.report.records import TrialRecord
from adq_search.report.replicated import mean_of
from adq_search.report.tables import INTEGER_MARKS
from adq_search.report.units import amount, short_title_of, title_of

_ALSO_SHOWN = ("weight_bytes", "bops", "average_bits_weighted")
_COUNTED = {
    "rejected": "draws over budget, not trained",
    "repeated": "draws repeated, not trained again",
}
_CONFIG = {"displaylogo": False, "responsive": True, "plotlyServerURL": ""}


def render_page(
    report: FrontReport,
    records: Sequence[TrialRecord],
    costs: Costs,
    run: Mapping[str, Any],
) -> str:
    """Return the report as HTML.

    Args:
        report: The outcome in numbers.
        records: All trials.
        costs: Per-layer costs of the front policies by hash (`CostReport.to_json`).
        run: How it was made: the content of `run.json`.
    """
    policies = {r.policy_hash: r.policy for r in records}
    figures = {"front": front_figure(report, records)}
    if report.hypervolume is not None:
        figures["hypervolume"] = hypervolume_figure(report, records, report.hypervolume.reference)
    if report.points or report.closest:
        figures["bits"] = bits_figure(report, policies, costs)
        figures["shares"] = shares_figure(report, policies, costs)
    environment = Environment(
        loader=PackageLoader("adq_search.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        report=report,
        sentences=headline(report),
        n_undrawn=undrawn(report, records),
        figures={name: _embedded(name, figure) for name, figure in figures.items()},
        plotly_js=Markup(get_plotlyjs()),  # plotly's own text
        columns=_columns(report),
        rows=list(_rows(report)),
        states=_states(report),
        failures=_failures(records),
        schemes=sorted({p.scheme for h in _shown(report) for _, p in policies[h]}),
        hypervolume_reference=_reference(report),
        train_command=_train_command(report, run),
        facts=list(_facts(run)),
        again=[p for p in report.points if p.replicated is not None],
        measured=[o.name for o in report.objectives if o.name in MEASURED],
        mean_of=mean_of,
        integer_marks=INTEGER_MARKS,
        amount=amount,
        title_of=title_of,
        short_title_of=short_title_of,
    )


def _embedded(name: str, figure: go.Figure) -> Markup:
    """Return a figure as HTML; plotly escapes what could end its script."""
    html = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=_CONFIG
    )
    return Markup(html)  # made by plotly from JSON


def _shown(report: FrontReport) -> list[str]:
    return [str(p.policy_hash) for p in report.points or report.closest]


def _columns(report: FrontReport) -> list[str]:
    """Return the figures of the table: measured ones, then the objectives' costs, then others."""
    asked = [o.name for o in report.objectives]
    known = {*report.full_precision.cost, "loss"}
    costs = [n for n in (*asked, *_ALSO_SHOWN) if n in known]
    return ["accuracy", "test_accuracy", "kl", *dict.fromkeys(costs)]


def _rows(report: FrontReport) -> Iterator[dict[str, Any]]:
    columns = _columns(report)
    groups = [("front", report.points), ("closest", report.closest), ("baseline", report.baselines)]
    for group, points in groups:
        for point in points:
            yield {
                "group": group,
                "point": point,
                "is_knee": group == "front" and point.policy_hash == report.knee,
                "saving": saving_of(report, point),
                "integers": _integers(point),
                "cells": [(name, _figure(point, name)) for name in columns],
            }


def _integers(point: FrontPoint) -> str:
    if point.integer_verified:
        return f"verified on {point.integer_samples} validation samples"
    return point.integer_reason or ""


def _figure(point: FrontPoint, name: str) -> float | None:
    value: float | None = point.cost[name] if name in point.cost else getattr(point, name)
    return value


def _states(report: FrontReport) -> list[tuple[str, int]]:
    return [(_COUNTED.get(state, state), n) for state, n in report.counts.items() if n > 0]


def _failures(records: Sequence[TrialRecord]) -> list[tuple[str, str, list[int]]]:
    """Return `(state, reason, trial numbers)` of trials that did not complete, commonest first."""
    lost = [r for r in records if not r.is_complete]
    kinds = Counter((r.state, r.reason or "no reason recorded") for r in lost)
    return [
        (
            state,
            reason,
            [
                r.number
                for r in lost
                if (r.state, r.reason or "no reason recorded") == (state, reason)
            ],
        )
        for (state, reason), _ in kinds.most_common()
    ]


def _reference(report: FrontReport) -> str:
    if report.hypervolume is None:
        return ""
    reference = report.hypervolume.reference.items()
    return ", ".join(f"{title_of(name)} {amount(name, value)}" for name, value in reference)


def _train_command(report: FrontReport, run: Mapping[str, Any]) -> str:
    """Return the command that trains a front policy longer: the knee, else the dearest."""
    files = {p.policy_hash: p.policy_file for p in report.points}
    chosen = files.get(report.knee) or next(reversed(files.values()), None)
    if chosen is None:
        return ""
    task = shlex.quote(str(run.get("job", {}).get("task", "TASK")))
    return f"adq-search train --policy {chosen} --task {task} --epochs 30 --out trained"


def _facts(run: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Return what `run.json` says as flat lines; lists are joined, nested names dotted."""
    for key, value in run.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _facts(value, prefix=f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(str(item) for item in value) or "none"
        elif value is not None:
            yield name, str(value)
