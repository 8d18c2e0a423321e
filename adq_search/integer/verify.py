r"""Whether the integer network is the network that was trained: code by code, and class by class.

A code differs for one of three reasons, told apart for every sample:
    tie          float32 and integers round a value that lies on the boundary of two codes
                 (nearer than `TIE_STEPS`) to either side
    downstream   an earlier layer had a tie on this sample, so this layer saw other inputs
    unexplained  anything else: an error, or an ASQ factor so near zero that float32 itself is at a
                 loss (dividing by it magnifies every rounding error)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adq_search.convert import quantized_layers
from adq_search.integer._exact import ExactSum, Geometry, exact_float32
from adq_search.integer.inputs import code_step
from adq_search.integer.network import IntegerNetwork
from adq_search.integer.shift_and_table import sqnr_db, table_sums
from adq_search.integer.words import weight_words
from adq_search.layers import QuantLayer
from adq_search.quantizers import AsqInput
from adq_search.quantizers._clipped import ClippedPowerWeight

#: A value nearer to a boundary than this share of a step may fall on either side.
TIE_STEPS = 1e-3


@dataclass(frozen=True, slots=True)
class LayerAgreement:
    """How one layer's input codes agree.

    Args:
        codes: Codes compared.
        ties: Codes that differ by one on a boundary.
        downstream: Codes that differ on samples with an earlier tie.
        unexplained: Codes that differ otherwise.
    """

    codes: int
    ties: int
    downstream: int
    unexplained: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an integer network agrees with the fake-quantized one.

    Args:
        layers: By layer name, in order of execution.
        samples: Samples compared.
        tied_samples: Samples with a tie in some layer.
        other_classes: Samples whose predicted class differs.
        largest_logit_error: Largest difference of a logit on samples without a tie.
    """

    layers: dict[str, LayerAgreement]
    samples: int
    tied_samples: int
    other_classes: int
    largest_logit_error: float

    @property
    def codes(self) -> int:
        """Codes compared."""
        return sum(layer.codes for layer in self.layers.values())

    @property
    def ties(self) -> int:
        """Codes that differ on a boundary."""
        return sum(layer.ties for layer in self.layers.values())

    @property
    def unexplained(self) -> int:
        """Codes that differ for no known reason."""
        return sum(layer.unexplained for layer in self.layers.values())

    @property
    def is_verified(self) -> bool:
        """Whether every code agrees but for ties, and every class."""
        return self.unexplained == 0 and self.other_classes == 0


@torch.no_grad()
def verify(network: nn.Module, integer: IntegerNetwork, batches: Iterable[Tensor]) -> Agreement:
    """Run both networks and compare every input code of every layer, and every class.

    Args:
        network: Fake-quantized, in evaluation mode, as it was lowered.
        integer: What `lower` made of it.
        batches: Float inputs, each # shape: (N, *sample)
    """
    counts = {name: [0, 0, 0, 0] for name in integer.layers}
    samples = tied_samples = other_classes = 0
    worst = 0.0
    for inputs in batches:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with _watching(network, seen):
            logits = network(inputs).double()
        found = integer.integers(inputs, [layer.codes for layer in integer.layers.values()])
        has_tie = torch.zeros(len(inputs), dtype=torch.bool)
        for name, layer in integer.layers.items():
            codes, is_boundary = seen[name]
            difference = (found[layer.codes].long() - codes).flatten(1)
            differs = difference != 0
            is_tie = (difference.abs() == 1) & is_boundary.flatten(1)
            fresh = differs & ~has_tie.unsqueeze(1)
            count = counts[name]
            count[0] += codes.numel()
            count[1] += int((fresh & is_tie).sum())
            count[2] += int((differs & has_tie.unsqueeze(1)).sum())
            count[3] += int((fresh & ~is_tie).sum())
            has_tie = has_tie | differs.any(1)
        own = found[integer.output].double() * integer.output_unit
        other_classes += int((own.argmax(-1) != logits.argmax(-1)).sum())
        errors = (own - logits).abs()[~has_tie]
        worst = max(worst, float(errors.max()) if errors.numel() else 0.0)
        samples += len(inputs)
        tied_samples += int(has_tie.sum())
    return Agreement(
        layers={name: LayerAgreement(*count) for name, count in counts.items()},
        samples=samples,
        tied_samples=tied_samples,
        other_classes=other_classes,
        largest_logit_error=worst,
    )


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


@contextmanager
def _watching(network: nn.Module, seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Note the input codes of every quantized layer, and which of them lie on a boundary."""

    def look(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, QuantLayer)
        quantizer, values = layer.input_quantizer, args[0].detach()
        levels = quantizer.levels()
        reach = TIE_STEPS * (levels[-1] - levels[0]) / (len(levels) - 1)
        is_boundary = quantizer.codes(values - reach) != quantizer.codes(values + reach)
        seen[name] = (quantizer.codes(values), is_boundary)

    layers = quantized_layers(network)
    handles = [
        layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
