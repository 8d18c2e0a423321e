"""What costs are made of: the figures of a layer, of a network, and how one sums to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adq_search.tracing import Coverage

#: Figures that a search may minimise or limit: each is a sum over layers, lower is cheaper.
COST_NAMES = (
    "weight_bytes",
    "memory_bytes",
    "bops",
    "energy_pj",
    "average_bits_inner",
    "average_bits_weighted",
    "average_bits_layers",
    "compute_pj",
    "stored_bits",
    "activation_bits",
    "mean_area_ge",
    "qops",
    "ebops",
    "cycles",
    "latency_us",
)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs for one inference.

    Args:
        name: The layer.
        datapath: The unit its multiply-accumulates run on; `float` in floating point.
        weight_bits: Bits that a stored weight takes; 32 in floating point.
        input_bits: Bits of an input; 32 in floating point.
        product_bits: Bits of a product; 32 in floating point.
        accumulator_bits: Bits of (each of) its accumulators; 32 in floating point.
        macs: Multiply-accumulates.
        weight_bytes: Bytes of the weight codes.
        overhead_bytes: Bytes of steps, thresholds, codebooks, tables and adapters.
        activation_bits: Bits of the inputs read, and of values that wait for a factor of their
            sample and are read again; the layer before wrote as many.
        bops: Bit operations: MACs x weight bits x input bits.
        qops: The paper's quantized operations (Eqs. 15 and 16): MACs x b / 32, b the wider operand.
        ebops: Effective bit operations: bits that unrolled multipliers pay for, zero weights
            included (which are zero is known after training only).
        area_ge: Area of one unit that computes the layer, in gate equivalents.
        compute_pj: Energy of the multiply-accumulates.
        requantize_pj: Energy of rescaling each output.
        weight_memory_pj: Energy of reading all stored bytes once.
        input_memory_pj: Energy of reading each input once.
        quantizer_pj: Energy of what the input quantizer computes besides.
        quantizer_ops: What it computes: multiply-accumulates, additions, comparisons.
        cycles: Of the hardware's array; None without one.
        utilisation: Share of the array's units that multiply, 0 to 1; None without one.
        latency_us: Microseconds by the hardware's latency table, else by cycles and clock; None
            without either.
        is_exact: Whether the datapath's sums are those of the quantized network.
        is_extrapolated: Whether bits or fan-in lie outside what the hardware model was fitted to.
    """

    name: str
    datapath: str
    weight_bits: int
    input_bits: int
    product_bits: int
    accumulator_bits: int
    macs: int
    weight_bytes: float
    overhead_bytes: float
    activation_bits: int
    bops: float
    qops: float
    ebops: float
    area_ge: float
    compute_pj: float
    requantize_pj: float
    weight_memory_pj: float
    input_memory_pj: float
    quantizer_pj: float
    quantizer_ops: int
    cycles: float | None
    utilisation: float | None
    latency_us: float | None
    is_exact: bool
    is_extrapolated: bool

    @property
    def memory_bytes(self) -> float:
        """Bytes of the weight codes and what is stored beside them."""
        return self.weight_bytes + self.overhead_bytes

    @property
    def stored_bits(self) -> float:
        """The same in bits."""
        return 8.0 * self.memory_bytes

    @property
    def energy_pj(self) -> float:
        """Energy of the layer, all parts."""
        return (
            self.compute_pj
            + self.requantize_pj
            + self.weight_memory_pj
            + self.input_memory_pj
            + self.quantizer_pj
        )

    @property
    def area_macs(self) -> float:
        """Area times MACs, whose sum over the MACs is the mean area."""
        return self.area_ge * self.macs


