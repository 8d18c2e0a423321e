"""Contracts of arithmetic units and input stages.

Subclass `DatapathContract` in a test module and write down, slowly, what the unit may add up:

    class TestMine(DatapathContract):
        quantizer = "lsq"

        def make(self):
            return Mine()

        def products(self, job, value):
            yield from ([value * word for word in range(-8, 8)],)  # one accumulator

Numbers of an own hardware file come in by `hardware`. `InputStageContract` needs a name only.
"""

# ruff: noqa: D102 (a test's name is its sentence)

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from adq_search.errors import CostError
from adq_search.hardware import Hardware, load_hardware
from adq_search.hardware.datapaths import Datapath, Mac, MacJob
from adq_search.hardware.input_stages import InputWork, input_stage_of
from adq_search.policy import MAX_BITS, MIN_BITS, OptionValue
from adq_search.tracing import LayerInfo

_EVERY_BITS = range(MIN_BITS, MAX_BITS + 1)
_FAN_INS = (1, 2, 9, 27, 576, 4608, 100_000)
#: Energies of one operation lie in here; fJ taken for pJ, or the reverse, do not.
_PLAUSIBLE_PJ = (1e-3, 1e2)
#: A datapath of ours has fewer gates; more are another unit of measurement.
_PLAUSIBLE_GE = (10.0, 1e6)
_CONV = LayerInfo("conv", "conv2d", (16, 12, 3, 3), 1, (12, 8, 8), (16, 8, 8), 110592, 1728, 0)
_LAYERS = (
    _CONV,
    LayerInfo("depthwise", "conv2d", (12, 1, 3, 3), 12, (12, 8, 8), (12, 8, 8), 6912, 108, 0),
    LayerInfo("signal", "conv1d", (8, 4, 3), 1, (4, 30), (8, 28), 2688, 96, 0),
    LayerInfo("head", "linear", (10, 64), 1, (64,), (10,), 640, 640, 10),
)


