"""What an input quantizer computes beyond the requantization of the layer before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adq_search.errors import CostError, did_you_mean
from adq_search.hardware._table import Hardware
from adq_search.tracing import LayerInfo

#: Bytes of a step size, a threshold, a scale: a 32-bit multiplier, or float32 in a package.
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class InputWork:
    """What quantizing a layer's input takes for one inference.

    Args:
        energy_pj: Energy of what is computed.
        stored_bytes: Bytes of its parameters.
        n_operations: Multiplications, multiply-accumulates, additions and comparisons.
        moved_bits: Bits of values that are read again before they become codes.
    """

    energy_pj: float
    stored_bytes: int
    n_operations: int = 0
    moved_bits: int = 0


InputStage = Callable[[LayerInfo, int, int, Hardware], InputWork]

_STAGES: dict[str, InputStage] = {}


def register_input_stage(quantizer: str) -> Callable[[InputStage], InputStage]:
    """Register an input quantizer's work: `f(layer, b_a, accumulator_bits, hardware)`.

    Raises:
        CostError: The quantizer has one already.
    """

    def register(stage: InputStage) -> InputStage:
        if quantizer in _STAGES:
            msg = (
                f"Quantizer '{quantizer}' has its input stage already. Register yours by another "
                "name."
            )
            raise CostError(msg)
        _STAGES[quantizer] = stage
        return stage

    return register


def input_stage_of(quantizer: str) -> InputStage:
    """Return the work of an input quantizer.

    Raises:
        CostError: Nobody registered it.
    """
    if quantizer not in _STAGES:
        msg = (
            f"Each quantizer needs a cost, but '{quantizer}' has none. Register one with "
            f"`register_input_stage`. {did_you_mean(quantizer, _STAGES)}"
        )
        raise CostError(msg)
    return _STAGES[quantizer]
