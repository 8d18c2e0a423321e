"""What a network costs under a policy: memory, bit operations and energy, layer by layer.

Cost is a pure function of the traced network and the policy, known before any training, and it
adds up over the layers.

Weights are counted by their codes alone, as HAWQ-V3 [Yao2021]_ does; what the quantizers store
beside them (steps, codebooks, adapters) is `overhead_bytes`. Biases are in neither. Energy counts
each stored byte read once and each input element read once for an inference, from on-chip memory.

.. [Yao2021] Yao et al.: HAWQ-V3. ICML 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from adq_search.errors import PolicyError
from adq_search.hardware._table import Hardware, load_hardware
from adq_search.hardware.datapaths import WORD_BYTES, datapath_of, input_stage_of
from adq_search.policy import LayerPrecision, Options, Policy
from adq_search.quantizers import WEIGHT_QUANTIZERS, resolve_scheme
from adq_search.tracing import Coverage, LayerInfo, ModelSummary

FLOAT_BITS = 32
DEFAULT_HARDWARE = "post_asic_45nm"

#: Figures that a search may minimise or limit; all are lower for a cheaper policy.
COST_NAMES = (
    "weight_bytes",
    "memory_bytes",
    "bops",
    "energy_pj",
    "average_bits_inner",
    "average_bits_weighted",
    "average_bits_layers",
)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs for one inference.

    Args:
        name: The layer.
        weight_bits: Bits that a stored weight takes; 32 in floating point.
        input_bits: Bits of an input; 32 in floating point.
        macs: Multiply-accumulates.
        weight_bytes: Bytes of the weight codes.
        overhead_bytes: Bytes of steps, thresholds, codebooks and adapters.
        bops: Bit operations: MACs x weight bits x input bits.
        compute_pj: Energy of the multiply-accumulates.
        requantize_pj: Energy of rescaling each output.
        weight_memory_pj: Energy of reading all stored bytes once.
        input_memory_pj: Energy of reading each input once.
        quantizer_pj: Energy of what the input quantizer computes besides.
        is_extrapolated: Whether bits or fan-in lie outside what the hardware model was fitted to.
    """

    name: str
    weight_bits: int
    input_bits: int
    macs: int
    weight_bytes: float
    overhead_bytes: float
    bops: float
    compute_pj: float
    requantize_pj: float
    weight_memory_pj: float
    input_memory_pj: float
    quantizer_pj: float
    is_extrapolated: bool

    @property
    def memory_bytes(self) -> float:
        """Bytes of the weight codes and what is stored beside them."""
        return self.weight_bytes + self.overhead_bytes

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


@dataclass(frozen=True, slots=True)
class TotalCost:
    """The sums over all layers, and three definitions of a network's average weight bits.

    Args:
        macs: Multiply-accumulates of one inference.
        weight_bytes: Bytes of the weight codes.
        overhead_bytes: Bytes of steps, thresholds, codebooks and adapters.
        memory_bytes: Both.
        bops: Bit operations.
        energy_pj: Energy of one inference, the sum of the five that follow.
        compute_pj: Of the multiply-accumulates.
        requantize_pj: Of rescaling outputs.
        weight_memory_pj: Of reading weights and what is stored beside them.
        input_memory_pj: Of reading inputs.
        quantizer_pj: Of what input quantizers compute.
        average_bits_inner: Mean over the weights of all layers but the first and the last; over
            all weights where there are no others.
        average_bits_weighted: Mean over the weights of all layers.
        average_bits_layers: Mean over the layers.
    """

    macs: int
    weight_bytes: float
    overhead_bytes: float
    memory_bytes: float
    bops: float
    energy_pj: float
    compute_pj: float
    requantize_pj: float
    weight_memory_pj: float
    input_memory_pj: float
    quantizer_pj: float
    average_bits_inner: float
    average_bits_weighted: float
    average_bits_layers: float


