"""A hardware model's operator table, read from a YAML file in this folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adq_search.errors import CostError, did_you_mean

Range = tuple[int, int]

#: Every operator of a table and the unit that the formulas expect it in.
UNITS = {
    "multiply": "fJ/bit^2",
    "accumulate_uniform": "fJ/bit",
    "constant_uniform": "fJ",
    "shift_pot": "fJ/(bit*stage)",
    "accumulate_pot": "fJ/bit",
    "constant_pot": "fJ",
    "shift_post": "fJ/(bit*stage)",
    "accumulate_post": "fJ/bit",
    "constant_post": "fJ",
    "post_constant_rows": "rows",
    "look_up": "factor",
    "level_word": "bit",
    "requantize": "bit",
    "add": "fJ/bit",
    "memory_read": "pJ/bit",
    "float_multiply": "pJ",
    "float_add": "pJ",
}


@dataclass(frozen=True)
class Operators:
    """The numbers of an operator table, in the units of `UNITS`."""

    multiply: float
    accumulate_uniform: float
    constant_uniform: float
    shift_pot: float
    accumulate_pot: float
    constant_pot: float
    shift_post: float
    accumulate_post: float
    constant_post: float
    post_constant_rows: float
    look_up: float
    level_word: float
    requantize: float
    add: float
    memory_read: float
    float_multiply: float
    float_add: float


@dataclass(frozen=True, eq=False)
class Hardware:
    """A cost model: its operators, the scale of its synthesis figures, and their validity.

    Args:
        name: Name of the file, without its ending.
        operators: The operator table.
        anchor_input_bits: Input bits of the MAC that fixes the scale.
        anchor_weight_bits: Its weight bits.
        anchor_fan_in: MACs that its accumulator holds without loss.
        anchor_pj: Its energy in pJ.
        input_bits: Smallest and largest input bits measured.
        fan_in: Smallest and largest number of MACs for each output measured.
        weight_bits: Smallest and largest weight bits measured, by datapath.
    """

    name: str
    operators: Operators
    anchor_input_bits: int
    anchor_weight_bits: int
    anchor_fan_in: int
    anchor_pj: float
    input_bits: Range
    fan_in: Range
    weight_bits: tuple[tuple[str, Range], ...]

    def uniform_fj(self, input_bits: float, weight_bits: float, accumulator_bits: float) -> float:
        """Return the unscaled energy of one integer multiply-accumulate, in fJ."""
        op = self.operators
        return (
            op.multiply * input_bits * weight_bits
            + op.accumulate_uniform * accumulator_bits
            + op.constant_uniform
        )

    @cached_property
    def pj_per_fj(self) -> float:
        """Scaled pJ for one fJ of the synthesis, such that the anchor MAC costs `anchor_pj`."""
        a, w = self.anchor_input_bits, self.anchor_weight_bits
        return self.anchor_pj / self.uniform_fj(a, w, a + w + carry_bits(self.anchor_fan_in))

    @property
    def float_mac_pj(self) -> float:
        """Energy of one 32-bit floating-point multiply-accumulate, in pJ."""
        return self.operators.float_multiply + self.operators.float_add

    def covers(self, datapath: str, *, weight_bits: int, input_bits: int, fan_in: int) -> bool:
        """Whether a MAC lies inside what was measured for its datapath."""
        ranges = (dict(self.weight_bits)[datapath], self.input_bits, self.fan_in)
        values = (weight_bits, input_bits, fan_in)
        return all(low <= v <= high for v, (low, high) in zip(values, ranges, strict=True))


def carry_bits(n_terms: int) -> int:
    """Bits that a sum of `n_terms` needs beyond those of one term: ceil(log2 n)."""
    return (n_terms - 1).bit_length()


def hardware_names() -> tuple[str, ...]:
    """Return the names of the hardware models, sorted."""
    folder = resources.files(__package__)
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))


@cache
def load_hardware(name: str) -> Hardware:
    """Return a hardware model by name; its file is read once.

    Raises:
        CostError: There is no such model, or its table is damaged.
    """
    if name not in hardware_names():
        msg = f"There is no hardware model '{name}'. {did_you_mean(name, hardware_names())}"
        raise CostError(msg)
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse_hardware(name, text)


def parse_hardware(name: str, text: str) -> Hardware:
    """Build a hardware model from the text of its YAML file.

    Raises:
        CostError: The text is no such table, or an operator is missing, unknown, or in another
            unit than the formulas expect.
    """
    try:
        form = _HardwareFile.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        msg = f"Hardware table '{name}' must be YAML, but is not: {error}. Mend the file."
        raise CostError(msg) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        msg = f"Hardware table '{name}' is damaged: {place}: {first['msg']}. Mend the field."
        raise CostError(msg) from error
    for operator, unit in UNITS.items():
        row = form.operators.get(operator)
        if row is None or row.unit != unit:
            found = "is missing" if row is None else f"is in {row.unit}"
            msg = f"Hardware table '{name}' needs operator '{operator}' in {unit}, but it {found}."
            raise CostError(msg)
    unknown = sorted(set(form.operators) - set(UNITS))
    if unknown:
        msg = (
            f"Hardware table '{name}' has an operator '{unknown[0]}' that no formula uses. "
            f"{did_you_mean(unknown[0], UNITS)}"
        )
        raise CostError(msg)
    return Hardware(
        name=form.name,
        operators=Operators(**{key: row.value for key, row in form.operators.items()}),
        anchor_input_bits=form.anchor.input_bits,
        anchor_weight_bits=form.anchor.weight_bits,
        anchor_fan_in=form.anchor.fan_in,
        anchor_pj=form.anchor.value,
        input_bits=form.validity.input_bits,
        fan_in=form.validity.fan_in,
        weight_bits=(
            ("uniform", form.validity.weight_bits.uniform),
            ("pot", form.validity.weight_bits.pot),
            ("post", form.validity.weight_bits.post),
        ),
    )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _OperatorRow(_Strict):
    value: float
    unit: str
    source: str = Field(min_length=1)


class _Anchor(_Strict):
    input_bits: int = Field(ge=1)
    weight_bits: int = Field(ge=1)
    fan_in: int = Field(ge=1)
    value: float = Field(gt=0)
    unit: Literal["pJ"]
    source: str = Field(min_length=1)


class _WeightBits(_Strict):
    uniform: Range
    pot: Range
    post: Range


class _Validity(_Strict):
    input_bits: Range
    fan_in: Range
    weight_bits: _WeightBits


class _HardwareFile(_Strict):
    schema_: Literal["adq_search.hardware/1"] = Field(alias="schema")
    name: str
    description: str
    operators: dict[str, _OperatorRow]
    anchor: _Anchor
    validity: _Validity
