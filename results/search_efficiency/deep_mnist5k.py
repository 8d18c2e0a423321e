"""The images of `mnist5k` with a deeper network: 16 layers with weights, cheap to train."""

from dataclasses import replace
from functools import partial

from adq_search.tasks import Task
from adq_search.tasks.mnist5k import mnist5k
from adq_search.tasks.networks import ResidualNetwork


def deep_mnist5k() -> Task:
    """Make the task: the parts of `mnist5k`, two residual blocks a stage, a stem of stride 3.

    Sixteen layers with weights, two of them 1x1 shortcuts. The 3x3 stem sees each pixel once, and
    makes 10x10 of 28x28.
    """
    network = partial(
        ResidualNetwork,
        n_classes=10,
        in_channels=1,
        channels=(8, 16, 32),
        blocks_per_stage=2,
        shortcut="B",
        stem_stride=3,
    )
    return replace(mnist5k(), name="deep_mnist5k", make_network=network)
