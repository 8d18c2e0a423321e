"""Energy of one multiply-accumulate for each weight quantizer, and the work of input quantizers.

Notation (sections 1.5 and 2.2 of the project's hardware notes; energies before the table's scale):
    b_a, b_w     bits of an input code and of a weight code
    N            MACs for each output (fan-in)
    k_max        largest exponent of a weight level: base^-k_max
    S            largest shift: k_max for base 2 (POT), floor(k_max / 2) for base sqrt 2 (POST)
    st           stages of the barrel shifter: ceil(log2(S + 1))
    P            bits of a product's magnitude: b_a + S
    W            bits of an accumulator that never overflows

    uniform      W = b_a + b_w + ceil(log2 N)     e = multiply b_a b_w + accumulate W + constant
    POT, POST    W = b_a + S + 1 + ceil(log2 N)   e = shift P (st + 1) + accumulate W + constant
    codebook     the uniform MAC with b_w = 8-bit level words, times the look-up factor

POST adds even and odd exponents into two accumulators of W bits and multiplies the odd one by
1/sqrt(2) once for each output, which is exact; Eq. 18 of the paper [Zhou2025]_ is not.

.. [Zhou2025] Zhou et al.: ASQ and POST. arXiv 2504.17263.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from adq_search.errors import CostError, did_you_mean
from adq_search.hardware._table import Hardware, carry_bits
from adq_search.policy import OptionValue
from adq_search.quantizers import WEIGHT_QUANTIZERS
from adq_search.quantizers.asq import MIN_CHANNELS_FOR_HIDDEN
from adq_search.tracing import LayerInfo

#: Bytes of a step size, a threshold, a codebook level (16-bit words).
WORD_BYTES = 2
#: Bits of an ASQ adapter's parameters and values, as the paper's Table 1 counts them.
ADAPTER_BITS = 8


@dataclass(frozen=True, slots=True)
class Mac:
    """One multiply-accumulate of a layer, and what its weight quantizer brings along.

    Args:
        mac_pj: Energy of one MAC.
        output_pj: Energy for each output, beyond requantization.
        accumulator_bits: Bits of (each of) its accumulators.
        n_words: 16-bit words stored beside the codes: steps, thresholds, codebook levels.
        is_measured: Whether the figures lie inside the measured range.
    """

    mac_pj: float
    output_pj: float
    accumulator_bits: int
    n_words: int
    is_measured: bool


@dataclass(frozen=True, slots=True)
class InputWork:
    """What quantizing a layer's input takes, beyond the requantization of the layer before it."""

    energy_pj: float
    stored_bytes: int


WeightOptions = Mapping[str, OptionValue]
Datapath = Callable[[LayerInfo, int, int, WeightOptions, Hardware], Mac]
InputStage = Callable[[LayerInfo, int, int, Hardware], InputWork]
Function = TypeVar("Function")

_DATAPATHS: dict[str, Datapath] = {}
_INPUT_STAGES: dict[str, InputStage] = {}


def register_datapath(quantizer: str) -> Callable[[Datapath], Datapath]:
    """Register the MAC of a weight quantizer: `f(layer, b_w, b_a, options, hardware) -> Mac`.

    Raises:
        CostError: The quantizer has one already.
    """
    return _registrar(_DATAPATHS, quantizer, "datapath")


def register_input_stage(quantizer: str) -> Callable[[InputStage], InputStage]:
    """Register an input quantizer's work: `f(layer, b_a, accumulator_bits, hardware)`.

    Raises:
        CostError: The quantizer has one already.
    """
    return _registrar(_INPUT_STAGES, quantizer, "input stage")


def datapath_of(quantizer: str) -> Datapath:
    """Return the MAC of a weight quantizer.

    Raises:
        CostError: Nobody registered one.
    """
    return _found(_DATAPATHS, quantizer, "register_datapath")


def input_stage_of(quantizer: str) -> InputStage:
    """Return the work of an input quantizer.

    Raises:
        CostError: Nobody registered it.
    """
    return _found(_INPUT_STAGES, quantizer, "register_input_stage")


