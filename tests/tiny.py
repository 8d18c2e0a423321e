"""A network and data of one's own, small enough that a trial takes a fraction of a second."""

import torch
from torch import nn

from adq_search.tasks import Task, TeacherRecipe


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def make(n=90, seed=0, epochs=4):
    """Three classes of 4x4 images: a bright row, column or corner, with noise."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    inputs = 0.3 * torch.randn(n, 1, 4, 4, generator=random)
    inputs[targets == 0, :, 1, :] += 1.0
    inputs[targets == 1, :, :, 2] += 1.0
    inputs[targets == 2, :, :2, :2] += 1.0
    third = n // 3
    parts = [(inputs[i : i + third], targets[i : i + third]) for i in range(0, n, third)]
    recipe = TeacherRecipe(epochs=epochs, batch_size=10, learning_rate=0.1)
    return Task("tiny", network, *parts, n_classes=3, teacher=recipe)