#: What adds up over layers, in the order it is shown.
_ADDITIVE = (
    "macs",
    "weight_bytes",
    "overhead_bytes",
    "memory_bytes",
    "bops",
    "energy_pj",
    "compute_pj",
    "requantize_pj",
    "weight_memory_pj",
    "input_memory_pj",
    "quantizer_pj",
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

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON content; every layer has the additive figures of the total."""
        rows = [
            {"name": c.name, "weight_bits": c.weight_bits, "input_bits": c.input_bits}
            | {figure: getattr(c, figure) for figure in _ADDITIVE}
            for c in self.layers
        ]
        coverage = {key: list(names) for key, names in asdict(self.coverage).items()}
        return {
            "hardware": self.hardware,
            "layers": rows,
            "total": asdict(self.total),
            "coverage": coverage,
            "extrapolated": list(self.extrapolated),
        }


def cost(
    summary: ModelSummary, policy: Policy, hardware: Hardware | str = DEFAULT_HARDWARE
) -> CostReport:
    """Return what a network costs under a policy.

    Args:
        summary: The traced network.
        policy: A precision for each of its layers.
        hardware: A hardware model or its name.

    Raises:
        PolicyError: The policy names other layers than the network has, or an unknown scheme.
        CostError: The hardware model does not exist, or has no figures for a quantizer.
        QuantizerError: An option of the policy does not exist.
    """
    model = load_hardware(hardware) if isinstance(hardware, str) else hardware
    difference = policy.difference(summary.all_names)
    if difference:
        msg = f"A policy must name the network's layers, but differs: {difference}. Mend the names."
        raise PolicyError(msg)
    precisions = dict(policy.layers)
    layers = tuple(layer_cost(i, precisions[i.name], policy.options, model) for i in summary.layers)
    sums = {figure: sum(getattr(c, figure) for c in layers) for figure in _ADDITIVE}
    bits = [c.weight_bits for c in layers]
    n_weights = [i.n_weights for i in summary.layers]
    inner = slice(1, -1) if len(layers) > 2 else slice(None)
    total = TotalCost(
        **sums,
        average_bits_inner=_mean(bits[inner], n_weights[inner]),
        average_bits_weighted=_mean(bits, n_weights),
        average_bits_layers=_mean(bits, [1] * len(bits)),
    )
    return CostReport(model.name, layers, total, summary.coverage)


def total_of(report: CostReport) -> dict[str, float]:
    """Return every total figure by name; `COST_NAMES` are among them."""
    return asdict(report.total)


@lru_cache(maxsize=65536)
def layer_cost(
    info: LayerInfo,
    precision: LayerPrecision,
    options: tuple[tuple[str, Options], ...] = (),
    hardware: Hardware | str = DEFAULT_HARDWARE,
) -> LayerCost:
    """Return what one layer costs; the same arguments are computed once.

    Args:
        info: The traced layer.
        precision: Its bits and scheme. The EMA momentum does not matter.
        options: Options by quantizer, as in `Policy.options`.
        hardware: A hardware model or its name.

    Raises:
        PolicyError: The scheme is unknown.
        CostError: The hardware model does not exist, or has no figures for a quantizer.
        QuantizerError: An option does not exist.
    """
    model = load_hardware(hardware) if isinstance(hardware, str) else hardware
    if precision.weight_bits is None or precision.input_bits is None:
        return _float_cost(info, model)
    scheme = resolve_scheme(precision.scheme)
    weight_options = dict(dict(options).get(scheme.weight, ()))
    stored_bits = WEIGHT_QUANTIZERS[scheme.weight].storage_bits(
        precision.weight_bits, **weight_options
    )
    input_bits = precision.input_bits
    mac = datapath_of(scheme.weight)(info, precision.weight_bits, input_bits, weight_options, model)
    work = input_stage_of(scheme.input)(info, input_bits, mac.accumulator_bits, model)
    weight_bytes = info.n_weights * stored_bits / 8
    overhead_bytes = mac.n_words * WORD_BYTES + work.stored_bytes
    rescale_bits = int(model.operators.requantize)
    rescale_fj = model.uniform_fj(
        mac.accumulator_bits, rescale_bits, mac.accumulator_bits + rescale_bits
    )
    per_bit_pj = model.operators.memory_read
    return LayerCost(
        name=info.name,
        weight_bits=stored_bits,
        input_bits=input_bits,
        macs=info.macs,
        weight_bytes=weight_bytes,
        overhead_bytes=overhead_bytes,
        bops=info.macs * stored_bits * input_bits,
        compute_pj=info.macs * mac.mac_pj,
        requantize_pj=info.n_output_writes * (rescale_fj * model.pj_per_fj + mac.output_pj),
        weight_memory_pj=(weight_bytes + overhead_bytes) * 8 * per_bit_pj,
        input_memory_pj=info.n_input_reads * input_bits * per_bit_pj,
        quantizer_pj=work.energy_pj,
        is_extrapolated=not mac.is_measured,
    )


def _float_cost(info: LayerInfo, hardware: Hardware) -> LayerCost:
    weight_bytes = info.n_weights * FLOAT_BITS / 8
    per_bit_pj = hardware.operators.memory_read
    return LayerCost(
        name=info.name,
        weight_bits=FLOAT_BITS,
        input_bits=FLOAT_BITS,
        macs=info.macs,
        weight_bytes=weight_bytes,
        overhead_bytes=0.0,
        bops=info.macs * FLOAT_BITS * FLOAT_BITS,
        compute_pj=info.macs * hardware.float_mac_pj,
        requantize_pj=0.0,
        weight_memory_pj=weight_bytes * 8 * per_bit_pj,
        input_memory_pj=info.n_input_reads * FLOAT_BITS * per_bit_pj,
        quantizer_pj=0.0,
        is_extrapolated=False,
    )


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
