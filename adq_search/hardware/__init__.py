"""Cost models: what a policy costs on hardware, known before any training.

`cost` gives a whole policy, `layer_cost` one layer; a model is a YAML file in this folder, or the
user's own. `datapaths` holds the arithmetic units, `input_stages` the work of input quantizers.
"""

from adq_search.hardware._file import hardware_names, load_hardware, parse_hardware
from adq_search.hardware._latency import precision_key, signature_of
from adq_search.hardware._table import Array, Hardware
from adq_search.hardware.cost import DEFAULT_HARDWARE, cost, layer_cost
from adq_search.hardware.datapaths import (
    Datapath,
    Mac,
    MacJob,
    Widths,
    datapath_names,
    register_datapath,
)
from adq_search.hardware.figures import COST_NAMES, CostReport, LayerCost, TotalCost, total_of
from adq_search.hardware.input_stages import InputWork, register_input_stage
from adq_search.hardware.table import CostTable, cost_table

__all__ = [
    "COST_NAMES",
    "DEFAULT_HARDWARE",
    "Array",
    "CostReport",
    "CostTable",
    "Datapath",
    "Hardware",
    "InputWork",
    "LayerCost",
    "Mac",
    "MacJob",
    "TotalCost",
    "Widths",
    "cost",
    "cost_table",
    "datapath_names",
    "hardware_names",
    "layer_cost",
    "load_hardware",
    "parse_hardware",
    "precision_key",
    "register_datapath",
    "register_input_stage",
    "signature_of",
    "total_of",
]
