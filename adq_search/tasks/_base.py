"""What a task is: a network, three disjoint parts of a data set, and a recipe for its teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from adq_search.errors import TaskError


class Batch(NamedTuple):
    """Some samples of one part.

    Attributes:
        inputs: Shape (batch, *sample).
        targets: Class indices, shape (batch,).
        indices: Positions of the samples in their part, shape (batch,).
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor


@runtime_checkable
class Part(Protocol):
    """Train, validation or test part of a data set."""

    is_in_memory: bool

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield every sample once: in a fixed order, or shuffled by `seed`."""
        ...

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of the content."""
        ...


class TensorPart:
    """A part held in memory.

    Args:
        inputs: Shape (n, *sample).
        targets: Class indices, shape (n,).
        prepare: Maps a batch of stored inputs to what the network takes, for data kept as bytes.
    """

    is_in_memory = True

    def __init__(
        self, inputs: Tensor, targets: Tensor, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        if len(inputs) != len(targets) or len(inputs) == 0:
            msg = (
                f"A part needs as many targets as inputs, and at least one, but has {len(inputs)} "
                f"inputs and {len(targets)} targets."
            )
            raise TaskError(msg)
        self.inputs = inputs
        self.targets = targets.long()
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, batch_size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield every sample once.

        When shuffled, a last batch of a single sample joins its predecessor: batch norm cannot
        train on it.
        """
        order = _order(len(self), seed)
        for indices in _chunks(order, batch_size, merge_single=seed is not None):
            inputs = self.inputs[indices]
            if self._prepare is not None:
                inputs = self._prepare(inputs)
            yield Batch(inputs, self.targets[indices], indices)

    def fingerprint(self) -> str:
        """Hash every byte of inputs and targets."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


class DatasetPart:
    """A part read through any map-style `torch.utils.data.Dataset` of (input, class) pairs.

    Args:
        dataset: The data set; its transforms are its own.
        n_loaders: Processes that load batches.
    """

    is_in_memory = False

    def __init__(self, dataset: Dataset[Any], *, n_loaders: int = 0) -> None:
        self._dataset = dataset
        self._n_loaders = n_loaders

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # map-style: has a length

    def batches(self, batch_size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield every sample once; see `TensorPart.batches`."""
        order = _order(len(self), seed)
        chunks = _chunks(order, batch_size, merge_single=seed is not None)
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=self._n_loaders,
            generator=torch.Generator().manual_seed(seed or 0),
        )
        for chunk, (inputs, targets) in zip(chunks, loader, strict=True):
            yield Batch(inputs, targets.long(), chunk)

    def fingerprint(self) -> str:
        """Hash the length and the targets and inputs of 16 samples spread over the part."""
        digest = hashlib.sha256(str(len(self)).encode())
        state = torch.random.get_rng_state()
        try:
            for i in torch.linspace(0, len(self) - 1, steps=16).long().unique().tolist():
                torch.manual_seed(i)
                value, target = self._dataset[i]
                digest.update(str(int(target)).encode())
                digest.update(torch.as_tensor(value).contiguous().numpy().data)
        finally:
            torch.random.set_rng_state(state)
        return digest.hexdigest()[:16]


PartLike = Part | TensorDataset | Dataset[Any] | tuple[Tensor, Tensor]


def as_part(source: PartLike) -> Part:
    """Make a part of tensors `(inputs, targets)`, a `TensorDataset`, or any map-style data set.

    Raises:
        TaskError: The source is none of these.
    """
    if isinstance(source, TensorPart | DatasetPart):
        return source
    if isinstance(source, TensorDataset):
        inputs, targets = source.tensors
        return TensorPart(inputs, targets)
    if isinstance(source, tuple) and len(source) == 2:
        return TensorPart(*source)
    if isinstance(source, Dataset) and hasattr(source, "__len__"):
        return DatasetPart(source)
    if isinstance(source, Part):
        return source
    msg = (
        f"A part is (inputs, targets), a TensorDataset or a map-style Dataset, but this is a "
        f"{type(source).__name__}."
    )
    raise TaskError(msg)


@dataclass(frozen=True, slots=True)
class TeacherRecipe:
    """How the full-precision network is trained, or where its weights lie.

    Attributes:
        epochs: Passes over the training part; 0 takes the network as the factory made it.
        learning_rate: Start of a cosine decay to 0, SGD with momentum 0.9.
        weights_file: `.safetensors`, or a `.pth` state dict; replaces training.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    weights_file: Path | None = None


@dataclass(frozen=True)
class Task:
    """A network and its data: what a search is about.

    Args:
        name: Names the results.
        make_network: Makes the network afresh; called with torch's seed set.
        train: What trials learn from.
        validation: What the search sees.
        test: What the final front is measured on, once.
        n_classes: Number of classes.
        augment: Random change of a training batch, `(inputs, generator) -> inputs`; None for none.
        teacher: Recipe of the full-precision network.

    The parts may be given as anything `as_part` takes.
    """

    name: str
    make_network: Callable[[], nn.Module]
    train: Part
    validation: Part
    test: Part
    n_classes: int
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            object.__setattr__(self, part, as_part(getattr(self, part)))
        if self.n_classes < 2:
            msg = f"Task '{self.name}' needs at least 2 classes, but says {self.n_classes}."
            raise TaskError(msg)

    def example(self) -> Tensor:
        """Return one input as a batch, shape (1, *sample)."""
        return next(self.validation.batches(1)).inputs

    def calibration(self, size: int, *, seed: int) -> Tensor:
        """Return `size` training inputs without augmentation, shape (size, *sample)."""
        return next(self.train.batches(min(size, len(self.train)), seed=seed)).inputs

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of the three parts."""
        parts = (self.train, self.validation, self.test)
        return hashlib.sha256(" ".join(p.fingerprint() for p in parts).encode()).hexdigest()[:16]


def split_indices(n: int, sizes: tuple[int, ...], *, seed: int) -> list[Tensor]:
    """Return disjoint random index sets of the given sizes, drawn from 0..n-1."""
    if sum(sizes) > n:
        msg = f"Parts of {sizes} samples need {sum(sizes)}, but there are {n}."
        raise TaskError(msg)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return list(order[: sum(sizes)].split(sizes))


def split_tensors(
    inputs: Tensor, targets: Tensor, sizes: tuple[int, int, int], *, seed: int
) -> tuple[TensorPart, TensorPart, TensorPart]:
    """Return disjoint random train, validation and test parts of the given sizes."""
    train, validation, test = (
        TensorPart(inputs[at], targets[at]) for at in split_indices(len(inputs), sizes, seed=seed)
    )
    return train, validation, test


def _order(n: int, seed: int | None) -> Tensor:
    if seed is None:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _chunks(order: Tensor, size: int, *, merge_single: bool) -> list[Tensor]:
    chunks = list(order.split(size))
    if merge_single and len(chunks) > 1 and len(chunks[-1]) == 1:
        single = chunks.pop()
        chunks[-1] = torch.cat([chunks[-1], single])
    return chunks
