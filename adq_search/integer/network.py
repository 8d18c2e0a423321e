"""A network in integers: steps in order, and what each quantized layer looks like."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adq_search.errors import IntegerError
from adq_search.integer._exact import exact_float32
from adq_search.integer.steps import Operation, Sums
from adq_search.integer.words import WeightWords

Arithmetic = Literal["fast", "int64"]


@dataclass(frozen=True)
class IntegerLayer:
    """One quantized layer in integers.

    Args:
        name: Dotted module name.
        words: Its weights.
        sums: Its sums: exact and one a bank, or by shifts and a table.
        step: Value of input code 1, without a sample's factor.
        codes: Name of the step result that holds its input codes.
        sum_names: Names of the step results that hold its sums.
        is_fused: Whether the layer before makes its codes at once.
    """

    name: str
    words: WeightWords
    sums: tuple[Sums, ...]
    step: float
    codes: str
    sum_names: tuple[str, ...]
    is_fused: bool

    @property
    def largest_sum(self) -> int:
        """Largest magnitude any of its sums can reach."""
        return max(int(s.bounds.max()) for s in self.sums)


class IntegerNetwork(nn.Module):
    """A trained network in integers; call it as the network it was made from.

    Args:
        operations: Steps in order of execution.
        layers: The quantized layers by name.
        sample_shape: Shape of one input, without the batch.
        output: Name of the result that holds the logits.
        output_unit: Value of one of them.
        samples_at_once: Samples that go through the network together; few stay in the cache.
    """

    def __init__(
        self,
        operations: tuple[Operation, ...],
        layers: dict[str, IntegerLayer],
        *,
        sample_shape: tuple[int, ...],
        output: str,
        output_unit: float,
        samples_at_once: int,
    ) -> None:
        super().__init__()
        self.operations = operations
        self.layers = layers
        self.sample_shape = sample_shape
        self.output = output
        self.output_unit = output_unit
        self.samples_at_once = samples_at_once
        self._last_use = {
            source: i for i, operation in enumerate(operations) for source in operation.sources
        }

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits: the network's integers times their unit.

        Args:
            inputs: Float inputs, # shape: (N, *sample)

        Returns:
            Logits, float64, # shape: (N, classes)

        Raises:
            IntegerError: The inputs have another shape than the network was lowered for, or NaN.
        """
        return self.integers(inputs)[self.output].double() * self.output_unit

    def integers(
        self,
        inputs: Tensor,
        keep: Collection[str] = (),
        *,
        arithmetic: Arithmetic = "fast",
    ) -> dict[str, Tensor]:
        """Run the network and return the integers of some results, and of the output.

        Args:
            inputs: Float inputs, # shape: (N, *sample)
            keep: Names of results, such as `layer.codes` and `layer.sum_names` of a layer.
            arithmetic: `fast`, or `int64` for the slow arithmetic that is obviously exact.

        Raises:
            IntegerError: The inputs have another shape than the network was lowered for, or NaN.
        """
        if tuple(inputs.shape[1:]) != self.sample_shape:
            msg = (
                f"An integer network takes inputs of the shape it was lowered for, (N, "
                f"{', '.join(map(str, self.sample_shape))}), but got {tuple(inputs.shape)}. "
                "Lower the network again with an example of that shape."
            )
            raise IntegerError(msg)
        if bool(inputs.isnan().any()):
            msg = "Integers have no NaN, but the inputs have. Clean them first."
            raise IntegerError(msg)
        wanted = {*keep, self.output}
        with exact_float32():
            parts = [
                self._run(part, wanted, arithmetic) for part in inputs.split(self.samples_at_once)
            ]
        return {name: torch.cat([part[name] for part in parts]) for name in wanted}

    def _run(self, inputs: Tensor, wanted: set[str], arithmetic: Arithmetic) -> dict[str, Tensor]:
        held = {"": inputs}
        for i, operation in enumerate(self.operations):
            result = operation.step(*(held[source] for source in operation.sources))
            held[operation.result] = result.long() if arithmetic == "int64" else result
            for source in operation.sources:
                if self._last_use[source] == i and source not in wanted:
                    held.pop(source, None)
        return {name: held[name] for name in wanted}
