"""The search as interactive figures: the front among all trials, and its growth.

Colours are those of Okabe and Ito, told apart by colour-blind readers; every colour comes with its
own marker shape or label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from adq_search.report.front import FrontPoint, FrontReport
from adq_search.report.headline import saving_of
from adq_search.report.indicators import hypervolume_history
from adq_search.report.records import TrialRecord, is_within
from adq_search.report.replicated import mean_of
from adq_search.report.units import Unit, amount, axis_title, title_of, unit_of

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, BLACK, GREY = "#56B4E9", "#E69F00", "#111111", "#8a8a8a"
FONT = {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": BLACK}
GRID = {"gridcolor": "#ececec", "zeroline": False, "linecolor": "#999999", "ticks": "outside"}


class _Kind(NamedTuple):
    """How trials of one sort are drawn."""

    label: str
    color: str
    symbol: str


_KINDS: dict[str, _Kind] = {
    "sampler": _Kind("trial of the sampler", SKY, "circle"),
    "prior": _Kind("proposed by the prior", GREEN, "triangle-up"),
    "manual": _Kind("given by hand", PURPLE, "pentagon"),
    "over budget": _Kind("over budget", YELLOW, "circle-open"),
    "stopped": _Kind("stopped early", GREY, "triangle-down-open"),
    "failed": _Kind("failed", GREY, "cross-thin-open"),
    "diverged": _Kind("diverged", GREY, "x-thin-open"),
}


def front_figure(report: FrontReport, records: Sequence[TrialRecord]) -> go.Figure:
    """Draw quality against cost: the front's steps, all trials, the baselines, full precision.

    The view opens on front and baselines; trials at chance lie below it. Trials without a finite
    quality cannot be drawn; `undrawn` counts them.
    """
    axis, quality = report.axes
    unit = unit_of(axis, max((r.cost[axis] for r in records), default=1.0))
    figure = go.Figure()
    for kind, members in _by_kind(records, report).items():
        figure.add_trace(_trials_trace(_KINDS[kind], members, axis, quality, unit))
    if len(report.objectives) == 2:
        figure.add_trace(_steps_trace(report, unit))
    figure.add_trace(_points_trace("front", report.points, report, unit, BLUE, "circle", 11))
    if any(p.replicated is not None for p in report.points):
        figure.add_trace(_replicates_trace(report, unit))
    if report.closest:
        figure.add_trace(
            _points_trace(
                "nearest to the budgets", report.closest, report, unit, YELLOW, "star", 12
            )
        )
    baselines = _points_trace(
        "uniform bits", report.uniform, report, unit, ORANGE, "square-open", 12
    )
    figure.add_trace(baselines.update(mode="markers+text", textposition="bottom right"))
    figure.add_trace(
        _points_trace(
            "full precision", (report.full_precision,), report, unit, BLACK, "diamond", 12
        )
    )
    _shade_budget(figure, report, unit)
    _style(figure, axis_title(axis, unit), title_of(quality), height=520)
    figure.update_xaxes(type="log", dtick="D2", minorloglabels="complete")
    figure.update_yaxes(
        tickformat=".1%" if quality == "accuracy" else None, range=_quality_range(report)
    )
    figure.update_layout(updatemenus=[_scale_buttons()])
    return figure


def undrawn(report: FrontReport, records: Sequence[TrialRecord]) -> int:
    """Return how many trials `front_figure` cannot draw."""
    _, quality = report.axes
    return sum(getattr(r, quality) is None for r in records)


def hypervolume_figure(
    report: FrontReport, records: Sequence[TrialRecord], reference: Mapping[str, float]
) -> go.Figure:
    """Draw how the front's hypervolume grew, and the level that seeds alone reach."""
    rules = (report.objectives, report.budgets, reference)
    history = hypervolume_history(records, *rules)
    figure = go.Figure(
        go.Scatter(
            x=[number for number, _ in history],
            y=[share for _, share in history],
            mode="lines+markers",
            line={"color": BLUE, "shape": "hv"},
            marker={"size": 5},
            name="all trials",
            hovertemplate="after trial %{x}: %{y:.4f}<extra></extra>",
        )
    )
    seeds = hypervolume_history([r for r in records if r.is_seed], *rules)
    if seeds:
        figure.add_hline(
            y=seeds[-1][1],
            line={"color": ORANGE, "dash": "dash", "width": 2},
            annotation={
                "text": f"seeds and baselines alone: {seeds[-1][1]:.4f}",
                "font": {"color": ORANGE},
            },
            annotation_position="bottom right",
        )
    _style(figure, "trial", "hypervolume (share of the box)", height=320)
    figure.update_layout(showlegend=False)
    return figure


def _quality_range(report: FrontReport) -> list[float]:
    _, quality = report.axes
    shown = (*report.points, *report.closest, *report.uniform, report.full_precision)
    values = [p.value(quality) for p in shown]
    for again in (p.replicated for p in report.points if p.replicated is not None):
        if quality in again.means:
            mean, error = again.means[quality], again.errors.get(quality, 0.0)
            values += [mean - error, mean + error]
    margin = 0.08 * (max(values) - min(values)) or 0.01
    return [min(values) - margin, max(values) + margin]


def _by_kind(records: Sequence[TrialRecord], report: FrontReport) -> dict[str, list[TrialRecord]]:
    """Sort the trials that have a quality; uniform baselines that completed are drawn apart."""
    _, quality = report.axes
    kinds: dict[str, list[TrialRecord]] = {kind: [] for kind in _KINDS}
    for record in records:
        if getattr(record, quality) is None:
            continue
        if not record.is_complete:
            kinds[record.state].append(record)
        elif not is_within(record, report.budgets):
            kinds["over budget"].append(record)
        elif not record.origin.startswith("uniform"):
            first = record.origin.split(" ")[0]
            kinds[first if first in kinds else "manual"].append(record)
    return {kind: members for kind, members in kinds.items() if members}


