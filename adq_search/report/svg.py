"""The front as a small static picture for a README: SVG written by hand, no browser needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from adq_search.report.front import FrontPoint, FrontReport
from adq_search.report.units import axis_title, title_of, unit_of

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 46, 58
_BLUE, _ORANGE, _BLACK, _GREY = "#0072B2", "#D55E00", "#111111", "#6b6b6b"
_PURPLE = "#CC79A7"


def front_svg(report: FrontReport) -> str:
    """Return the front, the uniform baselines and full precision as an SVG picture.

    x is the first cost objective on a logarithmic axis, y the first measured objective.
    """
    axis, quality = report.axes
    front = list(report.points or report.closest)
    shown = [*front, *report.uniform, report.full_precision]
    unit = unit_of(axis, max(p.cost[axis] for p in front or shown))
    percent = 100.0 if quality == "accuracy" else 1.0
    xs = [p.cost[axis] / unit.factor for p in shown]
    ys = [p.value(quality) * percent for p in shown]
    low_x, high_x = min(xs) / 1.15, max(xs) * 1.25
    ys += [
        percent * (p.replicated.means[quality] + sign * p.replicated.errors.get(quality, 0.0))
        for p in report.points
        if p.replicated is not None and quality in p.replicated.means
        for sign in (-1.0, 1.0)
    ]
    step = _nice_step(max(ys) - min(ys))
    low_y, high_y = math.floor(min(ys) / step - 0.2) * step, math.ceil(max(ys) / step + 0.2) * step

    def x_of(p: FrontPoint) -> float:
        return _x(p.cost[axis] / unit.factor, low_x, high_x)

    def y_of(p: FrontPoint) -> float:
        return _y(p.value(quality) * percent, low_y, high_y)

    n_ticks = round((high_y - low_y) / step)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="13">',
        f"<title>{escape(report.study)}: front of quantization policies</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *_y_ticks([low_y + i * step for i in range(n_ticks + 1)], low_y, high_y, step),
        *_x_ticks(low_x, high_x),
        svg_text(_LEFT, 26, f"{title_of(quality)}{' (%)' if percent > 1 else ''}", weight="bold"),
        svg_text(
            _WIDTH - _RIGHT, _HEIGHT - 14, axis_title(axis, unit), anchor="end", weight="bold"
        ),
        _steps([(x_of(p), y_of(p)) for p in report.points]) if len(report.objectives) == 2 else "",
        *(_dot(x_of(p), y_of(p), p) for p in front),
    ]
    for p in report.points:
        if p.replicated is not None and quality in p.replicated.means:
            mean, error = (
                percent * of.get(quality, 0.0) for of in (p.replicated.means, p.replicated.errors)
            )
            ends = (_y(y, low_y, high_y) for y in (mean - error, mean, mean + error))
            parts.append(_error_bar(x_of(p), *ends))
    for p in report.uniform:
        x, y = x_of(p), y_of(p)
        parts.append(
            f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="none" '
            f'stroke="{_ORANGE}" stroke-width="2"/>'
        )
        parts.append(svg_text(x + 9, y + 17, p.label, fill=_ORANGE))
    x, y = x_of(report.full_precision), y_of(report.full_precision)
    parts.append(f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z" fill="{_BLACK}"/>')
    parts.append(svg_text(x - 11, y + 22, "full precision", anchor="end" if x > 200 else "start"))
    return "\n".join([*(part for part in parts if part), "</svg>"]) + "\n"


def _x(value: float, low: float, high: float) -> float:
    share = math.log(value / low) / math.log(high / low)
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _nice_step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten that divides the span into four to nine parts."""
    raw = max(span, 1e-6) / 5.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(f * power for f in (1.0, 2.0, 5.0, 10.0) if f * power >= raw)


def _y_ticks(values: Sequence[float], low: float, high: float, step: float) -> list[str]:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    out = []
    for value in values:
        y = _y(value, low, high)
        out.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e6e6e6" stroke-width="1"/>'
        )
        out.append(svg_text(_LEFT - 8, y + 4, f"{value:.{digits}f}", anchor="end", fill=_GREY))
    return out


def _x_ticks(low: float, high: float) -> list[str]:
    """Ticks at 1, 2, 5 times powers of ten inside the range; at powers alone over three decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0,) if last - first > 4 else (1.0, 2.0, 5.0)
    base = _HEIGHT - _BOTTOM
    out = [f'<path d="M{_LEFT} {base}H{_WIDTH - _RIGHT}" stroke="{_GREY}" stroke-width="1"/>']
    for value in (f * 10.0**e for e in range(first, last + 1) for f in factors):
        if low <= value <= high:
            x = _x(value, low, high)
            out.append(f'<path d="M{x:.1f} {base}v5" stroke="{_GREY}" stroke-width="1"/>')
            out.append(svg_text(x, base + 20, f"{value:g}", anchor="middle", fill=_GREY))
    return out


def _steps(places: Sequence[tuple[float, float]]) -> str:
    """The best quality that each cost buys: flat until the next front point."""
    if not places:
        return ""
    (x, y), *rest = places
    moves = "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
    return (
        f'<path d="M{x:.1f} {y:.1f}{moves}" fill="none" stroke="{_BLUE}" stroke-width="2" '
        'stroke-opacity="0.7"/>'
    )


def _error_bar(x: float, low: float, middle: float, high: float) -> str:
    """The mean of further trainings, and one standard error to either side."""
    return (
        f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 5:.1f} {middle:.1f}h10" fill="none" '
        f'stroke="{_PURPLE}" stroke-width="2"/>'
    )


def _dot(x: float, y: float, point: FrontPoint) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_BLUE}">'
        f"<title>{escape(point.label)} {point.policy_hash}</title></circle>"
    )


def svg_text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = _BLACK, weight: str = ""
) -> str:
    """Return a text element."""
    bold = f' font-weight="{weight}"' if weight else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"{bold}>'
        f"{escape(text)}</text>"
    )