class DatapathContract(ABC):
    """What holds for every datapath.

    Attributes:
        quantizer: A weight quantizer that the unit serves.
        options: Options of that quantizer.
        hardware: Name or file of the hardware that has the unit's constants.
        is_sign_apart: Whether a product is a magnitude, its sign kept beside it.
        has_output_work: Whether an output takes work beyond requantization.
    """

    quantizer: ClassVar[str]
    options: ClassVar[Mapping[str, OptionValue]] = {}
    hardware: ClassVar[str] = "post_asic_45nm"
    is_sign_apart: ClassVar[bool] = False
    has_output_work: ClassVar[bool] = False

    @abstractmethod
    def make(self) -> Datapath:
        """Return the unit under test."""

    @abstractmethod
    def products(self, job: MacJob, value: int) -> Iterable[Iterable[int]]:
        """Yield, for each accumulator, every integer that one MAC may add to it.

        Args:
            job: The layer.
            value: The input code, without a sign.
        """

    def stored_table_bits(self, job: MacJob) -> int:
        """Return the bits of tables that a layer needs; none unless overridden."""
        del job
        return 0

    def machine(self) -> Hardware:
        """Return the hardware."""
        return load_hardware(self.hardware)

    def job(self, weight_bits: int, input_bits: int, fan_in: int) -> MacJob:
        """Return a layer named `tried`, of 64 output channels."""
        return MacJob(
            "tried", self.quantizer, weight_bits, input_bits, fan_in, 64, dict(self.options)
        )

    def legal(self) -> Iterator[tuple[tuple[int, int, int], MacJob, Mac]]:
        """Yield bits and fan-in, layer and MAC wherever the unit says that it can compute it."""
        unit, machine = self.make(), self.machine()
        for place in itertools.product(_EVERY_BITS, _EVERY_BITS, _FAN_INS):
            job = self.job(*place)
            if unit.why_not(job, machine) is None:
                yield place, job, unit.mac(job, machine)

    def test_is_of_use(self) -> None:
        assert any(True for _ in self.legal())

    def test_widths_hold_the_worst_case_in_int64(self) -> None:
        for (_, input_bits, fan_in), job, mac in self.legal():
            largest = [list(sums) for sums in self.products(job, 2**input_bits - 1)]
            assert len(largest) <= mac.widths.n_accumulators
            n_bits, room = mac.widths.product, mac.widths.accumulator
            for terms in largest:
                low, high = min(0, *terms), max(0, *terms)
                if self.is_sign_apart:
                    assert max(-low, high) < 2**n_bits
                else:
                    assert -(2 ** (n_bits - 1)) <= low <= high < 2 ** (n_bits - 1)
                is_signed = low < 0
                limit = 2 ** (room - is_signed)
                for worst in (low, high):
                    assert -limit * is_signed <= _summed(worst, fan_in) < limit, mac.widths

    def test_more_bits_and_longer_sums_never_cost_less(self) -> None:
        found = {place: mac for place, _, mac in self.legal()}
        for (weight_bits, input_bits, fan_in), mac in found.items():
            longer = [n for n in _FAN_INS if n > fan_in]
            for larger in (
                (weight_bits + 1, input_bits, fan_in),
                (weight_bits, input_bits + 1, fan_in),
                *((weight_bits, input_bits, n) for n in longer[:1]),
            ):
                if larger not in found:
                    continue
                other = found[larger]
                for figure in ("mac_pj", "area_ge", "input_pj", "output_pj", "table_bits"):
                    assert getattr(other, figure) >= getattr(mac, figure), (figure, larger)
                assert other.widths.product >= mac.widths.product
                assert other.widths.accumulator >= mac.widths.accumulator
                assert other.widths.n_accumulators >= mac.widths.n_accumulators

    def test_energies_are_in_pj_and_areas_in_gates(self) -> None:
        for place, _, mac in self.legal():
            assert _PLAUSIBLE_PJ[0] < mac.mac_pj < _PLAUSIBLE_PJ[1], place
            assert _PLAUSIBLE_GE[0] < mac.area_ge < _PLAUSIBLE_GE[1], place
            assert mac.effective_bits >= 1
            for energy_pj in (mac.input_pj, mac.output_pj):
                assert energy_pj == 0 or _PLAUSIBLE_PJ[0] < energy_pj < 1e3 * _PLAUSIBLE_PJ[1]

    def test_energies_scale_with_the_anchor_and_areas_do_not(self) -> None:
        machine = self.machine()
        twice = replace(machine, anchor_pj=2 * machine.anchor_pj)
        for _, job, mac in self.legal():
            other = self.make().mac(job, twice)
            for figure in ("mac_pj", "input_pj", "output_pj"):
                assert getattr(other, figure) == pytest.approx(2 * getattr(mac, figure))
            assert (other.area_ge, other.table_bits) == (mac.area_ge, mac.table_bits)

    def test_storage_is_that_of_the_tables(self) -> None:
        for place, job, mac in self.legal():
            assert mac.table_bits == self.stored_table_bits(job), place
            assert 2**job.code_bits >= job.n_levels

    def test_work_of_an_output_is_charged(self) -> None:
        for place, _, mac in self.legal():
            assert (mac.output_pj > 0) == self.has_output_work, place

    def test_refuses_what_lies_outside_its_range(self) -> None:
        unit, machine = self.make(), self.machine()
        place, job, _ = next(iter(self.legal()))
        usable = machine.unit(unit.constants(job)).usable
        low, high = usable.fan_in
        outside = [(*place[:2], n) for n in (low - 1, high + 1) if n > 0]
        assert outside
        for bits in _EVERY_BITS:
            outside += [(bits, *place[1:])] if not _lies_in(bits, usable.weight_bits) else []
            outside += [(place[0], bits, place[2])] if not _lies_in(bits, usable.input_bits) else []
        for wrong in outside:
            tried = self.job(*wrong)
            if unit.constants(tried) != unit.constants(job):
                continue  # another row of constants holds there
            assert unit.why_not(tried, machine) is not None, wrong
            with pytest.raises(CostError, match=r"'tried' cannot run on datapath .*\. \w+ .*\.$"):
                unit.mac(tried, machine)

    def test_says_why_not_or_answers(self) -> None:
        """Never both, and never a figure beyond the range: nothing is extrapolated in silence."""
        unit, machine = self.make(), self.machine()
        for place in itertools.product(_EVERY_BITS, _EVERY_BITS, (1, 576)):
            job = self.job(*place)
            if unit.why_not(job, machine) is None:
                assert math.isfinite(unit.mac(job, machine).mac_pj)
            else:
                with pytest.raises(CostError, match=f"'tried' cannot run .*'{machine.name}'"):
                    unit.mac(job, machine)


