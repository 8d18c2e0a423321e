"""The fields of a hardware file, and what may stand in them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, StringConstraints, model_validator

from adq_search.hardware._table import Array, Limits, Line, Unit, UnitChoice
from adq_search.policy import MAX_BITS, MIN_BITS
from adq_search.validation import StrictModel

Source = Annotated[str, StringConstraints(min_length=1)]
Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
PositiveNumber = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Amount(StrictModel):
    value: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    unit: str
    source: Source


class _Coefficient(StrictModel):
    value: Annotated[float, Field(allow_inf_nan=False)]
    unit: str
    source: Source


class _Anchor(StrictModel):
    input_bits: PositiveInt
    weight_bits: PositiveInt
    fan_in: PositiveInt
    value: PositiveNumber
    unit: Literal["pJ"]
    source: Source


def _in_order(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        msg = f"a range runs from its smaller end to its larger one, but this is {list(ends)}"
        raise ValueError(msg)
    return ends


_Ends = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_in_order)]


class _Limits(StrictModel):
    weight_bits: _Ends
    input_bits: _Ends
    fan_in: _Ends

    def limits(self) -> Limits:
        return Limits(self.weight_bits, self.input_bits, self.fan_in)


class _Line(StrictModel):
    """`constant` may be negative: a fit's intercept."""

    product: _Amount
    accumulator: _Amount
    constant: _Coefficient

    def line(self) -> Line:
        return Line(self.product.value, self.accumulator.value, self.constant.value)


class _Unit(StrictModel):
    energy: _Line
    area: _Line
    measured: _Limits
    usable: _Limits

    @model_validator(mode="after")
    def _check_units(self) -> _Unit:
        for figure, line in (("fJ", self.energy), ("GE", self.area)):
            for part, row in (
                ("product", line.product),
                ("accumulator", line.accumulator),
                ("constant", line.constant),
            ):
                if row.unit.split("/")[0] != figure:
                    msg = f"{part} must be in {figure}, but is in {row.unit}"
                    raise ValueError(msg)
        return self

    def unit(self) -> Unit:
        return Unit(
            self.energy.line(), self.area.line(), self.measured.limits(), self.usable.limits()
        )


class _Choice(StrictModel):
    unit: str
    fraction_bits: Annotated[int, Field(ge=0, le=8)] | None = None
    level_bits: Annotated[int, Field(ge=2, le=8)] | None = None

    def choice(self) -> UnitChoice:
        settings = self.model_dump(exclude={"unit"}, exclude_none=True)
        return self.unit, tuple(sorted(settings.items()))


class _Bits(StrictModel):
    weight: tuple[Bits, ...] = Field(min_length=1)
    input: tuple[Bits, ...] = Field(min_length=1)


class _Positive(StrictModel):
    value: PositiveNumber
    unit: str
    source: Source


class _Count(StrictModel):
    value: PositiveInt
    unit: Literal["units"]
    source: Source


class _Bandwidth(_Positive):
    unit: Literal["bit/cycle"]


class _Clock(_Positive):
    unit: Literal["MHz"]


class _Array(StrictModel):
    rows: _Count
    columns: _Count
    weight_bandwidth: _Bandwidth
    activation_bandwidth: _Bandwidth
    clock_mhz: _Clock

    def array(self) -> Array:
        return Array(
            self.rows.value,
            self.columns.value,
            self.weight_bandwidth.value,
            self.activation_bandwidth.value,
            self.clock_mhz.value,
        )


class _LatencyTable(StrictModel):
    file: str
    source: Source


class HardwareForm(StrictModel):
    """A hardware file as a whole."""

    schema_: Literal["adq_search.hardware/1"] = Field(alias="schema")
    name: str
    description: str
    operators: dict[str, _Amount]
    units: dict[str, _Unit]
    datapaths: dict[str, list[_Choice]]
    unlisted_quantizers: Literal["registered", "refuse"]
    bits: _Bits
    anchor: _Anchor
    array: _Array | None = None
    latency_table: _LatencyTable | None = None
