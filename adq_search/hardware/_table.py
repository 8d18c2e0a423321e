"""A hardware model's numbers, as its YAML file gives them (`_file` reads it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from adq_search.errors import CostError, did_you_mean

Range = tuple[int, int]
#: A unit by name, with its settings: `("post_broadcast", (("fraction_bits", 2),))`.
UnitChoice = tuple[str, tuple[tuple[str, int], ...]]

#: Every operator of a table and the unit that the formulas expect it in.
UNITS = {
    "multiply": "fJ/bit^2",
    "multiply_area": "GE/bit^2",
    "post_constant_rows": "rows",
    "rom_energy": "fJ/bit",
    "rom_area": "GE/bit",
    "table_energy": "fJ/bit",
    "table_area": "GE/bit",
    "literal_table_energy": "fJ/bit",
    "literal_table_area": "GE/bit",
    "bin_energy": "fJ/register",
    "requantize": "bit",
    "carrier": "bit",
    "rescale": "fJ/bit^2",
    "add": "fJ/bit",
    "memory_read": "pJ/bit",
    "weight_read": "pJ/bit",
    "float_multiply": "pJ",
    "float_add": "pJ",
    "float_area": "GE",
}


@dataclass(frozen=True)
class Operators:
    """The numbers of an operator table, in the units of `UNITS`."""

    multiply: float
    multiply_area: float
    post_constant_rows: float
    rom_energy: float
    rom_area: float
    table_energy: float
    table_area: float
    literal_table_energy: float
    literal_table_area: float
    bin_energy: float
    requantize: float
    carrier: float
    rescale: float
    add: float
    memory_read: float
    weight_read: float
    float_multiply: float
    float_add: float
    float_area: float


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of a unit: `product X + accumulator W + constant`."""

    product: float
    accumulator: float
    constant: float

    def at(self, array: float, accumulator_bits: float) -> float:
        """Return the figure for an array or shifter of size X and W accumulator bits."""
        return self.product * array + self.accumulator * accumulator_bits + self.constant


@dataclass(frozen=True, slots=True)
class Limits:
    """Smallest and largest bits and fan-in, both included."""

    weight_bits: Range
    input_bits: Range
    fan_in: Range


@dataclass(frozen=True, slots=True)
class Unit:
    """What is known of one arithmetic unit.

    Args:
        energy: In fJ, before the table's scale.
        area: In gate equivalents.
        measured: Where the two were fitted.
        usable: Where they may be used; beyond `measured`, the report names the layer.
    """

    energy: Line
    area: Line
    measured: Limits
    usable: Limits


@dataclass(frozen=True, slots=True)
class Array:
    """The processing array of the cycle model, output-stationary.

    Args:
        rows: Output positions computed at a time.
        columns: Output channels computed at a time.
        weight_bits_per_cycle: Bandwidth of the weights.
        activation_bits_per_cycle: Bandwidth of the activations.
        clock_mhz: Clock in MHz.
    """

    rows: int
    columns: int
    weight_bits_per_cycle: float
    activation_bits_per_cycle: float
    clock_mhz: float

    @property
    def n_units(self) -> int:
        """Multiply-accumulates that the array can do in a cycle."""
        return self.rows * self.columns


@dataclass(frozen=True, eq=False)
class Hardware:
    """A cost model: its operators, its units, the scale of its synthesis figures.

    Args:
        name: Its name.
        operators: The operator table.
        units: Constants of arithmetic units, by name.
        datapaths: Units that the weights of a quantizer may use, by quantizer.
        takes_unlisted: Whether quantizers that `datapaths` leaves out use the registered units.
        weight_bits: Weight bits that the machine has.
        input_bits: Input bits that the machine has.
        anchor_input_bits: Input bits of the MAC that fixes the scale.
        anchor_weight_bits: Its weight bits.
        anchor_fan_in: MACs that its accumulator holds without loss.
        anchor_pj: Its energy in pJ.
        array: The array of the cycle model; None where the file gives none.
        latencies: Measured microseconds by layer signature and precision; None without a table.
    """

    name: str
    operators: Operators
    units: tuple[tuple[str, Unit], ...]
    datapaths: tuple[tuple[str, tuple[UnitChoice, ...]], ...]
    takes_unlisted: bool
    weight_bits: tuple[int, ...]
    input_bits: tuple[int, ...]
    anchor_input_bits: int
    anchor_weight_bits: int
    anchor_fan_in: int
    anchor_pj: float
    array: Array | None
    latencies: Mapping[str, Mapping[str, float]] | None = None

    @cached_property
    def _unit_of(self) -> dict[str, Unit]:
        return dict(self.units)

    def unit(self, name: str) -> Unit:
        """Return the constants of a unit.

        Raises:
            CostError: The file has none.
        """
        if name not in self._unit_of:
            msg = (
                f"Hardware '{self.name}' has no constants for unit '{name}'. Give them under "
                f"`units`. {did_you_mean(name, self._unit_of)}"
            )
            raise CostError(msg)
        return self._unit_of[name]

    def uniform_fj(self, input_bits: float, weight_bits: float, accumulator_bits: float) -> float:
        """Return the unscaled energy of one integer multiply-accumulate, in fJ."""
        return self.unit("uniform").energy.at(input_bits * weight_bits, accumulator_bits)

    def rescale_fj(self, value_bits: float, multiplier_bits: float | None = None) -> float:
        """Return the unscaled energy of one rescaling (multiply, round, shift, clip), in fJ.

        Args:
            value_bits: Of what is rescaled.
            multiplier_bits: Of the multiplier; None for the file's `requantize`.
        """
        bits = self.operators.requantize if multiplier_bits is None else multiplier_bits
        return self.operators.rescale * value_bits * bits

    @cached_property
    def pj_per_fj(self) -> float:
        """Scaled pJ for one fJ of the synthesis, such that the anchor MAC costs `anchor_pj`."""
        a, w = self.anchor_input_bits, self.anchor_weight_bits
        return self.anchor_pj / self.uniform_fj(a, w, a + w + carry_bits(self.anchor_fan_in))

    @property
    def float_mac_pj(self) -> float:
        """Energy of one 32-bit floating-point multiply-accumulate, in pJ."""
        return self.operators.float_multiply + self.operators.float_add


def carry_bits(n_terms: int) -> int:
    """Bits that a sum of `n_terms` needs beyond those of one term: ceil(log2 n)."""
    return (n_terms - 1).bit_length() if n_terms > 0 else 0
