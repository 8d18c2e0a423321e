"""The digits of scikit-learn with a deeper network: 16 layers with weights, cheap to train."""

from dataclasses import replace
from functools import partial

from adq_search.tasks import Task
from adq_search.tasks.digits import digits
from adq_search.tasks.networks import ResidualNetwork


def deep_digits() -> Task:
    """Make the task: the parts of `digits`, two residual blocks a stage, images halved at once.

    Sixteen layers with weights, two of them 1x1 shortcuts.
    """
    network = partial(
        ResidualNetwork,
        n_classes=10,
        in_channels=1,
        channels=(8, 16, 32),
        blocks_per_stage=2,
        shortcut="B",
        stem_stride=2,
    )
    return replace(digits(), name="deep_digits", make_network=network)
