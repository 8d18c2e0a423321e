"""What a network costs under a policy, layer by layer: four things kept apart, and comparisons.

Cost is a pure function of the traced network and the policy, known before any training, and it
adds up over the layers.

Compute energy, area, stored weight bits and moved activation bits are told apart; `energy_pj` joins
compute and memory by the read energies of the hardware file, which is the named profile of that
scalar. Weights are counted by their codes alone, as HAWQ-V3 [Yao2021]_ does; what the quantizers
store beside them (steps, codebooks, tables, adapters) is `overhead_bytes`. Biases are in neither.
Energy counts each stored byte read once and each input element read once for an inference; inputs
that must wait for a factor of their sample are read once more (see `input_stages.asq`).

.. [Yao2021] Yao et al.: HAWQ-V3. ICML 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from adq_search.errors import CostError, PolicyError
from adq_search.hardware._array import array_cycles
from adq_search.hardware._file import load_hardware
from adq_search.hardware._latency import latency_us
from adq_search.hardware._table import Hardware
from adq_search.hardware.datapaths import MacJob, cheapest_mac
from adq_search.hardware.figures import (
    ADDITIVE,
    OPTIONAL,
    CostReport,
    LayerCost,
    TotalCost,
    derived,
)
from adq_search.hardware.input_stages import SCALE_BYTES, input_stage_of
from adq_search.policy import LayerPrecision, Options, OptionValue, Policy
from adq_search.quantizers import WEIGHT_QUANTIZERS, resolve_scheme
from adq_search.tracing import LayerInfo, ModelSummary

FLOAT_BITS = 32
DEFAULT_HARDWARE = "post_asic_45nm"


def cost(
    summary: ModelSummary, policy: Policy, hardware: Hardware | str = DEFAULT_HARDWARE
) -> CostReport:
    """Return what a network costs under a policy.

    Args:
        summary: The traced network.
        policy: A precision for each of its layers.
        hardware: A hardware model, its name, or the path of its YAML file.

    Raises:
        PolicyError: The policy names other layers than the network has, or an unknown scheme.
        CostError: The hardware model does not exist, or cannot run a layer.
        QuantizerError: An option of the policy does not exist.
    """
    model = load_hardware(hardware) if isinstance(hardware, str) else hardware
    difference = policy.difference(summary.all_names)
    if difference:
        msg = f"A policy must name the network's layers, but differs: {difference}. Mend the names."
        raise PolicyError(msg)
    precisions = dict(policy.layers)
    layers = tuple(layer_cost(i, precisions[i.name], policy.options, model) for i in summary.layers)
    names = [*ADDITIVE, "area_macs"]
    names += [name for name in OPTIONAL if getattr(layers[0], name) is not None]
    # Layer by layer, as `CostTable` adds them up: the two agree to the last bit.
    sums = dict.fromkeys(names, 0.0)
    for layer in layers:
        for name in names:
            sums[name] += getattr(layer, name)
    array = model.array
    figures: dict[str, Any] = dict.fromkeys(("cycles", "utilisation", "latency_us"))
    figures |= sums | derived(sums, array.n_units if array else None)
    for whole in ("macs", "activation_bits", "quantizer_ops"):
        figures[whole] = int(sums[whole])
    del figures["area_macs"]
    bits = [c.weight_bits for c in layers]
    n_weights = [i.n_weights for i in summary.layers]
    inner = slice(1, -1) if len(layers) > 2 else slice(None)
    total = TotalCost(
        **figures,
        average_bits_inner=_mean(bits[inner], n_weights[inner]),
        average_bits_weighted=_mean(bits, n_weights),
        average_bits_layers=_mean(bits, [1] * len(bits)),
        largest_area_ge=max(c.area_ge for c in layers),
    )
    return CostReport(model.name, layers, total, summary.coverage)


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
        hardware: A hardware model, its name, or the path of its YAML file.

    Raises:
        PolicyError: The scheme is unknown.
        CostError: The hardware model does not exist, or cannot run the layer; the text names the
            layer and the remedy.
        QuantizerError: An option does not exist.
    """
    model = load_hardware(hardware) if isinstance(hardware, str) else hardware
    if precision.weight_bits is None or precision.input_bits is None:
        return _float_cost(info, precision, model)
    _check_bits(info, precision, model)
    scheme = resolve_scheme(precision.scheme)
    weight_options = dict(dict(options).get(scheme.weight, ()))
    quantizer = WEIGHT_QUANTIZERS[scheme.weight]
    stored_bits = quantizer.storage_bits(precision.weight_bits, **weight_options)
    input_bits = precision.input_bits
    job = MacJob(
        layer=info.name,
        quantizer=scheme.weight,
        weight_bits=precision.weight_bits,
        input_bits=input_bits,
        fan_in=info.fan_in,
        n_sharing=info.out_channels // info.groups,
        options=weight_options,
        uses_per_input=info.macs / info.n_input_reads,
    )
    mac = cheapest_mac(job, model)
    width = mac.widths.accumulator
    work = input_stage_of(scheme.input)(info, input_bits, width, model)
    weight_bytes = info.n_weights * stored_bits / 8
    n_scales = _n_scales(scheme.weight, info, weight_options)
    overhead_bytes = n_scales * SCALE_BYTES + work.stored_bytes + mac.table_bits / 8
    activation_bits = info.n_input_reads * input_bits + work.moved_bits
    rescale_pj = model.rescale_fj(width) * model.pj_per_fj
    return LayerCost(
        name=info.name,
        datapath=mac.datapath,
        weight_bits=stored_bits,
        input_bits=input_bits,
        product_bits=mac.widths.product,
        accumulator_bits=width,
        macs=info.macs,
        weight_bytes=weight_bytes,
        overhead_bytes=overhead_bytes,
        activation_bits=activation_bits,
        bops=info.macs * stored_bits * input_bits,
        qops=info.macs * max(stored_bits, input_bits) / FLOAT_BITS,
        ebops=info.macs * mac.effective_bits * input_bits,
        area_ge=mac.area_ge,
        compute_pj=info.macs * mac.mac_pj + info.n_input_reads * mac.input_pj,
        requantize_pj=info.n_output_writes * (rescale_pj + mac.output_pj),
        weight_memory_pj=(weight_bytes + overhead_bytes) * 8 * model.operators.weight_read,
        input_memory_pj=activation_bits * model.operators.memory_read,
        quantizer_pj=work.energy_pj,
        quantizer_ops=work.n_operations,
        **_timing(info, precision, 8 * (weight_bytes + overhead_bytes), activation_bits, model),
        is_exact=mac.is_exact,
        is_extrapolated=not mac.is_measured,
    )


