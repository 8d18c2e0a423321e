"""Cost models: what a policy costs on hardware, known before any training.

`cost` gives a whole policy, `layer_cost` one layer; a model is a table in this folder.
"""

from adq_search.hardware._table import Hardware, hardware_names, load_hardware, parse_hardware
from adq_search.hardware.cost import (
    COST_NAMES,
    CostReport,
    LayerCost,
    TotalCost,
    cost,
    layer_cost,
    total_of,
)
from adq_search.hardware.datapaths import (
    InputWork,
    Mac,
    register_datapath,
    register_input_stage,
)

__all__ = [
    "COST_NAMES",
    "CostReport",
    "Hardware",
    "InputWork",
    "LayerCost",
    "Mac",
    "TotalCost",
    "cost",
    "hardware_names",
    "layer_cost",
    "load_hardware",
    "parse_hardware",
    "register_datapath",
    "register_input_stage",
    "total_of",
]