@dataclass(frozen=True, slots=True)
class TotalCost:
    """The sums over all layers, and what is averaged over them.

    Args:
        macs: Multiply-accumulates of one inference.
        weight_bytes: Bytes of the weight codes.
        overhead_bytes: Bytes of steps, thresholds, codebooks, tables and adapters.
        memory_bytes: Both.
        stored_bits: The same in bits.
        activation_bits: Bits of the inputs read, waiting values included.
        bops: Bit operations.
        qops: The paper's quantized operations.
        ebops: Effective bit operations.
        energy_pj: Energy of one inference, the sum of the five that follow.
        compute_pj: Of the multiply-accumulates.
        requantize_pj: Of rescaling outputs.
        weight_memory_pj: Of reading weights and what is stored beside them.
        input_memory_pj: Of reading inputs.
        quantizer_pj: Of what input quantizers compute.
        quantizer_ops: What input quantizers compute.
        average_bits_inner: Mean over the weights of all layers but the first and the last; over
            all weights where there are no others.
        average_bits_weighted: Mean over the weights of all layers.
        average_bits_layers: Mean over the layers.
        largest_area_ge: Area of the largest unit that any layer needs.
        mean_area_ge: Mean area of a unit, weighted by MACs.
        cycles: Of the hardware's array; None without one.
        utilisation: Share of the array's units that multiply, 0 to 1; None without one.
        latency_us: Microseconds; None where the hardware has neither array nor latency table.
    """

    macs: int
    weight_bytes: float
    overhead_bytes: float
    memory_bytes: float
    stored_bits: float
    activation_bits: int
    bops: float
    qops: float
    ebops: float
    energy_pj: float
    compute_pj: float
    requantize_pj: float
    weight_memory_pj: float
    input_memory_pj: float
    quantizer_pj: float
    quantizer_ops: int
    average_bits_inner: float
    average_bits_weighted: float
    average_bits_layers: float
    largest_area_ge: float
    mean_area_ge: float
    cycles: float | None
    utilisation: float | None
    latency_us: float | None


#: What adds up over layers, in the order it is shown.
ADDITIVE = (
    "macs",
    "weight_bytes",
    "overhead_bytes",
    "memory_bytes",
    "stored_bits",
    "activation_bits",
    "bops",
    "qops",
    "ebops",
    "energy_pj",
    "compute_pj",
    "requantize_pj",
    "weight_memory_pj",
    "input_memory_pj",
    "quantizer_pj",
    "quantizer_ops",
)
#: What adds up where the hardware has it.
OPTIONAL = ("cycles", "latency_us")
_OF_A_LAYER = (
    *("datapath", "weight_bits", "input_bits", "product_bits", "accumulator_bits"),
    *("area_ge", "cycles", "utilisation", "latency_us", "is_exact"),
)


@dataclass(frozen=True, slots=True)
class CostReport:
    """The cost of a policy, layer by layer and in total.

    Args:
        hardware: Name of the hardware model.
        layers: In execution order.
        total: Sums and averages.
        coverage: Which modules of the network the figures account for.
    """

    hardware: str
    layers: tuple[LayerCost, ...]
    total: TotalCost
    coverage: Coverage

    @property
    def extrapolated(self) -> tuple[str, ...]:
        """Layers whose bits or fan-in lie outside what the hardware model was fitted to."""
        return tuple(layer.name for layer in self.layers if layer.is_extrapolated)

    @property
    def inexact(self) -> tuple[str, ...]:
        """Layers on a datapath whose sums are not those of the quantized network."""
        return tuple(layer.name for layer in self.layers if not layer.is_exact)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON content; every layer has the additive figures of the total."""
        rows = [
            {"name": c.name}
            | {what: getattr(c, what) for what in _OF_A_LAYER if getattr(c, what) is not None}
            | {figure: getattr(c, figure) for figure in ADDITIVE}
            for c in self.layers
        ]
        coverage = {key: list(names) for key, names in asdict(self.coverage).items()}
        return {
            "hardware": self.hardware,
            "layers": rows,
            "total": total_of(self),
            "coverage": coverage,
            "extrapolated": list(self.extrapolated),
        }


def total_of(report: CostReport) -> dict[str, float]:
    """Return every total figure by name, but what the hardware does not have.

    `COST_NAMES` are among them.
    """
    return {name: value for name, value in asdict(report.total).items() if value is not None}


def derived(sums: Mapping[str, Any], n_units: int | None) -> dict[str, Any]:
    """Return the figures that follow from sums, for numbers and for arrays alike.

    Args:
        sums: Sums over layers by name, with `area_macs`.
        n_units: Units of the hardware's array; None without one.
    """
    out = {"mean_area_ge": sums["area_macs"] / sums["macs"]}
    if n_units is not None and "cycles" in sums:
        out["utilisation"] = sums["macs"] / (sums["cycles"] * n_units)
    return out
