"""Training that outlives its process: saved after an epoch, gone on with elsewhere bit for bit.

A checkpoint is one safetensors file. Its tensors are all that training changes: parameters and
buffers of the network (`network.`), momenta by parameter (`momentum.`), states of the random
generators (`random.`). Its header says, as JSON, whose they are and how far training is. Nothing
in it is ever unpickled. It is written beside its place and moved into it, so that it is whole or
absent; a file that is damaged all the same, or another training's, is left aside with a warning.
"""

from __future__ import annotations

import json
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from adq_search.errors import AdqSearchWarning, StorageError
from adq_search.files import write_atomic
from adq_search.validation import StrictModel, validated

_HEADER = "checkpoint"
_NETWORK = "network."
_MOMENTUM = "momentum."
_AUGMENTATION = "random.augmentation"
_GLOBAL = "random.global"
_RANDOM = {_AUGMENTATION, _GLOBAL}
#: What torch's SGD calls a momentum.
_BUFFER = "momentum_buffer"


class Origin(StrictModel):
    """Whose weights a training began from.

    Attributes:
        donor: Hash of the policy that they were trained under; None for the full-precision network.
        epochs_before: Epochs that they had been trained for.
    """

    donor: str | None = None
    epochs_before: Annotated[int, Field(ge=0)] = 0


