"""Policies and weights found by a search, taken up again."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from adq_search.convert import apply_policy_
from adq_search.policy import Policy
from adq_search.tasks import Task
from adq_search.teacher import load_weights_


def load_quantized(task: Task, policy: Policy, weights_file: Path) -> nn.Module:
    """Return the task's network under a policy with trained weights, in eval mode.

    Args:
        task: Makes the network.
        policy: Precision of every parametric layer.
        weights_file: What the trial of that policy saved.

    Raises:
        PolicyError: The policy does not fit the network.
        TaskError: The weights are missing, damaged, or of another policy.
    """
    network = apply_policy_(task.make_network(), policy)
    load_weights_(network, weights_file)
    return network.eval()
