"""The embedded default: scikit-learn's 1,797 handwritten digits of 8x8 pixels. No download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from adq_search.tasks._base import Task, TeacherRecipe, split_tensors
from adq_search.tasks.networks import small_resnet

_PARTS = (997, 400, 400)  # train, validation, test
_SPLIT_SEED = 0  # the parts do not depend on the search's seed


def digits() -> Task:
    """Make the task: 997 / 400 / 400 images, a small residual network."""
    data = load_digits()
    inputs = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    targets = torch.tensor(data.target)
    train, validation, test = split_tensors(inputs, targets, _PARTS, seed=_SPLIT_SEED)
    return Task(
        name="digits",
        make_network=small_resnet,
        train=train,
        validation=validation,
        test=test,
        n_classes=10,
        teacher=TeacherRecipe(epochs=20, batch_size=64, learning_rate=0.1),
    )
