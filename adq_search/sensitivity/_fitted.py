"""The quantizers that a layer may get, fitted to its weights and to what it sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adq_search.errors import SensitivityError
from adq_search.quantizers import InputQuantizer, WeightQuantizer, make_quantizers, resolve_scheme
from adq_search.sensitivity._watching import weight_of
from adq_search.space import SearchSpace
from adq_search.tracing import parametric_layers

#: A quantizer's name and its bits.
Kind = tuple[str, int]


@dataclass(frozen=True, eq=False)
class FittedLayer:
    """One layer and every quantizer of the space for it.

    Attributes:
        layer: The float layer.
        weights: Weight quantizers, fitted and in evaluation mode.
        inputs: Input quantizers likewise.
    """

    layer: nn.Module
    weights: dict[Kind, WeightQuantizer] = field(default_factory=dict)
    inputs: dict[Kind, InputQuantizer] = field(default_factory=dict)

    def weight_error(self, quantizer: str, bits: int) -> Tensor:
        """Return Q(w) - w; shape of the weight."""
        weight = weight_of(self.layer).detach()
        error: Tensor = self.weights[quantizer, bits](weight) - weight
        return error

    def input_error(self, quantizer: str, bits: int, values: Tensor) -> Tensor:
        """Return Q(x) - x; shape of `values`."""
        error: Tensor = self.inputs[quantizer, bits](values) - values
        return error


def check_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a network with weights that are no numbers.

    Raises:
        SensitivityError: The weights of a layer are not finite; the text names it.
    """
    layers = parametric_layers(model)
    for name in names:
        if not torch.isfinite(weight_of(layers[name])).all():
            msg = f"The weights of {name} are not all finite numbers. Train the network again."
            raise SensitivityError(msg)


@torch.no_grad()
def fit_choices(
    model: nn.Module, space: SearchSpace, values: Mapping[str, Tensor], *, seed: int
) -> dict[str, FittedLayer]:
    """Fit the quantizers of every precision of the space, pinned ones too.

    Args:
        model: The float network.
        space: Which precisions.
        values: What each layer saw, # shape: (rows, *sample)
        seed: Of the adapters of ASQ, which start at random.

    Raises:
        SensitivityError: A layer's inputs are not finite, or it saw nothing.
    """
    layers = parametric_layers(model)
    found: dict[str, FittedLayer] = {}
    for name in space.names:
        if name not in values:
            msg = f"{name} saw no example. Leave it in floating point, or give examples it sees."
            raise SensitivityError(msg)
        if not torch.isfinite(values[name]).all():
            msg = f"The inputs of {name} are not all finite. Look for NaN in the data."
            raise SensitivityError(msg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for group in space.groups:
            for name in group.layers:
                found[name] = fitted = FittedLayer(layers[name])
                for precision in group.choices:
                    if precision.weight_bits is None or precision.input_bits is None:
                        continue
                    pair = resolve_scheme(precision.scheme)
                    of_weight = pair.weight, precision.weight_bits
                    of_input = pair.input, precision.input_bits
                    if of_weight in fitted.weights and of_input in fitted.inputs:
                        continue
                    made = make_quantizers(precision, layers[name], space.options_of)
                    if of_weight not in fitted.weights:
                        made[0].initialize_(weight_of(layers[name]).detach())
                        fitted.weights[of_weight] = made[0].eval()
                    if of_input not in fitted.inputs:
                        made[1].initialize_(values[name])
                        fitted.inputs[of_input] = made[1].eval()
    return found
