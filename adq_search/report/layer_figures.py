"""Front policies layer by layer: bits, schemes, and where the cost goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from adq_search.errors import StorageError
from adq_search.policy import MAX_BITS, MIN_BITS, LayerPrecision, Policy
from adq_search.report.figures import (
    BLUE,
    FONT,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    YELLOW,
)
from adq_search.report.front import FrontPoint, FrontReport
from adq_search.report.units import amount, axis_title, title_of, unit_of

Costs = Mapping[str, Mapping[str, Any]]
#: Figures that add up over layers, in the order they are offered.
_ADDITIVE = ("energy_pj", "weight_bytes", "memory_bytes", "bops", "macs")
_SCHEME_COLORS = (BLUE, ORANGE, GREEN, YELLOW, PURPLE, SKY, "#F0E442", GREY)


def bits_figure(report: FrontReport, policies: Mapping[str, Policy], costs: Costs) -> go.Figure:
    """Draw weight bits, input bits and scheme of every layer of every front policy.

    One column a policy, cheapest left; one row a layer, the network's first on top.

    Args:
        report: The front.
        policies: Its policies by hash.
        costs: Their per-layer costs by hash (`CostReport.to_json`).
    """
    points = report.points or report.closest
    columns = [policies[str(p.policy_hash)] for p in points]
    names = columns[0].names
    schemes = sorted({p.scheme for policy in columns for _, p in policy})
    n_panels = 2 if len(schemes) == 1 else 3
    titles = ["weight bits", "input bits", "scheme"][:n_panels]
    figure = make_subplots(
        1, n_panels, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.02
    )
    hover = [
        [
            _hover(point, policy, name, report, costs)
            for point, policy in zip(points, columns, strict=True)
        ]
        for name in names
    ]

    def panel(values: list[list[Any]], texts: list[list[str]], **look: Any) -> go.Heatmap:
        return go.Heatmap(
            x=[p.label for p in points],
            y=list(names),
            z=values,
            text=texts,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            xgap=1,
            ygap=1,
            **look,
        )

    bits_look = {"coloraxis": "coloraxis", "texttemplate": "%{text}"}
    for column, field in enumerate(("weight_bits", "input_bits"), start=1):
        values = [[getattr(policy[name], field) for policy in columns] for name in names]
        texts = [["" if bits is None else f"{bits}" for bits in row] for row in values]
        figure.add_trace(panel(values, texts, **bits_look), row=1, col=column)
    if n_panels == 3:
        values = [[schemes.index(policy[name].scheme) for policy in columns] for name in names]
        texts = [[policy[name].scheme for policy in columns] for name in names]
        look = {"colorscale": _stepped(len(schemes)), "zmin": -0.5, "zmax": len(schemes) - 0.5}
        figure.add_trace(panel(values, texts, showscale=False, **look), row=1, col=3)
        _scheme_legend(figure, schemes)
    _style(figure, len(names))
    return figure


def shares_figure(report: FrontReport, policies: Mapping[str, Policy], costs: Costs) -> go.Figure:
    """Draw the cost of each front policy, stacked by layer; buttons choose figure and scale."""
    points = report.points or report.closest
    hashes = [str(p.policy_hash) for p in points]
    names = policies[hashes[0]].names
    axis, _ = report.axes
    known = layer_costs(costs, hashes[0])[names[0]]
    offered = sorted((n for n in _ADDITIVE if n in known), key=lambda n: n != axis)
    figures = {name: _stacked(name, hashes, names, costs) for name in offered}
    colors = sample_colorscale("Viridis", [i / max(1, len(names) - 1) for i in range(len(names))])
    values, title = figures[offered[0]]
    figure = go.Figure(
        [
            go.Bar(
                x=[p.label for p in points],
                y=row,
                name=name,
                marker={"color": color, "line": {"color": "white", "width": 0.5}},
                hovertemplate=f"{name}<br>%{{x}}: %{{y:.3g}}<extra></extra>",
            )
            for name, row, color in zip(names, values, colors, strict=True)
        ]
    )
    choose = [
        {
            "label": title_of(name),
            "method": "update",
            "args": [{"y": rows}, {"yaxis.title.text": heading}],
        }
        for name, (rows, heading) in figures.items()
    ]
    scale = [
        {"label": label, "method": "relayout", "args": [{"barnorm": norm}]}
        for label, norm in (("amounts", ""), ("shares in %", "percent"))
    ]
    place = {"y": 1.02, "yanchor": "bottom", "showactive": True}
    figure.update_layout(
        template="none",
        font=FONT,
        barmode="stack",
        height=460,
        margin={"l": 76, "r": 20, "t": 56, "b": 56},
        legend={"traceorder": "reversed", "font": {"size": 11}},
        hoverlabel={"align": "left"},
        updatemenus=[
            {"buttons": choose, "x": 0.0, "xanchor": "left", **place},
            {
                "buttons": scale,
                "x": 0.3,
                "xanchor": "left",
                "type": "buttons",
                "direction": "left",
                **place,
            },
        ],
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=title, gridcolor="#ececec")
    return figure


def layer_costs(costs: Costs, policy_hash: str) -> dict[str, Mapping[str, float]]:
    """Return the cost figures of each layer of a policy, by layer name.

    Raises:
        StorageError: `costs.json` does not hold the policy.
    """
    if policy_hash not in costs:
        msg = f"costs.json holds no costs of policy {policy_hash}. Run the search again."
        raise StorageError(msg)
    return {row["name"]: row for row in costs[policy_hash]["layers"]}


def _hover(point: FrontPoint, policy: Policy, name: str, report: FrontReport, costs: Costs) -> str:
    layers = layer_costs(costs, policy.hash)
    axis, _ = report.axes
    figure = axis if axis in layers[name] else "energy_pj"
    total = sum(row[figure] for row in layers.values())
    return (
        f"<b>{name}</b>, {point.label} (policy {policy.hash})<br>{_in_words(policy[name])}<br>"
        f"{title_of(figure)}: {amount(figure, layers[name][figure])}, "
        f"{layers[name][figure] / total:.1%} of the network"
        f"<br>{layers[name]['macs'] / 1e6:.3g} M MACs, "
        f"{amount('weight_bytes', layers[name]['weight_bytes'])} of weights"
    )


def _in_words(precision: LayerPrecision) -> str:
    if precision.is_float:
        return "floating point"
    momentum = precision.ema_momentum
    return (
        f"{precision.weight_bits} bit weights, {precision.input_bits} bit inputs, "
        f"scheme {precision.scheme}" + ("" if momentum is None else f", EMA momentum {momentum:g}")
    )


def _stepped(n: int) -> list[tuple[float, str]]:
    """A colour scale of n flat steps."""
    colors = [_SCHEME_COLORS[i % len(_SCHEME_COLORS)] for i in range(n)]
    return [(edge / n, color) for i, color in enumerate(colors) for edge in (i, i + 1)]


def _scheme_legend(figure: go.Figure, schemes: Sequence[str]) -> None:
    for i, scheme in enumerate(schemes):
        color = _SCHEME_COLORS[i % len(_SCHEME_COLORS)]
        marker = {"symbol": "square", "size": 11, "color": color}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=scheme), row=1, col=3
        )


def _stacked(
    figure: str, hashes: Sequence[str], names: Sequence[str], costs: Costs
) -> tuple[list[list[float]], str]:
    """Return one row of amounts for each layer, in a readable unit, and the axis title."""
    by_policy = [layer_costs(costs, policy_hash) for policy_hash in hashes]
    totals = [sum(row[figure] for row in layers.values()) for layers in by_policy]
    unit = unit_of(figure, max(totals))
    rows = [[layers[name][figure] / unit.factor for layers in by_policy] for name in names]
    return rows, axis_title(figure, unit)


def _style(figure: go.Figure, n_layers: int) -> None:
    scale = {"orientation": "h", "thickness": 12, "dtick": 1, "lenmode": "pixels", "len": 240}
    place = {"x": 0.0, "xanchor": "left", "y": 0.0, "yanchor": "bottom", "yref": "container"}
    figure.update_layout(
        template="none",
        font=FONT,
        height=180 + 24 * max(n_layers, 4),
        margin={"l": 20, "r": 20, "t": 64, "b": 116},
        coloraxis={
            "colorscale": "Cividis",
            "cmin": MIN_BITS,
            "cmax": MAX_BITS,
            "colorbar": {"title": {"text": "bits", "side": "right"}, **scale, **place},
        },
        legend={
            "orientation": "h",
            "x": 1.0,
            "xanchor": "right",
            "y": 0.01,
            "yanchor": "bottom",
            "yref": "container",
        },
        hoverlabel={"align": "left"},
        plot_bgcolor="#f4f4f4",
    )
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(
        type="category", showgrid=False, dtick=1, tickangle=-90, tickfont={"size": 11}
    )