def _registrar(
    registry: dict[str, Function], quantizer: str, what: str
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        if quantizer in registry:
            msg = f"Quantizer '{quantizer}' has its {what} already. Register yours by another name."
            raise CostError(msg)
        registry[quantizer] = function
        return function

    return register


def _found(registry: dict[str, Function], quantizer: str, decorator: str) -> Function:
    if quantizer not in registry:
        msg = (
            f"Each quantizer needs a cost, but '{quantizer}' has none. Register one with "
            f"`{decorator}`. {did_you_mean(quantizer, registry)}"
        )
        raise CostError(msg)
    return registry[quantizer]


@register_datapath("lsq")
def _uniform(
    layer: LayerInfo, weight_bits: int, input_bits: int, options: WeightOptions, hardware: Hardware
) -> Mac:
    width = weight_bits + input_bits + carry_bits(layer.fan_in)
    return Mac(
        mac_pj=hardware.uniform_fj(input_bits, weight_bits, width) * hardware.pj_per_fj,
        output_pj=0.0,
        accumulator_bits=width,
        n_words=_n_steps("lsq", layer, options),
        is_measured=hardware.covers(
            "uniform", weight_bits=weight_bits, input_bits=input_bits, fan_in=layer.fan_in
        ),
    )


@register_datapath("adq")
def _codebook(
    layer: LayerInfo, weight_bits: int, input_bits: int, options: WeightOptions, hardware: Hardware
) -> Mac:
    op = hardware.operators
    level_bits = int(op.level_word)
    width = level_bits + input_bits + carry_bits(layer.fan_in)
    fj = hardware.uniform_fj(input_bits, level_bits, width) * op.look_up
    return Mac(
        mac_pj=fj * hardware.pj_per_fj,
        output_pj=0.0,
        accumulator_bits=width,
        n_words=WEIGHT_QUANTIZERS["adq"].n_levels(weight_bits, **options),
        is_measured=hardware.covers(
            "uniform", weight_bits=weight_bits, input_bits=input_bits, fan_in=layer.fan_in
        ),
    )


@register_datapath("pot")
def _pot(
    layer: LayerInfo, weight_bits: int, input_bits: int, options: WeightOptions, hardware: Hardware
) -> Mac:
    op = hardware.operators
    shift = _largest_exponent("pot", weight_bits, options)
    width = input_bits + shift + 1 + carry_bits(layer.fan_in)
    fj = (
        op.shift_pot * (input_bits + shift) * (carry_bits(shift + 1) + 1)
        + op.accumulate_pot * width
        + op.constant_pot
    )
    return Mac(
        mac_pj=fj * hardware.pj_per_fj,
        output_pj=0.0,
        accumulator_bits=width,
        n_words=_n_steps("pot", layer, options),
        is_measured=hardware.covers(
            "pot", weight_bits=weight_bits, input_bits=input_bits, fan_in=layer.fan_in
        ),
    )


@register_datapath("post")
def _post(
    layer: LayerInfo, weight_bits: int, input_bits: int, options: WeightOptions, hardware: Hardware
) -> Mac:
    op = hardware.operators
    shift = _largest_exponent("post", weight_bits, options) // 2
    width = input_bits + shift + 1 + carry_bits(layer.fan_in)
    fj = (
        op.shift_post * (input_bits + shift) * (carry_bits(shift + 1) + 1)
        + op.accumulate_post * width
        + op.constant_post
    )
    # Each adder of the constant multiplication is one row of the multiplier array, W bits wide.
    per_output_fj = op.multiply * op.post_constant_rows * width
    return Mac(
        mac_pj=fj * hardware.pj_per_fj,
        output_pj=per_output_fj * hardware.pj_per_fj,
        accumulator_bits=width,
        n_words=_n_steps("post", layer, options),
        is_measured=hardware.covers(
            "post", weight_bits=weight_bits, input_bits=input_bits, fan_in=layer.fan_in
        ),
    )


@register_input_stage("lsq")
def _plain_input(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    del layer, input_bits, accumulator_bits, hardware
    return InputWork(energy_pj=0.0, stored_bytes=WORD_BYTES)


@register_input_stage("n2uq")
def _thresholds(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    """Binary search among 2^b - 1 thresholds: b comparisons of an accumulator for each input.

    The layer's own accumulator width stands for that of the layer before it, which keeps the cost
    additive over layers.
    """
    comparisons = layer.n_input_reads * input_bits
    return InputWork(
        energy_pj=comparisons * accumulator_bits * hardware.operators.add * 1e-3,
        stored_bytes=(2**input_bits - 1) * WORD_BYTES + WORD_BYTES,  # thresholds, output scale
    )


@register_input_stage("asq")
def _adapter(
    layer: LayerInfo, input_bits: int, accumulator_bits: int, hardware: Hardware
) -> InputWork:
    """Channel means, then C -> C/4 -> 1 (C -> 1 below 8 channels), then beta times the step."""
    del input_bits, accumulator_bits
    n = layer.in_channels
    hidden = n // 4 if n >= MIN_CHANNELS_FOR_HIDDEN else 0
    shapes = ((n, hidden), (hidden, 1)) if hidden else ((n, 1),)
    fj = hardware.operators.multiply * ADAPTER_BITS**2
    for fan_in, n_outputs in shapes:
        width = 2 * ADAPTER_BITS + carry_bits(fan_in)
        fj += fan_in * n_outputs * hardware.uniform_fj(ADAPTER_BITS, ADAPTER_BITS, width)
    positions = layer.n_inputs // n
    sum_bits = ADAPTER_BITS + carry_bits(positions)
    pooling_pj = (layer.n_inputs * sum_bits * hardware.operators.add * 1e-3) * (positions > 1)
    n_calls = layer.n_input_reads / layer.n_inputs
    n_parameters = sum((fan_in + 1) * n_outputs for fan_in, n_outputs in shapes)
    return InputWork(
        energy_pj=(fj * hardware.pj_per_fj + pooling_pj) * n_calls,
        stored_bytes=n_parameters * ADAPTER_BITS // 8 + WORD_BYTES,
    )


def _n_steps(quantizer: str, layer: LayerInfo, options: WeightOptions) -> int:
    resolved = WEIGHT_QUANTIZERS[quantizer].resolve_options(options)
    return 1 if resolved["granularity"] == "tensor" else layer.out_channels


def _largest_exponent(quantizer: str, weight_bits: int, options: WeightOptions) -> int:
    """Return k_max: exponents run from 0, for both signs, and zero has a level of its own."""
    return (WEIGHT_QUANTIZERS[quantizer].n_levels(weight_bits, **options) - 1) // 2 - 1
