"""CIFAR-10 from its files on disk, with ResNet-20 (the ablation network of both papers)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

from adq_search.errors import TaskError
from adq_search.tasks._base import Task, TeacherRecipe, TensorPart, split_indices
from adq_search.tasks.networks import resnet20

_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2470, 0.2435, 0.2616)
_SPLIT_SEED = 0


def cifar10_resnet20(
    root: str = "data/cifar10",
    n_validation: int = 5000,
    shortcut: str = "A",
    teacher_weights: str | None = None,
) -> Task:
    """Make the task: 45,000 training, 5,000 validation and the official 10,000 test images.

    Args:
        root: Folder that holds `cifar-10-batches-py` (the python version of the data set).
        n_validation: Training images kept for validation.
        shortcut: ResNet-20's shortcut, "A" (padding, as in the papers) or "B" (1x1 convolutions).
        teacher_weights: State dict of a trained network; None trains one (200 epochs).

    Raises:
        TaskError: The files are not there.
    """
    try:
        official_train = CIFAR10(root, train=True, download=False)
        official_test = CIFAR10(root, train=False, download=False)
    except RuntimeError as error:
        msg = (
            f"CIFAR-10 is not at {Path(root).resolve()}: {error} Unpack cifar-10-python.tar.gz "
            "there, or give its folder as task option 'root'."
        )
        raise TaskError(msg) from error
    inputs, targets = _as_tensors(official_train)
    n_train = len(inputs) - n_validation
    train, validation = split_indices(len(inputs), (n_train, n_validation), seed=_SPLIT_SEED)
    return Task(
        name="cifar10_resnet20",
        make_network=partial(resnet20, n_classes=10, shortcut=shortcut),
        train=TensorPart(inputs[train], targets[train], _normalised),
        validation=TensorPart(inputs[validation], targets[validation], _normalised),
        test=TensorPart(*_as_tensors(official_test), _normalised),
        n_classes=10,
        augment=crop_and_flip,
        teacher=TeacherRecipe(
            epochs=200,
            batch_size=128,
            learning_rate=0.1,
            weight_decay=5e-4,
            weights_file=Path(teacher_weights) if teacher_weights else None,
        ),
    )


def crop_and_flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels (zeros move in) and mirror every second one.

    Args:
        inputs: Shape (batch, channels, height, width).
        generator: Source of randomness.
    """
    n, _, height, width = inputs.shape
    padded = F.pad(inputs, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)  # shape: (n, height)
    across = torch.arange(width).expand(n, width)
    columns = left + torch.where(mirrored, across.flip(1), across)  # shape: (n, width)
    sample = torch.arange(n).view(n, 1, 1)
    return padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _as_tensors(data: CIFAR10) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def _normalised(images: Tensor) -> Tensor:
    mean = torch.tensor(_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(_STD).view(1, 3, 1, 1)
    return (images.float() / 255.0 - mean) / std
