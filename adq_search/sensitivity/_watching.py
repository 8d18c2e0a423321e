"""What the layers of a network see and say while it runs, as nodes of the autograd graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.errors import SensitivityError
from adq_search.tracing import parametric_layers

#: Elements of layer inputs that are kept in memory, over all layers (0.25 GB in float32).
MAX_INPUT_ELEMENTS = 2**26


@dataclass
class Calls:
    """Inputs and outputs of one layer, call by call, as nodes of the autograd graph."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Calls]]:
    """Record what every parametric layer sees and says, in evaluation mode.

    The recorded input is the layer's own: a derivative in it leaves out the other branches that
    read the same tensor, such as a residual shortcut. Mode, hooks and `requires_grad` are put
    back.
    """
    layers = parametric_layers(model)
    calls: dict[str, Calls] = {}
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    handles = []
    for name, layer in layers.items():

        def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> tuple[Any, ...]:
            value: Tensor = args[0]
            own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            calls.setdefault(name, Calls()).inputs.append(own)
            return (own, *args[1:])

        def after(_: nn.Module, __: Any, output: Tensor, name: str = name) -> Tensor:
            calls[name].outputs.append(output)
            return output.clone()  # an activation may overwrite it in place

        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad = False


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a parametric layer."""
    return cast("Tensor", layer.weight)


def checked_logits(output: Any, n: int, calls: Mapping[str, Calls]) -> Tensor:
    """Return the network's output where it is finite logits of shape (n, classes).

    Raises:
        SensitivityError: It is not; where NaN came up, the first layer that shows it is named.
    """
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != n:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        msg = (
            f"Sensitivities need logits of shape ({n}, classes), but the network returns {shape}. "
            "Give a classifier, or search without a prior (`prior: null`)."
        )
        raise SensitivityError(msg)
    if not torch.isfinite(output).all():
        for name, seen in calls.items():
            for what, tensors in (("inputs", seen.inputs), ("outputs", seen.outputs)):
                if not all(torch.isfinite(t).all() for t in tensors):
                    msg = f"The {what} of {name} are not all finite. Look for NaN in the data."
                    raise SensitivityError(msg)
        msg = "The network's logits are not all finite. Train it again, with a lower learning rate."
        raise SensitivityError(msg)
    return output


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy summed over examples, so that each row's gradient is its own."""
    return F.cross_entropy(logits, targets, reduction="sum")


def n_to_keep(elements_per_example: int, n: int) -> int:
    """Return for how many of n examples the layer inputs fit in memory, at least one."""
    return max(1, min(n, MAX_INPUT_ELEMENTS // max(elements_per_example, 1)))


def layer_inputs(model: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return what each layer sees, for as many examples as fit, and how many those are."""
    with watched(model) as calls:
        model(inputs[:1])
    keep = n_to_keep(sum(x.numel() for c in calls.values() for x in c.inputs), len(inputs))
    with watched(model) as calls:
        model(inputs[:keep])
    return {name: torch.cat([x.detach() for x in c.inputs]) for name, c in calls.items()}, keep
