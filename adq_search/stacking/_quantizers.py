"""The quantizers that K networks have at one layer, as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adq_search.native import laid_out_as
from adq_search.quantizers import (
    AdqWeight,
    AsqInput,
    InputQuantizer,
    LsqInput,
    LsqWeight,
    N2uqInput,
    PostWeight,
    PotWeight,
    Quantizer,
    RootWeight,
    WeightQuantizer,
)
from adq_search.stacking._adaptive import AsqGroup
from adq_search.stacking._groups import AdqGroup, ClippedGroup, Group, LsqGroup, N2uqGroup
from adq_search.stacking._native import (
    LIBRARY,
    Places,
    places_of_inputs,
    places_of_weights,
    run,
)

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"

#: What runs quantizers of a class together; those of other classes run slot by slot.
GROUPS: Mapping[type[Quantizer], type[Group[Any]]] = {
    LsqWeight: LsqGroup,
    LsqInput: LsqGroup,
    PotWeight: ClippedGroup,
    PostWeight: ClippedGroup,
    RootWeight: ClippedGroup,
    AdqWeight: AdqGroup,
    AsqInput: AsqGroup,
    N2uqInput: N2uqGroup,
}


class StackedQuantizers(nn.Module):
    """The weight quantizers, or the input quantizers, of K networks at one layer.

    Args:
        quantizers: One a slot, None where the slot stays in floating point.
        dim: Along which the slots stand, one after the other: 0 of weights, 1 of inputs.
    """

    def __init__(self, quantizers: Sequence[Quantizer | None], *, dim: int) -> None:
        super().__init__()
        kinds: dict[type[Group[Any]], dict[int, Quantizer]] = {}
        alone: dict[str, Quantizer] = {}
        for slot, quantizer in enumerate(quantizers):
            if quantizer is None:
                continue
            if _trains_together(quantizer):
                kinds.setdefault(GROUPS[type(quantizer)], {})[slot] = quantizer
            else:
                alone[str(slot)] = quantizer
        self._groups = [kind(own) for kind, own in kinds.items()]
        self.groups = nn.ModuleList(self._groups)
        self.alone = nn.ModuleDict(alone)
        grouped = {slot for group in self._groups for slot in group.slots}
        #: Slots whose values no group changes.
        self._rest = tuple(slot for slot in range(len(quantizers)) if slot not in grouped)
        self._n_slots = len(quantizers)
        self._dim = dim

    def forward(self, values: Tensor) -> Tensor:
        """Quantize; same shape."""
        trained = [parameter for group in self._groups for parameter in group.trained()]
        if not self._groups:
            out = values
        elif LIBRARY.takes(values, *trained):
            out = _Together.apply(values.contiguous(), self, *trained)
        else:
            pieces = list(values.chunk(self._n_slots, self._dim))
            for group in self._groups:
                found = group.apart([pieces[slot] for slot in group.slots])
                for slot, piece in zip(group.slots, found, strict=True):
                    pieces[slot] = piece
            out = torch.cat(pieces, self._dim)
        if not self.alone:
            return out
        pieces = list(out.chunk(self._n_slots, self._dim))
        for name, quantizer in self.alone.items():
            pieces[int(name)] = quantizer(pieces[int(name)])
        return torch.cat(pieces, self._dim)

    def unstack_(self) -> None:
        """Write what was trained together back into the quantizers."""
        for group in self._groups:
            group.unstack_()

    def places(self, values: Tensor) -> tuple[list[tuple[Group[Any], Places]], Places | None]:
        """Return the groups with their places in the values, and the places of no group."""
        find: Callable[..., Places] = places_of_inputs if self._dim else places_of_weights
        shape = tuple(values.shape)
        grouped = [(group, find(shape, self._n_slots, group.slots)) for group in self._groups]
        return grouped, find(shape, self._n_slots, self._rest) if self._rest else None


def stack_weight_quantizers(quantizers: Sequence[WeightQuantizer | None]) -> StackedQuantizers:
    """Stack the weight quantizers of one layer; weights stand along the first dimension."""
    return StackedQuantizers(quantizers, dim=0)


def stack_input_quantizers(quantizers: Sequence[InputQuantizer | None]) -> StackedQuantizers:
    """Stack the input quantizers of one layer; channels stand along the second dimension."""
    return StackedQuantizers(quantizers, dim=1)


def _trains_together(quantizer: Quantizer) -> bool:
    """Whether a quantizer is of a kind that runs together with others of its kind."""
    if isinstance(quantizer, AsqInput) and not quantizer.is_adaptive:
        return False
    # Groups have a step for each output channel.
    return type(quantizer) in GROUPS and quantizer.options.get("granularity") != "tensor"


class _Together(Function):
    """All groups of a layer as one node of the graph: each writes its places of one tensor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, quantizers: StackedQuantizers, *_: Tensor) -> Tensor:
        ctx.groups, ctx.rest = quantizers.places(values)
        out = torch.empty_like(values)
        kept = [group.forward_into(out, values, at) for group, at in ctx.groups]
        if ctx.rest is not None:
            run("copy", values, ctx.rest, out)
        ctx.save_for_backward(values, *(tensor for of_group in kept for tensor in of_group))
        ctx.counts = [len(of_group) for of_group in kept]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, *kept = ctx.saved_tensors
        upstream = laid_out_as(gradients[0], values)
        gradient = torch.empty_like(values)
        to_trained: list[Tensor] = []
        for (group, at), n in zip(ctx.groups, ctx.counts, strict=True):
            own, kept = kept[:n], kept[n:]
            to_trained += group.backward_into(gradient, values, upstream, at, *own)
        if ctx.rest is not None:
            run("copy", upstream, ctx.rest, gradient)
        return gradient, None, *to_trained
