"""Quantized layers: a float layer of torch that also has a weight and an input quantizer.

A float layer becomes a quantized one by a change of its class (`to_quantized_`), so its parameters
stay the same objects under the same names: optimizers, hooks and state dicts of the float network
go on working, and the way back (`to_float_`) is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from adq_search.quantizers import InputQuantizer, WeightQuantizer, made_again


class QuantLayer(nn.Module):
    """What quantized layers have in common.

    Attributes:
        weight_quantizer: Quantizes the weights at every call.
        input_quantizer: Quantizes the input at every call.
    """

    is_quantized: ClassVar[bool] = True

    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer

    def _quantized(self, weight: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
        is_done = getattr(input, "quantized_by", None) is self.input_quantizer
        return self.weight_quantizer(weight), input if is_done else self.input_quantizer(input)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """A `Conv1d` on quantized weights and inputs; padding is applied after quantization."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution. # shape: (N, out, length)."""
        weight, values = self._quantized(self.weight, input)
        with made_again(values):
            out: Tensor = self._conv_forward(values, weight, self.bias)
        return out


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A `Conv2d` on quantized weights and inputs; padding is applied after quantization."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution. # shape: (N, out, height, width)."""
        weight, values = self._quantized(self.weight, input)
        with made_again(values):
            out: Tensor = self._conv_forward(values, weight, self.bias)
        return out


class QuantLinear(QuantLayer, nn.Linear):
    """A `Linear` on quantized weights and inputs.

    Attributes:
        visible_call: A hook that does nothing. Without one, torch's transformer layers take the
            weights out of their `Linear`s in evaluation and pass the quantizers by.
    """

    visible_call: RemovableHandle

    def forward(self, input: Tensor) -> Tensor:
        """Return the product. # shape: (N, ..., out)."""
        weight, values = self._quantized(self.weight, input)
        with made_again(values):
            return F.linear(values, weight, self.bias)


QUANTIZED_CLASSES: Mapping[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
}
FLOAT_CLASSES: Mapping[type[QuantLayer], type[nn.Module]] = {
    quantized: floating for floating, quantized in QUANTIZED_CLASSES.items()
}


def to_quantized_(
    layer: nn.Module, weight_quantizer: WeightQuantizer, input_quantizer: InputQuantizer
) -> None:
    """Turn a float layer into a quantized one, in place.

    Args:
        layer: Exactly a `Conv1d`, `Conv2d` or `Linear`.
        weight_quantizer: Quantizer of its weights.
        input_quantizer: Quantizer of its input.
    """
    layer.__class__ = QUANTIZED_CLASSES[type(layer)]
    layer.add_module("weight_quantizer", weight_quantizer.train(layer.training))
    layer.add_module("input_quantizer", input_quantizer.train(layer.training))
    if isinstance(layer, QuantLinear):
        layer.visible_call = layer.register_forward_pre_hook(_do_nothing)


def to_float_(layer: QuantLayer) -> None:
    """Turn a quantized layer back into the float one it was, in place."""
    if isinstance(layer, QuantLinear):
        layer.visible_call.remove()
        del layer.visible_call
    del layer.weight_quantizer, layer.input_quantizer
    layer.__class__ = FLOAT_CLASSES[type(layer)]  # type: ignore[assignment]


def mark_quantized(values: Tensor, quantizer: InputQuantizer | None) -> None:
    """Say that values are what `quantizer` returned, so that its layer takes them as they are."""
    values.quantized_by = quantizer  # type: ignore[attr-defined]


def _do_nothing(layer: nn.Module, args: tuple[Tensor, ...]) -> None: ...
