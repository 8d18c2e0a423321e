"""Input stages: what quantizing a layer's input takes, one input quantizer a file."""

from adq_search.hardware.input_stages._base import (
    SCALE_BYTES,
    InputStage,
    InputWork,
    input_stage_of,
    register_input_stage,
)
from adq_search.hardware.input_stages.asq import ADAPTER_BITS, adapter_shapes
from adq_search.hardware.input_stages.lsq import plain_input
from adq_search.hardware.input_stages.n2uq import thresholds

__all__ = [
    "ADAPTER_BITS",
    "SCALE_BYTES",
    "InputStage",
    "InputWork",
    "adapter_shapes",
    "input_stage_of",
    "plain_input",
    "register_input_stage",
    "thresholds",
]
