"""ImageNet (ILSVRC 2012) from class folders on disk, with torchvision's networks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch.utils.data import Dataset, Subset
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from adq_search.errors import TaskError, did_you_mean
from adq_search.tasks._base import DatasetPart, Task, TeacherRecipe, split_indices

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_SPLIT_SEED = 0


def imagenet(
    network: str = "resnet18",
    root: str = "data/imagenet",
    n_validation: int = 50_000,
    n_loaders: int = 8,
    teacher_weights: str | None = None,
) -> Task:
    """Make the task: the search's validation part is cut from `train/`; `val/` is the test part.

    Args:
        network: Any classifier of `torchvision.models`.
        root: Folder with `train/<class>/*` and `val/<class>/*`.
        n_validation: Training images kept for validation.
        n_loaders: Processes that read images.
        teacher_weights: State dict of the pretrained network (`.safetensors`, or torchvision's
            `.pth`); None trains one from scratch (90 epochs).

    Raises:
        TaskError: Unknown network, or the folders are not there.
    """
    if network not in models.list_models(module=models):
        hint = did_you_mean(network, models.list_models(module=models))
        msg = f"torchvision has no classifier '{network}'. {hint}"
        raise TaskError(msg)
    folder = Path(root)
    for name in ("train", "val"):
        if not (folder / name).is_dir():
            msg = (
                f"ImageNet's '{name}' folder is not at {(folder / name).resolve()}. Give the "
                "folder that holds train/ and val/ as task option 'root'."
            )
            raise TaskError(msg)
    training_view = ImageFolder(str(folder / "train"), _training_transform())
    plain_view = ImageFolder(str(folder / "train"), _evaluation_transform())
    test = ImageFolder(str(folder / "val"), _evaluation_transform())
    n_train = len(training_view) - n_validation
    if n_train < 1:
        msg = (
            f"Keeping {n_validation} of {len(training_view)} training images for validation leaves "
            "none to train on. Lower task option 'n_validation'."
        )
        raise TaskError(msg)
    train_at, validation_at = split_indices(
        len(training_view), (n_train, n_validation), seed=_SPLIT_SEED
    )
    n_classes = len(training_view.classes)

    def part(view: Dataset[object]) -> DatasetPart:
        return DatasetPart(view, n_loaders=n_loaders)

    return Task(
        name=f"imagenet_{network}",
        make_network=partial(models.get_model, network, weights=None, num_classes=n_classes),
        train=part(Subset(training_view, train_at.tolist())),
        validation=part(Subset(plain_view, validation_at.tolist())),
        test=part(test),
        n_classes=n_classes,
        teacher=TeacherRecipe(
            epochs=90,
            batch_size=256,
            learning_rate=0.1,
            weight_decay=1e-4,
            weights_file=Path(teacher_weights) if teacher_weights else None,
        ),
    )


def _training_transform() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )


def _evaluation_transform() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