def _float_cost(info: LayerInfo, precision: LayerPrecision, hardware: Hardware) -> LayerCost:
    weight_bytes = info.n_weights * FLOAT_BITS / 8
    activation_bits = info.n_input_reads * FLOAT_BITS
    return LayerCost(
        name=info.name,
        datapath="float",
        weight_bits=FLOAT_BITS,
        input_bits=FLOAT_BITS,
        product_bits=FLOAT_BITS,
        accumulator_bits=FLOAT_BITS,
        macs=info.macs,
        weight_bytes=weight_bytes,
        overhead_bytes=0.0,
        activation_bits=activation_bits,
        bops=info.macs * FLOAT_BITS * FLOAT_BITS,
        qops=float(info.macs),
        ebops=info.macs * FLOAT_BITS * FLOAT_BITS,
        area_ge=hardware.operators.float_area,
        compute_pj=info.macs * hardware.float_mac_pj,
        requantize_pj=0.0,
        weight_memory_pj=weight_bytes * 8 * hardware.operators.weight_read,
        input_memory_pj=activation_bits * hardware.operators.memory_read,
        quantizer_pj=0.0,
        quantizer_ops=0,
        **_timing(info, precision, 8 * weight_bytes, activation_bits, hardware),
        is_exact=True,
        is_extrapolated=False,
    )


def _check_bits(info: LayerInfo, precision: LayerPrecision, hardware: Hardware) -> None:
    """Refuse bits that the machine does not have."""
    for key, bits, allowed in (
        ("weight_bits", precision.weight_bits, hardware.weight_bits),
        ("input_bits", precision.input_bits, hardware.input_bits),
    ):
        if bits not in allowed:
            msg = (
                f"`{info.name}` asks for {bits} bits (`{key}`), but hardware '{hardware.name}' has "
                f"{', '.join(map(str, allowed))}. Take {bits} out of the space's `{key}`, or "
                "choose hardware that has it."
            )
            raise CostError(msg)


def _n_scales(quantizer: str, info: LayerInfo, options: dict[str, OptionValue]) -> int:
    """Return the scales beside the codes: one for each output channel, or one for all."""
    kind = WEIGHT_QUANTIZERS[quantizer]
    is_shared = kind.resolve_options(options).get("granularity") == "tensor"
    return 1 if is_shared or kind.has_codebook else info.out_channels


def _timing(
    info: LayerInfo,
    precision: LayerPrecision,
    stored_bits: float,
    activation_bits: int,
    hardware: Hardware,
) -> dict[str, float | None]:
    array = hardware.array
    cycles = utilisation = microseconds = None
    if array is not None:
        cycles = array_cycles(info, stored_bits, activation_bits, array)
        utilisation = info.macs / (cycles * array.n_units)
        microseconds = cycles / array.clock_mhz
    if hardware.latencies is not None:
        once = latency_us(info, precision, hardware.latencies, hardware.name)
        microseconds = once * (info.n_input_reads / info.n_inputs)
    return {"cycles": cycles, "utilisation": utilisation, "latency_us": microseconds}


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
