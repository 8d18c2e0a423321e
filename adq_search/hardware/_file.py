"""Reading hardware files: the shipped ones by name, a user's own by path.

A user's file may take over a shipped model and change what differs:

    extends: post_asic_45nm
    name: my_chip
    description: our multipliers, 1 MB of weights on chip, latencies of the board
    bits: {weight: [4, 8], input: [8]}        # what the machine has at all
    datapaths:                                # units by weight quantizer; one alone is fixed
      lsq: [{unit: uniform}]
    unlisted_quantizers: refuse               # or: registered
    operators:
      weight_read: {value: 1.56, unit: pJ/bit, source: "our 1 MB SRAM"}
    units:
      uniform:
        energy:
          product: {value: 4.9, unit: fJ/bit^2, source: "our synthesis"}
    latency_table: {file: my_chip.csv, source: "measured on the board"}   # see `_latency`

Every number has a unit and a source; the shipped `post_asic_45nm.yaml` shows all fields.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from adq_search.errors import CostError, did_you_mean
from adq_search.hardware._form import HardwareForm
from adq_search.hardware._latency import read_latencies
from adq_search.hardware._table import UNITS, Hardware, Operators
from adq_search.hardware.datapaths import make_datapath
from adq_search.validation import validated

SUFFIXES = (".yaml", ".yml")


def hardware_names() -> tuple[str, ...]:
    """Return the names of the shipped hardware models, sorted."""
    folder = resources.files(__package__)
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_hardware(name: str) -> Hardware:
    """Return a hardware model by name, or by the path of a YAML file.

    Raises:
        CostError: There is no such model or file, or its table is damaged.
    """
    if name.endswith(SUFFIXES) or "/" in name:
        return _own(Path(name))
    if name not in hardware_names():
        msg = f"There is no hardware model '{name}'. {did_you_mean(name, hardware_names())}"
        raise CostError(msg + " Or give the path of a YAML file.")
    return _shipped(name)


@cache
def _shipped(name: str) -> Hardware:
    return parse_hardware(name, _shipped_text(name))


def _shipped_text(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _own(path: Path) -> Hardware:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        msg = f"The hardware file {path} cannot be read: {error.strerror}. Check the path."
        raise CostError(msg) from error
    return parse_hardware(path.stem, text, folder=path.parent)


def parse_hardware(name: str, text: str, *, folder: Path | None = None) -> Hardware:
    """Build a hardware model from the text of its YAML file.

    Args:
        name: What to call it in error texts.
        text: YAML.
        folder: Where a latency table's relative path begins.

    Raises:
        CostError: The text is no such table: a number is missing, negative, unknown, or in another
            unit than the formulas expect.
    """
    content = _merged(name, _parsed(name, text))
    _check_operators(name, content)
    what = f"hardware table '{name}'"
    form = validated(HardwareForm, content, CostError, what=what)
    _check_datapaths(form)
    table = form.latency_table
    latencies = None
    if table is not None:
        clock_mhz = form.array.clock_mhz.value if form.array else None
        latencies = read_latencies((folder or Path()) / table.file, clock_mhz)
    return Hardware(
        name=form.name,
        operators=Operators(**{key: row.value for key, row in form.operators.items()}),
        units=tuple((key, unit.unit()) for key, unit in sorted(form.units.items())),
        datapaths=tuple(
            (quantizer, tuple(choice.choice() for choice in choices))
            for quantizer, choices in sorted(form.datapaths.items())
        ),
        takes_unlisted=form.unlisted_quantizers == "registered",
        weight_bits=form.bits.weight,
        input_bits=form.bits.input,
        anchor_input_bits=form.anchor.input_bits,
        anchor_weight_bits=form.anchor.weight_bits,
        anchor_fan_in=form.anchor.fan_in,
        anchor_pj=form.anchor.value,
        array=form.array.array() if form.array else None,
        latencies=latencies,
    )


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        msg = f"Hardware table '{name}' must be YAML, but is not: {error}. Mend the file."
        raise CostError(msg) from error
    if not isinstance(content, dict):
        msg = f"Hardware table '{name}' must be a mapping of fields, but is none. Mend the file."
        raise CostError(msg)
    return content


def _merged(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the file takes over from the shipped model that it extends."""
    base = content.pop("extends", None)
    if base is None:
        return content
    if base not in hardware_names():
        msg = f"Hardware table '{name}' extends '{base}', which does not exist. "
        raise CostError(msg + did_you_mean(str(base), hardware_names()))
    below = _merged(base, _parsed(base, _shipped_text(base)))
    replaced = {"datapaths", "latency_table", "bits"}
    for key, value in content.items():
        is_deep = (
            key not in replaced and isinstance(value, dict) and isinstance(below.get(key), dict)
        )
        below[key] = _over(below[key], value) if is_deep else value
    return below


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another; a row with a value replaces the whole row."""
    out = dict(below)
    for key, value in above.items():
        is_deep = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _over(out[key], value) if is_deep and "value" not in value else value
    return out


def _check_operators(name: str, content: dict[str, Any]) -> None:
    given = content.get("operators")
    if not isinstance(given, dict):
        msg = f"Hardware table '{name}' needs a mapping `operators`, but has none. Add it."
        raise CostError(msg)
    for operator, unit in UNITS.items():
        row = given.get(operator)
        found = row.get("unit") if isinstance(row, dict) else None
        if found != unit:
            told = "is missing" if row is None else f"is in {found or 'no unit'}"
            msg = f"Hardware table '{name}' needs operator '{operator}' in {unit}, but it {told}."
            raise CostError(msg + " Mend the row.")
    unknown = sorted(set(given) - set(UNITS))
    if unknown:
        msg = (
            f"Hardware table '{name}' has an operator '{unknown[0]}' that no formula uses. "
            f"{did_you_mean(unknown[0], UNITS)}"
        )
        raise CostError(msg)


def _check_datapaths(form: HardwareForm) -> None:
    for quantizer, choices in form.datapaths.items():
        for choice in choices:
            name, settings = choice.choice()
            try:
                make_datapath(name, dict(settings))
            except CostError as error:
                msg = f"Hardware table '{form.name}', `datapaths.{quantizer}`: {error}"
                raise CostError(msg) from error
