r"""Quantizers of one kind that some networks (slots) have at one layer, and train together.

Parameters of the quantizers stand one after the other in the group's own. Each group runs in one
pass of C++ a direction over the layer's tensor, or, where that does not run, slot by slot as its
quantizers do.

Notation:
    K   slots of the tensor
    S   slots of the group
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from adq_search.quantizers import (
    AdqWeight,
    LsqInput,
    LsqWeight,
    N2uqInput,
    Quantizer,
)
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._clipped import ClippedPowerWeight
from adq_search.quantizers._thresholds import MIN_WIDTH, thresholds_through
from adq_search.quantizers._through import (
    clipped_through,
    straight_through,
    uniform_through,
)
from adq_search.quantizers.adq import moved_codebook, snapped
from adq_search.stacking._native import Places, run

Q = TypeVar("Q", bound=Quantizer)


class Group(nn.Module, ABC, Generic[Q]):
    """Quantizers of one kind, by slot.

    Attributes:
        slots: Where they stand in the tensor.
    """

    #: Read by the optimizer, as of a quantizer.
    learning_rate_factor: ClassVar[float] = 1.0

    def __init__(self, quantizers: Mapping[int, Q]) -> None:
        super().__init__()
        self.slots = tuple(quantizers)
        self.quantizers = list(quantizers.values())  # a plain list: its modules are not ours

    def trained(self) -> tuple[Tensor, ...]:
        """Return the parameters, in the order of the gradients that `backward_into` returns."""
        return tuple(self.parameters())

    @abstractmethod
    def apart(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Quantize the values of each slot, with gradients."""

    @abstractmethod
    def forward_into(self, out: Tensor, values: Tensor, at: Places) -> tuple[Tensor, ...]:
        """Quantize in C++.

        Args:
            out: Written at the group's places.
            values: Of the shape of `out`.
            at: The group's places.

        Returns:
            What `backward_into` needs besides.
        """

    @abstractmethod
    def backward_into(
        self, gradient: Tensor, values: Tensor, upstream: Tensor, at: Places, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        """Write the gradient to the values at the group's places; return those to the parameters.

        Args:
            gradient: Written at the group's places.
            values: What was quantized.
            upstream: Gradient of the loss at the output.
            at: The group's places.
            *kept: As `forward_into` returned them.
        """

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write what was trained back into the quantizers."""
        for name, parameter in self.named_parameters(recurse=False):
            for quantizer, row in zip(self.quantizers, parameter, strict=True):
                own = quantizer.get_parameter(name)
                # Rows of tables may be longer than a quantizer's own.
                own.copy_(row.flatten()[: own.numel()].view_as(own))

    def _stack(self, name: str) -> Tensor:
        """The quantizers' own tensors of one name, # shape: (S, ...)."""
        return torch.stack([getattr(q, name).detach() for q in self.quantizers])


class LsqGroup(Group[LsqWeight | LsqInput]):
    """LSQ: a step a slot, or a step an output channel of a slot's weights."""

    qmin: Tensor
    qmax: Tensor

    def __init__(self, quantizers: Mapping[int, LsqWeight | LsqInput]) -> None:
        super().__init__(quantizers)
        self.step = nn.Parameter(self._stack("step"))
        self.register_buffer("qmin", self._stack("qmin"))
        self.register_buffer("qmax", self._stack("qmax"))

    def apart(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Quantize the values of each slot."""
        own = zip(pieces, self.step.unbind(), self.qmin, self.qmax, strict=True)
        return [uniform_through(p, *rest, n_features=p[0].numel()) for p, *rest in own]

    def forward_into(self, out: Tensor, values: Tensor, at: Places) -> tuple[Tensor, ...]:
        """Quantize in C++."""
        place = (*self._strides(), EPS, self.qmin, self.qmax)
        run("uniform", values, at, self.step, *place, out)
        return (self.step,)

    def backward_into(
        self, gradient: Tensor, values: Tensor, upstream: Tensor, at: Places, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        """Write the gradient to the values; return that to the steps."""
        (step,) = kept
        grad_step = torch.empty_like(step)
        place = (*self._strides(), EPS, self.qmin, self.qmax, at.columns)
        run("uniform_backward", values, at, upstream, step, *place, gradient, grad_step)
        return (grad_step,)

    def _strides(self) -> tuple[int, int]:
        """From one row's step to the next one's, and from one slot's."""
        return (1, self.step.shape[1]) if self.step.ndim > 1 else (0, 1)


class ClippedGroup(Group[ClippedPowerWeight]):
    """POT, POST and root-r: a clipping threshold an output channel, levels of each slot."""

    levels: Tensor
    n_levels: Tensor

    def __init__(self, quantizers: Mapping[int, ClippedPowerWeight]) -> None:
        super().__init__(quantizers)
        self.threshold = nn.Parameter(self._stack("threshold"))
        tables = [q.unit_levels(torch.float32) for q in self.quantizers]
        self.register_buffer("levels", nn.utils.rnn.pad_sequence(tables, batch_first=True))
        self.register_buffer("n_levels", _lengths(tables))

    def apart(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Quantize the values of each slot."""
        return [
            clipped_through(p, threshold, q.levels_for(p, threshold), q.gradient_scale)
            for p, threshold, q in zip(
                pieces, self.threshold.unbind(), self.quantizers, strict=True
            )
        ]

    def forward_into(self, out: Tensor, values: Tensor, at: Places) -> tuple[Tensor, ...]:
        """Quantize in C++."""
        tables = (self.levels, self.n_levels, self.levels.shape[1])
        run("clipped", values, at, self.threshold, EPS, *tables, out)
        return (self.threshold,)

    def backward_into(
        self, gradient: Tensor, values: Tensor, upstream: Tensor, at: Places, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        """Write the gradient to the values; return that to the thresholds."""
        (threshold,) = kept
        grad_threshold = torch.empty_like(threshold)
        tables = (self.levels, self.n_levels, self.levels.shape[1])
        scale = self.quantizers[0].gradient_scale
        place = (*tables, scale, gradient, grad_threshold)
        run("clipped_backward", values, at, upstream, threshold, EPS, *place)
        return (grad_threshold,)


class AdqGroup(Group[AdqWeight]):
    """ADQ: a codebook a slot, which follows the weights."""

    codebook: Tensor
    n_levels: Tensor
    momentum: Tensor

    def __init__(self, quantizers: Mapping[int, AdqWeight]) -> None:
        super().__init__(quantizers)
        tables = [q.codebook for q in self.quantizers]
        self.register_buffer("codebook", nn.utils.rnn.pad_sequence(tables, batch_first=True))
        self.register_buffer("n_levels", _lengths(tables))
        self.register_buffer("momentum", self._stack("momentum"))

    def apart(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Quantize the weights of each slot."""
        found = []
        for piece, table, n, m in zip(
            pieces, self.codebook, self.n_levels.tolist(), self.momentum, strict=True
        ):
            quantized, sums, counts = snapped(piece.detach(), table[:n])
            found.append(straight_through(piece, quantized))
            if self.training:
                sums[n // 2] = 0
                table[:n] = moved_codebook(table[:n], sums, counts, m)
        return found

    @torch.no_grad()
    def forward_into(self, out: Tensor, values: Tensor, at: Places) -> tuple[Tensor, ...]:
        """Quantize in C++."""
        n_slots, room = self.codebook.shape
        sums = self.codebook.new_empty(n_slots, 2, room)
        tables = (self.codebook, self.n_levels, room)
        run("codebook", values, at, *tables, out, sums)
        if self.training:
            sums[:, 0].scatter_(1, self.n_levels.unsqueeze(1) // 2, 0.0)
            moved = moved_codebook(self.codebook, sums[:, 0], sums[:, 1], self.momentum[:, None])
            self.codebook.copy_(moved)
        return ()

    def backward_into(
        self, gradient: Tensor, values: Tensor, upstream: Tensor, at: Places, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        """Pass the gradient through."""
        run("copy", upstream, at, gradient)
        return ()

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write the codebooks back."""
        for quantizer, table in zip(self.quantizers, self.codebook, strict=True):
            quantizer.codebook.copy_(table[: len(quantizer.codebook)])


class N2uqGroup(Group[N2uqInput]):
    """N2UQ: thresholds of each slot; rows of `widths` end where a slot has fewer intervals."""

    learning_rate_factor: ClassVar[float] = N2uqInput.learning_rate_factor

    qmin: Tensor
    n_intervals: Tensor

    def __init__(self, quantizers: Mapping[int, N2uqInput]) -> None:
        super().__init__(quantizers)
        tables = [q.widths.detach() for q in self.quantizers]
        self.start = nn.Parameter(self._stack("start"))
        self.widths = nn.Parameter(nn.utils.rnn.pad_sequence(tables, batch_first=True))
        self.in_scale = nn.Parameter(self._stack("in_scale"))
        self.out_scale = nn.Parameter(self._stack("out_scale"))
        self.register_buffer("qmin", self._stack("qmin"))
        self.register_buffer("n_intervals", _lengths(tables))

    def apart(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Quantize the values of each slot."""
        widths = [
            own[:n] for own, n in zip(self.widths.unbind(), self.n_intervals.tolist(), strict=True)
        ]
        scales = (self.in_scale.unbind(), self.out_scale.unbind())
        own = zip(pieces, self.start.unbind(), widths, *scales, self.qmin, strict=True)
        return [thresholds_through(*of_slot) for of_slot in own]

    def forward_into(self, out: Tensor, values: Tensor, at: Places) -> tuple[Tensor, ...]:
        """Quantize in C++; keeps each value's interval, a byte."""
        trained = self.trained()
        index = torch.empty(len(self.slots), at.rows, at.columns, dtype=torch.uint8)
        run("thresholds", values, at, *trained, *self._constants(), out, index)
        return (index, *trained)

    def backward_into(
        self, gradient: Tensor, values: Tensor, upstream: Tensor, at: Places, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        """Write the gradient to the values; return those to start, widths and scales."""
        index, *trained = kept
        found = tuple(torch.zeros_like(parameter) for parameter in trained)
        place = (*trained, *self._constants(), gradient, *found)
        run("thresholds_backward", values, at, upstream, index, *place)
        return found

    def _constants(self) -> tuple[Tensor | float, ...]:
        room = self.widths.shape[1]
        return (self.qmin, self.n_intervals, room, MIN_WIDTH, EPS)


def _lengths(tables: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(table) for table in tables])