class CheckpointHeader(StrictModel):
    """How far a training is, and whose it is.

    Attributes:
        version: Of the file's form.
        identity: What the training depends on, by part.
        origin: Where it began.
        losses: Mean training loss of each network after each finished epoch,
            # shape: (epochs, networks)
        steps: Optimizer steps taken.
        train_s: Seconds of training so far, in all processes.
        crc32: Of the tensors' names and bytes: it finds damage, not malice.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    version: Literal[1] = 1
    identity: dict[str, str]
    origin: Origin
    losses: Annotated[list[list[float]], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)]
    train_s: Annotated[float, Field(ge=0.0)]
    crc32: int


class TrainingCheckpoint:
    """Where a training run saves itself, and from where it goes on.

    Args:
        file: Need not exist.
        identity: What the training depends on, by part (policy, seed, recipe, data, ...). A file
            of another identity is not taken up.
        every_s: Seconds of training from one writing to the next, at least; 0 writes after every
            epoch. A training that is over sooner writes nothing.
        on_saved: Called with the number of finished epochs once the file is in its place.

    Attributes:
        origin: Where the training begins; where a file is taken up, where it did begin.
        resumed_epochs: Epochs that the file taken up had finished; 0 where training began anew.
        resumed_s: Seconds they had taken.
    """

    def __init__(
        self,
        file: Path,
        identity: Mapping[str, str],
        *,
        every_s: float = 0.0,
        on_saved: Callable[[int], None] | None = None,
    ) -> None:
        self.file = file
        self.origin = Origin()
        self.resumed_epochs = 0
        self.resumed_s = 0.0
        self._identity = dict(identity)
        self._every_s = every_s
        self._on_saved = on_saved
        self._losses: list[list[float]] = []
        self._began = self._saved = time.monotonic()

    def restore_(
        self, network: nn.Module, optimizer: Optimizer, generator: torch.Generator
    ) -> tuple[list[list[float]], int]:
        """Take up the file, where there is one of this training, in place.

        Warns (`AdqSearchWarning`) where the file cannot be taken up; nothing is changed then.

        Args:
            network: As training finds it, of any values.
            optimizer: SGD that has taken no step.
            generator: Of the augmentation.

        Returns:
            Losses of the finished epochs, as `CheckpointHeader.losses`, and the steps they took.
        """
        self._began = self._saved = time.monotonic()
        self._losses = []
        if not self.file.exists():
            return [], 0
        try:
            header, tensors = read_checkpoint(self.file)
            self._check(header, tensors, _expected(network, optimizer, generator))
        except (StorageError, FileNotFoundError) as error:
            msg = f"{error} The training begins anew."
            warnings.warn(msg, AdqSearchWarning, stacklevel=2)
            return [], 0
        load_training_state_(network, optimizer, generator, tensors)
        self.origin = header.origin
        self._losses = header.losses
        self.resumed_epochs = len(header.losses)
        self.resumed_s = header.train_s
        return list(header.losses), header.steps

    def after_epoch(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        generator: torch.Generator,
        *,
        losses: list[float],
        steps: int,
    ) -> None:
        """Save the training if it is time.

        Warns (`AdqSearchWarning`) where the file cannot be written; training goes on without.

        Args:
            network: As the epoch left it.
            optimizer: Likewise.
            generator: Likewise.
            losses: Mean training loss of each network in this epoch, # shape: (networks,)
            steps: Optimizer steps taken in all epochs.
        """
        self._losses.append(losses)
        now = time.monotonic()
        if now - self._saved < self._every_s:
            return
        tensors = training_state(network, optimizer, generator)
        header = CheckpointHeader(
            identity=self._identity,
            origin=self.origin,
            losses=self._losses,
            steps=steps,
            train_s=self.resumed_s + now - self._began,
            crc32=_checksum(tensors),
        )
        metadata = {_HEADER: header.model_dump_json()}
        try:
            write_atomic(self.file, lambda path: save_file(tensors, path, metadata=metadata))
        except (OSError, SafetensorError) as error:
            msg = (
                f"The checkpoint {self.file} cannot be written: {error}. Training goes on; should "
                "it be interrupted, it begins anew. Make room, or raise checkpoint_every_s."
            )
            warnings.warn(msg, AdqSearchWarning, stacklevel=2)
        else:
            if self._on_saved is not None:
                self._on_saved(len(self._losses))
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file, and what killed processes left half written beside it.

        The training is over and its result is kept.
        """
        for file in (self.file, *self.file.parent.glob(f".{self.file.name}.*")):
            file.unlink(missing_ok=True)

    def _check(
        self, header: CheckpointHeader, found: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> None:
        """Refuse a file that is not of this training, before anything of it is used."""
        identity = self._identity
        parts = identity.keys() | header.identity.keys()
        differing = sorted(p for p in parts if identity.get(p) != header.identity.get(p))
        if differing:
            part = differing[0]
            msg = (
                f"The checkpoint {self.file} is of another training: {', '.join(differing)} "
                f"({part} {header.identity.get(part)} there, {identity.get(part)} here)."
            )
            raise StorageError(msg)
        for name in sorted(own.keys() | found.keys()):
            there, here = found.get(name), own.get(name)
            if there is None and name.startswith(_MOMENTUM):
                continue  # of a parameter that no gradient has reached
            if there is None or here is None or _form(there) != _form(here):
                msg = (
                    f"The checkpoint {self.file} does not fit: '{name}' is {_form(there)} there, "
                    f"{_form(here)} here."
                )
                raise StorageError(msg)
        for name in _RANDOM & found.keys():
            try:
                torch.Generator().set_state(found[name])
            except RuntimeError as error:
                msg = f"The checkpoint {self.file} is damaged: '{name}': {error}."
                raise StorageError(msg) from error


def read_checkpoint(file: Path) -> tuple[CheckpointHeader, dict[str, Tensor]]:
    """Read a checkpoint and make sure that it is whole.

    Raises:
        StorageError: It is no checkpoint, or damaged.
    """
    what = f"the checkpoint {file}"
    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get(_HEADER)
            # A file of safetensors has keys, but cannot be iterated over.
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        if text is None:
            msg = (
                f"{what[0].upper()}{what[1:]} is none: its safetensors file has no header of ours."
            )
            raise StorageError(msg)
        header = validated(CheckpointHeader, json.loads(text), StorageError, what=what)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        msg = f"The checkpoint {file} is damaged: {error}."
        raise StorageError(msg) from error
    if _checksum(tensors) != header.crc32:
        msg = f"The checkpoint {file} is damaged: the checksum of its tensors is not the written."
        raise StorageError(msg)
    return header, tensors


def training_state(
    network: nn.Module, optimizer: Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return copies of all that training changes, by their names in the file."""
    momenta = {
        name: held
        for name, parameter in network.named_parameters()
        if (held := optimizer.state.get(parameter, {}).get(_BUFFER)) is not None
    }
    state = {_NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    state |= {_MOMENTUM + name: tensor for name, tensor in momenta.items()}
    state |= {_AUGMENTATION: generator.get_state(), _GLOBAL: torch.get_rng_state()}
    return {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}


def _expected(
    network: nn.Module, optimizer: Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return tensors of names, shapes and types that the state may have after training."""
    has_momenta = any(group.get("momentum", 0.0) > 0.0 for group in optimizer.param_groups)
    momenta = {_MOMENTUM + n: p for n, p in network.named_parameters() if has_momenta}
    return training_state(network, optimizer, generator) | momenta


@torch.no_grad()
def load_training_state_(
    network: nn.Module,
    optimizer: Optimizer,
    generator: torch.Generator,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put tensors of `training_state` in their places; their names and shapes fit."""
    for name, own in network.state_dict().items():
        own.copy_(tensors[_NETWORK + name])
    for name, parameter in network.named_parameters():
        held = tensors.get(_MOMENTUM + name)
        if held is not None:  # in the parameter's memory format, as SGD makes it
            optimizer.state[parameter][_BUFFER] = torch.empty_like(parameter).copy_(held)
    generator.set_state(tensors[_AUGMENTATION])
    torch.set_rng_state(tensors[_GLOBAL])


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, found)
    return found


def _form(tensor: Tensor | None) -> str:
    """Return shape and type for error texts and comparisons."""
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
