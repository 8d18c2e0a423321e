"""What a datapath answers: widths, energy and area of one multiply-accumulate, and its validity.

Notation (hardware notes 1.2, 1.5, 2.2; energies in fJ before the table's scale, areas in gate
equivalents of a two-input NAND):
    b_a, b_w     bits of an input code and of a weight code
    N            multiply-accumulates for each output (fan-in)
    k_max        largest exponent of a weight level: base^-k_max
    S            largest shift: k_max for base 2 (POT), floor(k_max / 2) for base sqrt 2 (POST)
    f            fraction bits below the input's last bit
    P            bits of a product's magnitude
    W            bits of an accumulator that never overflows
    X            what the array or shifter grows with: b_a b_w, or P (stages + 1)

Energy and area of every unit have one form, `product X + accumulator W + constant`, whose three
numbers are fits to synthesis and stand in the hardware file; a unit adds what it has besides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from adq_search.errors import CostError
from adq_search.hardware._table import Hardware, Limits, carry_bits
from adq_search.policy import OptionValue
from adq_search.quantizers import WEIGHT_QUANTIZERS

WeightOptions = Mapping[str, OptionValue]


@dataclass(frozen=True, slots=True)
class MacJob:
    """One layer's multiply-accumulates, as a datapath sees them.

    Args:
        layer: Name of the layer, for error texts.
        quantizer: Name of its weight quantizer.
        weight_bits: b_w.
        input_bits: b_a.
        fan_in: N.
        n_sharing: Output channels that use one input: those of its group.
        options: Options of the weight quantizer.
        uses_per_input: Multiply-accumulates for each input read, windows that overlap included;
            None for `n_sharing`, as in a 1x1 convolution.
    """

    layer: str
    quantizer: str
    weight_bits: int
    input_bits: int
    fan_in: int
    n_sharing: int
    options: WeightOptions
    uses_per_input: float | None = None

    @property
    def n_words(self) -> int:
        """Words that a code can name: 2^bits of it."""
        return 1 << self.code_bits

    @property
    def n_levels(self) -> int:
        """Levels of a weight."""
        quantizer = WEIGHT_QUANTIZERS[self.quantizer]
        return quantizer.n_levels(self.weight_bits, **self.options)

    @property
    def resolved(self) -> dict[str, OptionValue]:
        """All options of the weight quantizer with their values."""
        return WEIGHT_QUANTIZERS[self.quantizer].resolve_options(self.options)

    @property
    def code_bits(self) -> int:
        """Bits of a stored weight code."""
        quantizer = WEIGHT_QUANTIZERS[self.quantizer]
        return quantizer.storage_bits(self.weight_bits, **self.options)

    @property
    def largest_exponent(self) -> int:
        """k_max: exponents run from 0, for both signs, and zero has a level of its own."""
        return (self.n_levels - 1) // 2 - 1

    @property
    def carry_bits(self) -> int:
        """Bits that a sum over the fan-in needs beyond those of one product."""
        return carry_bits(self.fan_in)


@dataclass(frozen=True, slots=True)
class Widths:
    """Lossless widths of a datapath, in bits.

    Args:
        product: Of a product, its sign left out where it is kept apart.
        accumulator: Of (each of) its accumulators.
        n_accumulators: How many there are.
    """

    product: int
    accumulator: int
    n_accumulators: int = 1


@dataclass(frozen=True, slots=True)
class Mac:
    """One multiply-accumulate of a layer on one datapath.

    Args:
        datapath: Name of the datapath.
        widths: Its product and accumulators.
        mac_pj: Energy of one MAC.
        area_ge: Area of the unit with its accumulators, in gate equivalents.
        input_pj: Energy for each input read, shared by the output channels.
        output_pj: Energy for each output, beyond requantization.
        table_bits: Bits of tables that the datapath needs, once a layer.
        effective_bits: Bits of a weight that a fully unrolled multiplication pays for (EBOPs).
        is_exact: Whether its sums equal those of the quantized network, up to one final rounding.
        is_measured: Whether bits and fan-in lie inside what the figures were fitted to.
    """

    datapath: str
    widths: Widths
    mac_pj: float
    area_ge: float
    input_pj: float
    output_pj: float
    table_bits: int
    effective_bits: int
    is_exact: bool
    is_measured: bool


class Datapath(ABC):
    """One arithmetic unit; a subclass answers what differs.

    A subclass with settings (fraction bits, level bits) takes them as keyword arguments; a hardware
    file gives them beside the unit's name.
    """

    name: ClassVar[str]
    #: Weight quantizers that use it on hardware whose file does not name a unit for them.
    serves: ClassVar[tuple[str, ...]] = ()

    def mac(self, job: MacJob, hardware: Hardware) -> Mac:
        """Return one MAC of a layer.

        Raises:
            CostError: The datapath cannot compute the layer, or has no figures for it.
        """
        reason = self.why_not(job, hardware)
        if reason:
            msg = f"'{job.layer}' cannot run on datapath '{self.name}' of '{hardware.name}': "
            raise CostError(msg + reason)
        unit = hardware.unit(self.constants(job))
        widths = self.widths(job)
        fj = unit.energy.at(self.array_size(job), widths.accumulator)
        ge = unit.area.at(self.area_size(job), widths.accumulator)
        scale = hardware.pj_per_fj
        return Mac(
            datapath=self.name,
            widths=widths,
            mac_pj=(fj + self.extra_fj(job, hardware)) * scale,
            area_ge=ge + self.extra_ge(job, hardware),
            input_pj=self.input_fj(job, hardware) * scale,
            output_pj=self.output_fj(job, hardware) * scale,
            table_bits=self.table_bits(job),
            effective_bits=self.effective_bits(job),
            is_exact=self.is_exact(job),
            is_measured=self._outside(unit.measured, job) is None,
        )

    def why_not(self, job: MacJob, hardware: Hardware) -> str | None:
        """Return why the layer cannot run here, with the remedy; None where it can."""
        reason = self.misfit(job)
        if reason:
            return reason
        try:
            unit = hardware.unit(self.constants(job))
        except CostError as error:
            return str(error)
        outside = self._outside(unit.usable, job)
        if outside is None:
            width = self.widths(job).accumulator
            fj = unit.energy.at(self.array_size(job), width)
            if min(fj, unit.area.at(self.area_size(job), width)) > 0.0:
                return None
            return (
                "its fitted energy or area is not positive there, so the fit does not hold. "
                "Narrow `usable` in the hardware file, or choose another unit."
            )
        what, value, (low, high) = outside
        return (
            f"its figures hold for {what} {low} to {high}, but the layer has {value}. Take that "
            "out of the search space, or choose hardware that has it."
        )

    def _outside(self, limits: Limits, job: MacJob) -> tuple[str, int, tuple[int, int]] | None:
        for what, value, (low, high) in (
            ("weight bits", job.weight_bits, limits.weight_bits),
            ("input bits", job.input_bits, limits.input_bits),
            ("fan-in", job.fan_in, limits.fan_in),
        ):
            if not low <= value <= high:
                return what, value, (low, high)
        return None

    def constants(self, job: MacJob) -> str:
        """Return the row of the hardware file's `units` that holds for the layer."""
        return self.name

    def misfit(self, job: MacJob) -> str | None:
        """Return why the unit's arithmetic cannot compute the layer at all; None where it can."""
        return None

    @abstractmethod
    def widths(self, job: MacJob) -> Widths:
        """Return the lossless widths."""

    @abstractmethod
    def array_size(self, job: MacJob) -> float:
        """Return X."""

    def area_size(self, job: MacJob) -> float:
        """Return X of the area, where it is another than that of the energy."""
        return self.array_size(job)

    def extra_fj(self, job: MacJob, hardware: Hardware) -> float:
        """Return the energy that a MAC takes beyond the fitted form: of its tables, of its bins."""
        return 0.0

    def extra_ge(self, job: MacJob, hardware: Hardware) -> float:
        """Return the area beyond the fitted form."""
        return 0.0

    def input_fj(self, job: MacJob, hardware: Hardware) -> float:
        """Return the energy of preparing one input."""
        return 0.0

    def output_fj(self, job: MacJob, hardware: Hardware) -> float:
        """Return the energy for one output, beyond requantization."""
        return 0.0

    def table_bits(self, job: MacJob) -> int:
        """Return the bits of tables, once a layer."""
        return 0

    def is_exact(self, job: MacJob) -> bool:
        """Return whether its sums are those of the quantized network, before one final rounding."""
        return True

    def effective_bits(self, job: MacJob) -> int:
        """Return the bits of a weight that an unrolled multiplication pays for: one power of two.

        A zero weight is free there, but which weights are zero is known only after training.
        """
        return 1


