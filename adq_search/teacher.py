"""The full-precision network: trained by its task's recipe, or read from a weights file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from adq_search.distill import DistillationSettings
from adq_search.errors import TaskError
from adq_search.tasks import Task
from adq_search.training import Monitor, TrainingSettings, fit


def make_teacher(task: Task, *, seed: int, monitor: Monitor | None = None) -> nn.Module:
    """Return the task's full-precision network, trained, in eval mode.

    Args:
        task: Its recipe says whether to train, to load weights, or to take the network as made.
        seed: Of the initial weights and the data order.
        monitor: Told of every epoch.

    Raises:
        TaskError: The weights file is missing, damaged, or belongs to another network; or the
            training diverged.
    """
    recipe = task.teacher
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = task.make_network()
        if recipe.weights_file is not None:
            load_weights_(network, recipe.weights_file)
        elif recipe.epochs > 0:
            settings = TrainingSettings(
                epochs=recipe.epochs,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                distillation=DistillationSettings(enabled=False),
            )
            outcome = fit(network, task, settings, monitor=monitor, seed=seed)
            if not outcome.is_finite:
                msg = (
                    f"The full-precision network of task '{task.name}' diverged in epoch "
                    f"{outcome.epochs} (loss {outcome.loss}). Lower its learning rate, now "
                    f"{recipe.learning_rate}, in the task's TeacherRecipe."
                )
                raise TaskError(msg)
    return network.eval()


def load_weights_(network: nn.Module, file: Path) -> None:
    """Load a state dict into `network`; nothing is unpickled but plain tensors.

    Raises:
        TaskError: The file is missing, damaged, or its entries are not the network's.
    """
    try:
        state = _read_state(file)
        network.load_state_dict(state)
    except FileNotFoundError as error:
        msg = f"There is no weights file at {file}. Check the path."
        raise TaskError(msg) from error
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        detail = " ".join(str(error).split())[:400]
        msg = (
            f"The weights file {file} does not fit the network or is damaged: "
            f"{detail if 'state_dict' in first_line else first_line} "
            "Give the file that was saved from this network."
        )
        raise TaskError(msg) from error


def _read_state(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        state: dict[str, Tensor] = load_file(file)
        return state
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a hostile file leads torch's restricted unpickler anywhere
        msg = "it is not whole, or holds more than tensors by name. Nothing in it was run."
        raise ValueError(msg) from error
    if not isinstance(loaded, Mapping):
        msg = f"it holds a {type(loaded).__name__}, not tensors by name."
        raise ValueError(msg)
    return dict(loaded)