def _trials_trace(
    kind: _Kind, members: Sequence[TrialRecord], axis: str, quality: str, unit: Unit
) -> go.Scatter:
    return go.Scatter(
        x=[r.cost[axis] / unit.factor for r in members],
        y=[getattr(r, quality) for r in members],
        mode="markers",
        name=kind.label,
        marker={"color": kind.color, "symbol": kind.symbol, "size": 8, "line": {"width": 1.5}},
        opacity=0.6,
        customdata=[_trial_hover(r) for r in members],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _trial_hover(record: TrialRecord) -> str:
    lines = [
        f"<b>trial {record.number}</b> ({record.state}, {record.origin})",
        f"policy {record.policy_hash}",
        f"accuracy {amount('accuracy', record.accuracy)}, KL {amount('kl', record.kl)}",
        *(f"{title_of(k)}: {amount(k, record.cost[k])}" for k in _told(record.cost)),
        *([record.reason] if record.reason else []),
    ]
    return "<br>".join(lines)


def _told(cost: Mapping[str, float]) -> list[str]:
    wanted = ("energy_pj", "weight_bytes", "bops", "average_bits_weighted")
    return [name for name in wanted if name in cost] or list(cost)


def _points_trace(
    name: str,
    points: Sequence[FrontPoint],
    report: FrontReport,
    unit: Unit,
    color: str,
    symbol: str,
    size: int,
) -> go.Scatter:
    axis, quality = report.axes
    return go.Scatter(
        x=[p.cost[axis] / unit.factor for p in points],
        y=[p.value(quality) for p in points],
        text=[p.label for p in points],
        textfont={"color": color},
        mode="markers",
        name=name,
        marker={"color": color, "symbol": symbol, "size": size, "line": {"width": 2}},
        customdata=[_point_hover(p, report) for p in points],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _point_hover(point: FrontPoint, report: FrontReport) -> str:
    knee = " (knee)" if point.policy_hash is not None and point.policy_hash == report.knee else ""
    lines = [
        f"<b>{point.label}{knee}</b>: {point.origin}",
        f"policy {point.policy_hash}" if point.policy_hash else "unquantized network",
        f"accuracy {amount('accuracy', point.accuracy)} on validation, "
        f"{amount('accuracy', point.test_accuracy)} on test",
        f"{saving_of(report, point):.1f}x less {title_of(report.axes[0])} than full precision",
        *(f"{title_of(k)}: {amount(k, point.cost[k])}" for k in _told(point.cost)),
    ]
    return "<br>".join(lines)


def _replicates_trace(report: FrontReport, unit: Unit) -> go.Scatter:
    """The means of the front's further trainings, with their standard errors."""
    axis, quality = report.axes
    shown = [(p, p.replicated) for p in report.points if p.replicated is not None]
    drawn = [(p, again) for p, again in shown if quality in again.means]
    return go.Scatter(
        x=[p.cost[axis] / unit.factor for p, _ in drawn],
        y=[again.means[quality] for _, again in drawn],
        error_y={
            "type": "data",
            "array": [again.errors.get(quality, 0.0) for _, again in drawn],
            "color": PURPLE,
        },
        mode="markers",
        name="trained again: mean and standard error",
        marker={"color": PURPLE, "symbol": "line-ew-open", "size": 10, "line": {"width": 2}},
        customdata=[
            f"<b>{p.label}</b>, trained again {again.n_complete} times<br>"
            f"{title_of(quality)} {mean_of(again, quality)}<br>"
            f"not dominated with probability {again.probability:.2f}"
            for p, again in drawn
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _steps_trace(report: FrontReport, unit: Unit) -> go.Scatter:
    axis, quality = report.axes
    return go.Scatter(
        x=[p.cost[axis] / unit.factor for p in report.points],
        y=[p.value(quality) for p in report.points],
        mode="lines",
        line={"color": BLUE, "shape": "hv", "width": 2},
        hoverinfo="skip",
        showlegend=False,
    )


def _shade_budget(figure: go.Figure, report: FrontReport, unit: Unit) -> None:
    axis, _ = report.axes
    if axis not in report.budgets:
        return
    limit = report.budgets[axis] / unit.factor
    dearest = max(report.full_precision.cost[axis] / unit.factor, limit) * 2.0
    text = {"text": "over budget", "textposition": "top left", "font": {"color": "#8a5a00"}}
    figure.add_shape(
        type="rect",
        x0=limit,
        x1=dearest,
        y0=0,
        y1=1,
        yref="y domain",
        fillcolor="rgba(230, 159, 0, 0.12)",
        line={"width": 0},
        layer="below",
        label=text,
    )


def _scale_buttons() -> dict[str, Any]:
    return {
        "type": "buttons",
        "direction": "left",
        "x": 0.0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "buttons": [
            {
                "label": f"{kind} cost axis",
                "method": "relayout",
                "args": [{"xaxis.type": kind, "xaxis.dtick": tick, "xaxis.autorange": True}],
            }
            for kind, tick in (("log", "D2"), ("linear", None))
        ],
    }


def _style(figure: go.Figure, x_title: str, y_title: str, *, height: int) -> None:
    figure.update_layout(
        template="none",
        font=FONT,
        height=height,
        margin={"l": 76, "r": 20, "t": 56, "b": 56},
        legend={"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0},
        hoverlabel={"align": "left", "bgcolor": "white"},
        hovermode="closest",
    )
    figure.update_xaxes(title=x_title, **GRID)
    figure.update_yaxes(title=y_title, **GRID)
