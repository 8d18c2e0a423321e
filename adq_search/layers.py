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

from adq_search.convolution import convolve, pixels_read
from adq_search.first_layer import convolve_first, learns_step_alone
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
        known = _taken(input, self.input_quantizer)
        return self.weight_quantizer(weight), self.input_quantizer(
            input
        ) if known is None else known


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
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            weight, values = self._quantized(self.weight, input)
            with made_again(values):
                return self._conv_forward(values, weight, self.bias)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if self.kernel_size == (1, 1) and self.stride != (1, 1) and self.padding == (0, 0):
            geometry = ((1, 1), *geometry[1:])
            weight, values = self._quantized_pixels(input)
        elif learns_step_alone(self.input_quantizer, input):
            weight = self.weight_quantizer(self.weight)
            return convolve_first(input, self.input_quantizer, weight, self.bias, *geometry)
        else:
            weight, values = self._quantized(self.weight, input)
        with made_again(values):
            return convolve(values, weight, self.bias, *geometry)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _quantized_pixels(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized weights, and quantized values of those pixels that a stride reads.

        Where it is the same, no other pixels are quantized.
        """
        quantizer = self.input_quantizer
        weight, known = self.weight_quantizer(self.weight), _taken(input, quantizer)
        if known is None and quantizer.is_elementwise and not quantizer.is_watched:
            return weight, quantizer.forward_part(pixels_read(input, self.stride), input)
        values = quantizer(input) if known is None else known
        return weight, pixels_read(values, self.stride)


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


def mark_quantized(
    values: Tensor, quantizer: InputQuantizer, quantized: Tensor | None = None
) -> None:
    """Leave the layer of `quantizer` what it would make of `values`.

    Args:
        values: Its input.
        quantizer: Its input quantizer.
        quantized: What that returns; the values themselves by default.
    """
    # Tensors take attributes, of which torch's annotations know nothing.
    values.quantized_by = (quantizer, quantized)  # type: ignore[attr-defined]


def _taken(values: Tensor, quantizer: InputQuantizer) -> Tensor | None:
    """Return what `mark_quantized` left; another tensor is not held any longer."""
    known: tuple[InputQuantizer, Tensor | None] | None = getattr(values, "quantized_by", None)
    if known is None or known[0] is not quantizer:
        return None
    if known[1] is None:
        return values
    del values.quantized_by  # type: ignore[attr-defined]
    return known[1]


def _do_nothing(layer: nn.Module, args: tuple[Tensor, ...]) -> None: ...
