"""Whether the integer network is the network that was trained: code by code, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adq_search.convert import quantized_layers
from adq_search.integer._exact import ExactSum, Geometry, exact_float32
from adq_search.integer.agreement import Agreement, Comparison, watching_codes
from adq_search.integer.inputs import code_step
from adq_search.integer.network import IntegerNetwork
from adq_search.integer.shift_and_table import sqnr_db, table_sums
from adq_search.integer.words import weight_words
from adq_search.layers import QuantLayer
from adq_search.quantizers import AsqInput
from adq_search.quantizers._clipped import ClippedPowerWeight


@torch.no_grad()
def verify(network: nn.Module, integer: IntegerNetwork, batches: Iterable[Tensor]) -> Agreement:
    """Run both networks and compare every input code of every layer, and every class.

    Args:
        network: Fake-quantized, in evaluation mode, as it was lowered.
        integer: What `lower` made of it.
        batches: Float inputs, each # shape: (N, *sample)
    """
    comparison = Comparison()
    for inputs in batches:
        with watching_codes(network) as calls:
            logits = network(inputs)
        found = integer.integers(inputs, [layer.codes for layer in integer.layers.values()])
        comparison.add(
            calls,
            {name: [found[layer.codes]] for name, layer in integer.layers.items()},
            logits,
            found[integer.output].double() * integer.output_unit,
        )
    return comparison.agreement()


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """One layer alone, on the inputs that the fake-quantized network gives it.

    Args:
        largest_error: Largest difference between the layer's float32 output and its integer sums
            times their unit, as a share of the float32 rounding error that is possible.
        sqnr_db: Signal-to-noise ratio of that output against the exact sums, decibels.
        table_sqnr_db: The same for the paper's shifts and table without fraction bits; None for
            weights that are no powers of a root of two.
    """

    largest_error: float
    sqnr_db: float
    table_sqnr_db: float | None

    @property
    def is_exact(self) -> bool:
        """Whether float32 rounding explains all of the difference."""
        return self.largest_error <= 1.0


@torch.no_grad()
def verify_layers(network: nn.Module, batch: Tensor) -> dict[str, LayerCheck]:
    """Check each layer of a fake-quantized network against its own integer sums.

    Needs no graph, so it works on networks that `lower` refuses. The rounding error that is
    possible in float32 is `(n + 4) 2^-24 sum |w x|` for n products.

    Args:
        network: Fake-quantized, in evaluation mode.
        batch: Float inputs, # shape: (N, *sample)
    """
    checks: dict[str, LayerCheck] = {}

    def check(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, QuantLayer)
        checks[name] = _layer_check(name, layer, args[0], output)

    layers = quantized_layers(network)
    handles = [layer.register_forward_hook(partial(check, name)) for name, layer in layers.items()]
    try:
        network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return checks


def _layer_check(name: str, layer: QuantLayer, values: Tensor, output: Tensor) -> LayerCheck:
    quantizer = layer.input_quantizer
    codes = quantizer.codes(values).float()
    step: Tensor | float = code_step(quantizer)
    if isinstance(quantizer, AsqInput):
        step = step * quantizer.factors(values).double()
    weight = layer.get_parameter("weight")
    words = weight_words(layer.weight_quantizer, weight)
    geometry = Geometry.of(layer)
    by_output = (-1, *(1,) * len(geometry.stride))
    max_code = max(abs(quantizer.lowest_code), abs(quantizer.lowest_code + 2**quantizer.bits - 1))
    exact, reach = torch.zeros(()), torch.zeros(())
    with exact_float32():
        for bank, constant in zip(words.banks, words.constants, strict=True):
            scale = words.unit.view(by_output) * constant
            sums = ExactSum(bank, geometry, max_code, name).fast(codes).double()
            exact = exact + sums * scale
            sums = ExactSum(bank.abs(), geometry, max_code, name).fast(codes.abs()).double()
            reach = reach + sums * scale
        table_db = None
        if isinstance(layer.weight_quantizer, ClippedPowerWeight):
            table = table_sums(layer, name)
            table_db = sqnr_db(exact * step, table.fast(codes) * table.unit.view(by_output) * step)
    bias = 0.0 if layer.bias is None else layer.get_parameter("bias").double().view(by_output)
    own = exact * step + bias
    possible = (weight[0].numel() + 4) * 2.0**-24 * (reach * step + abs(bias))
    error = (output.double() - own).abs()
    share = torch.where(error > 0, error / possible.clamp(min=1e-300), 0.0)
    return LayerCheck(float(share.max()), sqnr_db(own, output), table_db)
