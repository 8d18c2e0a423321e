"""What an estimator answers: how curved the loss is in each layer's weights and inputs.

Notation:
    L_n: cross-entropy of example n, in nats, natural logarithm.
    w_j, x_nj: a layer's weights, and its input for example n.
    C^w_j, C^x_nj: second derivative of the mean loss in w_j, and of L_n in x_nj, as far as the
        estimator keeps it (a diagonal, or one average for all).
    e: quantization error Q(v) - v.

To second order, and at a minimum, quantizing one layer raises the mean loss by
    1/2 sum_j C^w_j (e^w_j)^2  +  1/2 mean_n sum_j C^x_nj (e^x_nj)^2.
Everything that differs between HAWQ-V2, FIT and the Fisher perturbation is how C is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.errors import SensitivityError
from adq_search.tracing import parametric_layers

OnProgress = Callable[[int, int], None]

#: Elements of layer inputs that are kept in memory, over all layers (0.25 GB in float32).
MAX_INPUT_ELEMENTS = 2**26


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """Curvature of the loss around one layer.

    Attributes:
        weight: C^w, a shape that broadcasts to the weight's.
        input: C^x, a shape that broadcasts to that of `values`.
        values: What the layer saw, shape (rows, *sample); a layer that is called twice for an
            example has two rows for it.
        weight_error: Standard error of `weight` where it was sampled, else 0.
        input_error: Standard error of `input` likewise.
    """

    weight: Tensor
    input: Tensor
    values: Tensor
    weight_error: float = 0.0
    input_error: float = 0.0


@dataclass(frozen=True, eq=False)
class Curvature:
    """What an estimator found out about a network.

    Attributes:
        estimator: Name of the estimator.
        layers: By layer name.
        n_kept: Examples whose layer inputs are kept: the n of the mean over inputs.
    """

    estimator: str
    layers: dict[str, LayerCurvature]
    n_kept: int


class SensitivityEstimator(Protocol):
    """Estimates curvatures. The network is in evaluation mode and is left as it was."""

    name: ClassVar[str]

    def curvature(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        seed: int,
        on_progress: OnProgress | None = None,
    ) -> Curvature:
        """Return the curvature of every parametric layer that the network calls.

        Args:
            model: A float network that maps `inputs` to logits of shape (n, classes).
            inputs: Shape (n, *sample).
            targets: Class indices, shape (n,).
            seed: Of everything drawn.
            on_progress: Called with steps done and steps in all.

        Raises:
            SensitivityError: The network's output is no logits, or a curvature is no finite
                number.
        """
        ...


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
