r"""Codes of two forms of one network compared: what differs, and why.

A code differs for one of three reasons, told apart for every sample:
    tie          floats and integers round a value that lies on the boundary of two codes
                 (nearer than `TIE_STEPS`) to either side
    downstream   an earlier layer had a tie on this sample, so this layer saw other inputs
    unexplained  anything else: an error, or an ASQ factor so near zero that float32 itself is at a
                 loss (dividing by it magnifies every rounding error)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adq_search.convert import quantized_layers
from adq_search.layers import QuantLayer
from adq_search.quantizers import AsqInput, InputQuantizer

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


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one call of a layer of the fake-quantized network saw.

    Args:
        layer: Its name.
        codes: Input codes, int64, # shape: (N, ...)
        is_boundary: Which values lie on a boundary of two codes, same shape.
    """

    layer: str
    codes: Tensor
    is_boundary: Tensor


@contextmanager
def watching_codes(network: nn.Module) -> Iterator[list[LayerCall]]:
    """Note the input codes of every quantized layer, in order of execution."""
    calls: list[LayerCall] = []

    def look(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, QuantLayer)
        quantizer, values = layer.input_quantizer, args[0].detach()
        calls.append(LayerCall(name, quantizer.codes(values), _lies_on_boundary(quantizer, values)))

    handles = [
        layer.register_forward_pre_hook(partial(look, name))
        for name, layer in quantized_layers(network).items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Comparison:
    """Adds up, batch by batch, how another form agrees with the fake-quantized network."""

    def __init__(self) -> None:
        self._layers: dict[str, list[int]] = {}
        self._samples = self._tied_samples = self._other_classes = 0
        self._largest_error = 0.0

    def add(
        self,
        calls: Sequence[LayerCall],
        found: Mapping[str, Sequence[Tensor]],
        reference: Tensor,
        outputs: Tensor,
    ) -> None:
        """Take one batch.

        Args:
            calls: Of the fake-quantized network, in order of execution.
            found: The other form's codes by layer, one tensor a call.
            reference: Logits of the fake-quantized network, # shape: (N, ..., classes)
            outputs: Logits of the other form, same shape.
        """
        n = len(reference)
        later = {name: iter(codes) for name, codes in found.items()}
        has_tie = torch.zeros(n, dtype=torch.bool)
        for call in calls:
            codes = next(later[call.layer]).reshape(n, -1).long()
            difference = codes - call.codes.reshape(n, -1)
            differs, seen_before = difference != 0, has_tie.unsqueeze(1)
            is_tie = (difference.abs() == 1) & call.is_boundary.reshape(n, -1)
            fresh = differs & ~seen_before
            count = self._layers.setdefault(call.layer, [0, 0, 0, 0])
            count[0] += differs.numel()
            count[1] += int((fresh & is_tie).sum())
            count[2] += int((differs & seen_before).sum())
            count[3] += int((fresh & ~is_tie).sum())
            has_tie = has_tie | differs.any(1)
        errors = (outputs.double() - reference.double())[~has_tie].abs()
        if errors.numel():
            self._largest_error = max(self._largest_error, float(errors.max()))
        other = outputs.argmax(-1) != reference.argmax(-1)
        self._other_classes += int(other.reshape(n, -1).any(1).sum())
        self._samples += n
        self._tied_samples += int(has_tie.sum())

    def agreement(self) -> Agreement:
        """Return what was added up."""
        return Agreement(
            layers={name: LayerAgreement(*count) for name, count in self._layers.items()},
            samples=self._samples,
            tied_samples=self._tied_samples,
            other_classes=self._other_classes,
            largest_logit_error=self._largest_error,
        )


def _lies_on_boundary(quantizer: InputQuantizer, values: Tensor) -> Tensor:
    """Return which values have a boundary of two codes nearer than `TIE_STEPS` of their step."""
    levels = quantizer.levels()
    reach = TIE_STEPS * (levels[-1] - levels[0]) / (len(levels) - 1)
    if not isinstance(quantizer, AsqInput):
        return quantizer.codes(values - reach) != quantizer.codes(values + reach)
    # A moved value must not move the factor of its sample, and the step is as long as that factor.
    scaled = values / quantizer.factors(values)
    boundaries = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(scaled - reach, boundaries) != torch.bucketize(
        scaled + reach, boundaries
    )
