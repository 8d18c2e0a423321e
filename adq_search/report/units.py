"""Figures as people read them: a name, a unit, a number of sensible size."""

from __future__ import annotations

from typing import NamedTuple

_PREFIXED: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((1024.0**2, "MiB"), (1024.0, "KiB"), (1.0, "B")),
    "pj": ((1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ"), (1.0, "pJ")),
    "ops": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    "bits": ((1e6, "Mbit"), (1e3, "kbit"), (1.0, "bit")),
    "us": ((1e6, "s"), (1e3, "ms"), (1.0, "µs")),
    "ge": ((1.0, "GE"),),
}
_TITLES = {
    "accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "loss": "validation loss (nats)",
    "kl": "KL from the teacher (nats)",
    "weight_bytes": "weight memory",
    "memory_bytes": "weight memory with overhead",
    "overhead_bytes": "quantizer parameters",
    "bops": "bit operations",
    "macs": "multiply-accumulates",
    "energy_pj": "energy per inference",
    "compute_pj": "energy of multiply-accumulates",
    "stored_bits": "stored bits",
    "activation_bits": "activation bits moved",
    "mean_area_ge": "area of a unit, mean over MACs",
    "largest_area_ge": "area of the largest unit",
    "qops": "quantized operations (32-bit equivalents)",
    "ebops": "effective bit operations",
    "cycles": "cycles on the array",
    "latency_us": "measured latency",
    "average_bits_inner": "average weight bits, inner layers",
    "average_bits_weighted": "average weight bits, all weights",
    "average_bits_layers": "average weight bits, over layers",
}
_SHORT_TITLES = {
    "accuracy": "accuracy",
    "test_accuracy": "test",
    "loss": "loss",
    "kl": "KL",
    "weight_bytes": "weights",
    "memory_bytes": "memory",
    "energy_pj": "energy",
    "bops": "bit ops",
    "macs": "MACs",
    "average_bits_inner": "bits, inner",
    "average_bits_weighted": "bits",
    "average_bits_layers": "bits, layers",
}


_COUNTS = {"bops", "macs", "qops", "ebops", "cycles"}


class Unit(NamedTuple):
    """How to show one figure: divide by `factor`, write `symbol` behind."""

    factor: float
    symbol: str


def title_of(name: str) -> str:
    """Return what a figure's name means, the name itself where it is not one of ours."""
    return _TITLES.get(name, name.replace("_", " "))


def short_title_of(name: str) -> str:
    """Return a heading for a narrow column."""
    return _SHORT_TITLES.get(name, title_of(name))


def unit_of(name: str, largest: float) -> Unit:
    """Return the unit that shows values up to `largest` with few digits."""
    kind = "ops" if name in _COUNTS else name.rsplit("_", 1)[-1]
    for factor, symbol in _PREFIXED.get(kind, ()):
        if abs(largest) >= factor:
            return Unit(factor, symbol)
    return Unit(1.0, _PREFIXED[kind][-1][1] if kind in _PREFIXED else "")


def axis_title(name: str, unit: Unit) -> str:
    """Return the title of an axis, with its unit."""
    return f"{title_of(name)} ({unit.symbol})" if unit.symbol else title_of(name)


def amount(name: str, value: float | None) -> str:
    """Return a figure with its unit.

    Example:
        >>> amount("weight_bytes", 20480.0), amount("accuracy", 0.97222), amount("kl", None)
        ('20.0 KiB', '97.22%', '–')
    """
    if value is None:
        return "–"
    if name.endswith("accuracy"):
        return f"{100.0 * value:.2f}%"
    if name in {"loss", "kl"}:
        return f"{value:.4f}"
    unit = unit_of(name, value)
    return f"{_three_digits(value / unit.factor)} {unit.symbol}".strip()


def _three_digits(value: float) -> str:
    """Return at least three significant digits, never an exponent above 1."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
