"""Whether an exported form computes the quantized network: code by code, and class by class.

A form is run by somebody else's code, which adds floats in another order. Codes that differ are
therefore told apart as in `adq_search.integer.agreement`: ties, what lies downstream of a tie, and
what nothing explains. Sums of integers have no such excuse: they are equal or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from adq_search.convert import quantized_layers
from adq_search.errors import StorageError
from adq_search.export.integer_file import int8_banks
from adq_search.integer import Agreement
from adq_search.integer._exact import ExactSum, Geometry
from adq_search.integer.agreement import Comparison, LayerCall, watching_codes
from adq_search.layers import QuantLayer

#: Largest magnitude of an input code: 8 bits without a sign.
_LARGEST_CODE = 255


@dataclass(frozen=True)
class Outcome:
    """What a form computed of a batch.

    Args:
        codes: Input codes of each layer, one tensor a call, int64, # shape: (N, ...)
        outputs: # shape: (N, ...)
        sums: Integer sums of each layer's calls, one tensor a bank of `int8_banks`; empty for
            forms that multiply floats.
    """

    codes: Mapping[str, list[Tensor]]
    outputs: Tensor
    sums: Mapping[str, list[list[Tensor]]] = field(default_factory=dict)


#: Runs a form on inputs, # shape: (N, ...)
Form = Callable[[Tensor], Outcome]


@dataclass(frozen=True, slots=True)
class SumAgreement:
    """How the integer sums of one layer agree with int64 arithmetic on the form's own codes.

    Args:
        sums: Sums compared.
        different: How many differ.
    """

    sums: int
    different: int


@dataclass(frozen=True, slots=True)
class ExportAgreement:
    """How an exported form agrees with the quantized network.

    Args:
        codes: Input codes of every layer, and classes.
        sums: By layer, of forms that sum integers.
    """

    codes: Agreement
    sums: dict[str, SumAgreement]

    @property
    def different_sums(self) -> int:
        """Sums that differ, of all layers."""
        return sum(layer.different for layer in self.sums.values())

    @property
    def is_verified(self) -> bool:
        """Whether every code agrees but for ties, and every sum and every class."""
        return self.codes.is_verified and self.different_sums == 0


@torch.no_grad()
def compare(network: nn.Module, form: Form, batches: Iterable[Tensor]) -> ExportAgreement:
    """Run a quantized network and an exported form of it, and compare codes, sums and classes.

    Args:
        network: Quantized, in eval mode.
        form: Runs the export.
        batches: Inputs, each # shape: (N, ...)

    Raises:
        StorageError: The export is of another network.
    """
    layers = quantized_layers(network)
    comparison = Comparison()
    sums: dict[str, SumAgreement] = {}
    for inputs in batches:
        with watching_codes(network) as calls:
            reference = network(inputs)
        outcome = form(inputs)
        _check_shapes(calls, reference, outcome)
        comparison.add(calls, outcome.codes, reference, outcome.outputs)
        for name, found in _compare_sums(layers, outcome):
            known = sums.get(name, SumAgreement(0, 0))
            sums[name] = SumAgreement(known.sums + found.sums, known.different + found.different)
    return ExportAgreement(comparison.agreement(), sums)


def _check_shapes(calls: list[LayerCall], reference: Tensor, outcome: Outcome) -> None:
    """Refuse a form with other layers, other codes or other outputs than the network's."""
    wanted: dict[str, list[Tensor]] = {}
    for call in calls:
        wanted.setdefault(call.layer, []).append(call.codes)
    strange = sorted(set(outcome.codes) - set(wanted))
    if strange:
        _refuse(f"The export has a layer '{strange[0]}', which the network has not")
    for name, codes in wanted.items():
        shapes = [tuple(c.shape) for c in codes]
        found = [tuple(c.shape) for c in outcome.codes.get(name, [])]
        if [math.prod(s) for s in shapes] != [math.prod(s) for s in found]:
            _refuse(f"Layer '{name}' has input codes of shapes {shapes}, but the export {found}")
    if outcome.outputs.shape != reference.shape:
        _refuse(
            f"The network's output has shape {tuple(reference.shape)}, but the export's "
            f"{tuple(outcome.outputs.shape)}"
        )


def _compare_sums(
    layers: Mapping[str, QuantLayer], outcome: Outcome
) -> Iterator[tuple[str, SumAgreement]]:
    """Compare a form's sums with those of exact arithmetic on its own codes."""
    for name, calls in outcome.sums.items():
        banks, geometry = int8_banks(layers[name]), Geometry.of(layers[name])
        exact = [ExactSum(bank, geometry, _LARGEST_CODE, name) for bank, _ in banks]
        for codes, found in zip(outcome.codes[name], calls, strict=True):
            own = [bank.fast(codes).long() for bank in exact]
            if [sums.shape for sums in own] != [sums.shape for sums in found]:
                _refuse(
                    f"The sums of layer '{name}' are not in its {len(own)} banks of shape "
                    f"{tuple(own[0].shape)}"
                )
            different = sum(int((a != b).sum()) for a, b in zip(own, found, strict=True))
            yield name, SumAgreement(sum(s.numel() for s in own), different)


def _refuse(what: str) -> NoReturn:
    msg = f"{what}: the export is of another network. Export it again."
    raise StorageError(msg)
