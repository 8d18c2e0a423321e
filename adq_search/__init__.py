"""Hardware-aware search for mixed-precision quantized PyTorch networks.

Importing this package is light: hosts, plots and data sets are loaded by the modules that need
them.
"""

from adq_search.convert import (
    apply_policy_,
    measure_health,
    quantized_layers,
    reestimate_batch_norm_,
    restore_,
)
from adq_search.errors import AdqSearchError
from adq_search.hardware import CostReport, cost
from adq_search.norms import fused_norms
from adq_search.pareto import Objective, front_indices, hypervolume
from adq_search.policy import FLOAT, LayerPrecision, Policy, load_policy, save_policy
from adq_search.tracing import ModelSummary, trace

__all__ = [
    # policies
    "FLOAT",
    "LayerPrecision",
    "Policy",
    "load_policy",
    "save_policy",
    # putting a policy on a network
    "apply_policy_",
    "fused_norms",
    "measure_health",
    "quantized_layers",
    "reestimate_batch_norm_",
    "restore_",
    # what it costs
    "CostReport",
    "ModelSummary",
    "cost",
    "trace",
    # fronts
    "Objective",
    "front_indices",
    "hypervolume",
    # errors
    "AdqSearchError",
]