class InputStageContract:
    """What holds for the work of every input quantizer.

    Attributes:
        quantizer: Name of the input quantizer.
        hardware: Name or file of the hardware.
    """

    quantizer: ClassVar[str]
    hardware: ClassVar[str] = "post_asic_45nm"

    def work(self, layer: LayerInfo, input_bits: int = 4, accumulator_bits: int = 24) -> InputWork:
        """Return the stage's work for a layer."""
        machine = load_hardware(self.hardware)
        return input_stage_of(self.quantizer)(layer, input_bits, accumulator_bits, machine)

    @pytest.mark.parametrize("layer", _LAYERS, ids=lambda layer: layer.name)
    def test_figures_have_their_units(self, layer: LayerInfo) -> None:
        for input_bits in _EVERY_BITS:
            work = self.work(layer, input_bits)
            assert isinstance(work.n_operations, int)
            assert work.stored_bytes > 0
            assert min(work.energy_pj, work.n_operations, work.moved_bits) >= 0
            assert (work.energy_pj > 0) == (work.n_operations > 0)
            if work.n_operations:
                one_pj = work.energy_pj / work.n_operations
                assert _PLAUSIBLE_PJ[0] < one_pj < _PLAUSIBLE_PJ[1]

    @pytest.mark.parametrize("layer", _LAYERS, ids=lambda layer: layer.name)
    def test_more_bits_never_cost_less(self, layer: LayerInfo) -> None:
        ladders = (
            [self.work(layer, input_bits=bits) for bits in _EVERY_BITS],
            [self.work(layer, accumulator_bits=bits) for bits in range(8, 33)],
        )
        for ladder in ladders:
            for less, more in itertools.pairwise(ladder):
                for figure in ("energy_pj", "stored_bytes", "n_operations", "moved_bits"):
                    assert getattr(more, figure) >= getattr(less, figure), figure

    def test_larger_inputs_never_cost_less(self) -> None:
        larger = replace(_CONV, input_shape=(12, 16, 16), output_shape=(16, 16, 16))
        less, more = self.work(_CONV), self.work(larger)
        assert more.energy_pj >= less.energy_pj
        assert more.n_operations >= less.n_operations
        assert more.moved_bits >= less.moved_bits
        assert more.stored_bytes == less.stored_bytes

    def test_a_layer_called_twice_works_twice_and_stores_once(self) -> None:
        twice = replace(_CONV, n_later_inputs=_CONV.n_inputs, macs=2 * _CONV.macs)
        once, both = self.work(_CONV), self.work(twice)
        assert both.moved_bits == 2 * once.moved_bits
        assert both.stored_bytes == once.stored_bytes
        assert once.energy_pj <= both.energy_pj <= 2 * once.energy_pj + 1e-9


def _summed(term: int, n_terms: int) -> int:
    """Return the sum of equal terms: by int64 additions, or as a product where that overflows."""
    if abs(term) * n_terms < 2**63:
        return int(np.full(n_terms, term, dtype=np.int64).sum())
    return term * n_terms


def _lies_in(value: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= value <= limits[1]