def dyadic_bits(job: MacJob) -> int | None:
    """Return t where training snapped sqrt(1/2) to m / 2^t, None where it did not."""
    snapped = str(job.resolved.get("sqrt_half", "exact"))
    return None if snapped == "exact" else int(snapped.split("/")[1]).bit_length() - 1


def constant_rows(job: MacJob, hardware: Hardware) -> float:
    """Return the adders of a multiplication by sqrt(1/2): two for 45/64, else the file's."""
    is_short = job.resolved.get("sqrt_half") == "45/64"
    return 2.0 if is_short else hardware.operators.post_constant_rows


def joining_fj(job: MacJob, hardware: Hardware, width: int, n_accumulators: int) -> float:
    """Return the energy of joining the accumulators of a root of two, once an output.

    As in `adq_search.integer`: with the exact root each accumulator beyond the first takes a
    multiplier of its own; where training snapped the root to m / 2^t, the accumulators join as
    integers by m's adders, and what is rescaled then has t bits more.
    """
    t = dyadic_bits(job)
    if t is None:
        return (n_accumulators - 1) * hardware.rescale_fj(width)
    adders = hardware.operators.multiply * constant_rows(job, hardware) * width
    return (n_accumulators - 1) * adders + hardware.rescale_fj(t)


def shifter_size(product_bits: int, largest_shift: int) -> int:
    """Return P (stages + 1) of a barrel shifter; stages = ceil(log2(S + 1))."""
    return product_bits * (carry_bits(largest_shift + 1) + 1)
