"""A sensitivity table as a picture: a row a layer, a column a quantizer and its bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from adq_search.report.svg import svg_text
from adq_search.sensitivity import SensitivityTable

_CELL_W, _CELL_H = 30, 22
_TOP, _GAP, _LEGEND = 84, 26, 150
#: Viridis at five places: light is harmless. Read by the colour-blind, and in grey.
_RAMP = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))
_DARK, _GREY = "#111111", "#6b6b6b"
#: Decades below the largest score that are told apart.
_DECADES = 5.0


def sensitivity_svg(table: SensitivityTable, layers: Sequence[str], *, title: str) -> str:
    """Return the predicted loss increases as an SVG heat map on a logarithmic scale.

    Args:
        table: What is drawn: weights left, inputs right.
        layers: Rows from the top.
        title: Of the picture.
    """
    panels = {"weights alone": table.weights, "inputs alone": table.inputs}
    scores = [s for panel in panels.values() for s in panel.values()]
    high = math.log10(max([s for s in scores if s > 0.0], default=1.0))
    left = 16 + 7 * max(len(name) for name in layers)
    parts: list[str] = []
    x = left
    for heading, panel in panels.items():
        columns = sorted({key[1:] for key in panel})
        parts.append(svg_text(x, 42, heading, weight="bold"))
        parts += _headings(columns, x)
        for row, layer in enumerate(layers):
            y = _TOP + row * _CELL_H
            parts += _cells(panel, layer, columns, x, y, high)
        x += len(columns) * _CELL_W + _GAP
    for row, layer in enumerate(layers):
        parts.append(svg_text(left - 8, _TOP + row * _CELL_H + 15, layer, anchor="end"))
    width, height = x + _LEGEND, max(_TOP + len(layers) * _CELL_H + 20, _TOP + 150)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="12">'
    )
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            svg_text(16, 20, title, weight="bold"),
            *parts,
            *_legend(x, high),
            "</svg>\n",
        ]
    )


def _headings(columns: Sequence[tuple[str, int]], x: int) -> list[str]:
    """Bits over every column, the quantizer over its first."""
    out = []
    for i, (quantizer, bits) in enumerate(columns):
        place = x + i * _CELL_W
        if i == 0 or columns[i - 1][0] != quantizer:
            out.append(svg_text(place, 60, quantizer, fill=_GREY))
        out.append(svg_text(place + _CELL_W / 2, 78, str(bits), anchor="middle", fill=_GREY))
    return out


def _cells(
    panel: Mapping[tuple[str, str, int], float],
    layer: str,
    columns: Sequence[tuple[str, int]],
    x: int,
    y: int,
    high: float,
) -> list[str]:
    out = []
    for i, (quantizer, bits) in enumerate(columns):
        score = panel.get((layer, quantizer, bits))
        if score is not None:
            shown = f"{layer}, {quantizer} at {bits} bits: {score:.3g} nats"
            out.append(
                f'<rect x="{x + i * _CELL_W}" y="{y}" width="{_CELL_W - 1}" '
                f'height="{_CELL_H - 1}" fill="{_color(score, high)}">'
                f"<title>{escape(shown)}</title></rect>"
            )
    return out


def _legend(x: int, high: float) -> list[str]:
    out = [svg_text(x, 60, "predicted loss", fill=_DARK), svg_text(x, 76, "increase, nats")]
    for i in range(int(_DECADES) + 1):
        y = _TOP + i * _CELL_H
        color = _color(10.0 ** (high - i), high)
        out.append(f'<rect x="{x}" y="{y}" width="{_CELL_W}" height="{_CELL_H}" fill="{color}"/>')
        sign = "≤ " if i == _DECADES else ""
        out.append(svg_text(x + _CELL_W + 6, y + 15, f"{sign}{10.0 ** (high - i):.1e}"))
    return out


def _color(score: float, high: float) -> str:
    """Return the colour of a score: dark at the largest, light five decades below it."""
    low = high - _DECADES
    share = (math.log10(score) - low) / _DECADES if score > 0.0 else 0.0
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    mixed = (
        round(a + (place - first) * (b - a))
        for a, b in zip(_RAMP[first], _RAMP[first + 1], strict=True)
    )
    return "#" + "".join(f"{value:02x}" for value in mixed)
