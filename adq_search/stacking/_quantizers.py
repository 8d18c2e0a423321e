r"""The quantizers that K networks have at one layer, as one call.

Slots are the K networks. Uniform quantizers (LSQ, ASQ's inputs) of all slots are one call with a
step and a code range a row, over all K slots; N2UQ's inputs are another; each other slot runs its
own quantizer.

Notation:
    K   slots
    N   samples
    C   channels of one network
    F   features of one sample in one network: C times its pixels
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.quantizers import (
    AsqInput,
    InputQuantizer,
    LsqInput,
    LsqWeight,
    N2uqInput,
    WeightQuantizer,
)
from adq_search.quantizers._through import (
    lsq_gradient_scale,
    positive_step,
    uniform_through,
)
from adq_search.quantizers.asq import SMALLEST_FACTOR
from adq_search.stacking._thresholds import ThresholdInputs


class Uniform(nn.Module, ABC):
    """Uniform quantizers of some slots; the other slots compute something that nobody reads."""

    #: Read by the optimizer, as of a quantizer: no weight decay on steps.
    learning_rate_factor: ClassVar[float] = 1.0

    @abstractmethod
    def forward(self, values: Tensor) -> Tensor:
        """Quantize all slots; same shape."""

    @abstractmethod
    def unstack_(self) -> None:
        """Write what was trained back into the quantizers."""


class StackedQuantizers(nn.Module):
    """The weight quantizers, or the input quantizers, of K networks at one layer.

    Args:
        quantizers: One a slot, None where the slot stays in floating point.
        uniform: What runs some of them together.
        together: The slots that it runs.
        thresholds: N2UQ's quantizers by slot, run together too.
        dim: Along which the slots stand, one after the other.
    """

    def __init__(
        self,
        quantizers: Sequence[WeightQuantizer | InputQuantizer | None],
        uniform: Uniform | None,
        together: Sequence[int],
        thresholds: Mapping[int, N2uqInput],
        *,
        dim: int,
    ) -> None:
        super().__init__()
        self.uniform = uniform
        self.thresholds = ThresholdInputs(list(thresholds.values())) if thresholds else None
        self._cut = list(thresholds)
        rest = [k for k in range(len(quantizers)) if k not in together and k not in thresholds]
        self.alone = nn.ModuleDict(
            {str(k): quantizer for k in rest if (quantizer := quantizers[k]) is not None}
        )
        self._floating = [k for k in rest if quantizers[k] is None]
        self._n_slots = len(quantizers)
        self._dim = dim

    def forward(self, values: Tensor) -> Tensor:
        """Quantize; same shape."""
        done = values if self.uniform is None else self.uniform(values)
        if not (self.alone or self._cut or (self.uniform is not None and self._floating)):
            return done
        raw = values.chunk(self._n_slots, self._dim)
        pieces = list(done.chunk(self._n_slots, self._dim))
        for slot in self._floating:
            pieces[slot] = raw[slot]
        if self.thresholds is not None:
            rows = torch.stack([raw[slot].flatten(1) for slot in self._cut], dim=1)
            for slot, piece in zip(self._cut, self.thresholds(rows).unbind(dim=1), strict=True):
                pieces[slot] = piece.view(raw[slot].shape)
        for name, quantizer in self.alone.items():
            pieces[int(name)] = quantizer(raw[int(name)])
        return torch.cat(pieces, self._dim)

    def unstack_(self) -> None:
        """Write what was trained together back into the quantizers."""
        for together in (self.uniform, self.thresholds):
            if together is not None:
                together.unstack_()


def stack_weight_quantizers(quantizers: Sequence[WeightQuantizer | None]) -> StackedQuantizers:
    """Stack the weight quantizers of one layer; weights stand along the first dimension."""
    together = {k: q for k, q in enumerate(quantizers) if isinstance(q, LsqWeight) and q.step.ndim}
    uniform = UniformWeights(together, len(quantizers)) if together else None
    return StackedQuantizers(quantizers, uniform, list(together), {}, dim=0)


def stack_input_quantizers(quantizers: Sequence[InputQuantizer | None]) -> StackedQuantizers:
    """Stack the input quantizers of one layer; channels stand along the second dimension."""
    together = {k: q for k, q in enumerate(quantizers) if isinstance(q, LsqInput | AsqInput)}
    uniform = UniformInputs(together, len(quantizers)) if together else None
    thresholds = {k: q for k, q in enumerate(quantizers) if isinstance(q, N2uqInput)}
    return StackedQuantizers(quantizers, uniform, list(together), thresholds, dim=1)


class UniformWeights(Uniform):
    """LSQ for weights, with a step and a code range a row of weights.

    Args:
        quantizers: By slot, each with a step an output channel.
        n_slots: K.
    """

    qmin: Tensor
    qmax: Tensor
    gradient_scale: Tensor

    @torch.no_grad()
    def __init__(self, quantizers: Mapping[int, LsqWeight], n_slots: int) -> None:
        super().__init__()
        self._quantizers = dict(quantizers)  # a plain dictionary: its modules are not ours
        some = next(iter(quantizers.values()))
        self._shape = some.step.shape
        step, qmin, qmax, scale = some.step.new_ones(4, n_slots, *self._shape)
        for slot, quantizer in quantizers.items():
            step[slot], qmin[slot], qmax[slot] = quantizer.step, quantizer.qmin, quantizer.qmax
            n_values = math.prod(quantizer.weight_shape[1:])
            scale[slot] = lsq_gradient_scale(quantizer.qmax, n_values)
        self.step = nn.Parameter(step.reshape(-1, 1))
        self.register_buffer("qmin", qmin.reshape(-1, 1))
        self.register_buffer("qmax", qmax.reshape(-1, 1))
        self.register_buffer("gradient_scale", scale.reshape(-1, 1))

    def forward(self, values: Tensor) -> Tensor:
        """Quantize. # shape: (K * out, ...)."""
        step = positive_step(self.step, self.gradient_scale)
        flat = uniform_through(values.flatten(1), step, self.qmin, self.qmax, n_features=None)
        return flat.view(values.shape)

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write the steps back."""
        step = self.step.view(-1, *self._shape)
        for slot, quantizer in self._quantizers.items():
            quantizer.step.copy_(step[slot])


class UniformInputs(Uniform):
    """LSQ and ASQ for inputs: the step of each slot, times a factor of each sample for ASQ.

    Args:
        quantizers: By slot.
        n_slots: K.
    """

    qmin: Tensor
    qmax: Tensor

    @torch.no_grad()
    def __init__(self, quantizers: Mapping[int, LsqInput | AsqInput], n_slots: int) -> None:
        super().__init__()
        self._quantizers = dict(quantizers)
        some = next(iter(quantizers.values()))
        step, qmin, qmax = some.step.new_ones(3, n_slots)
        for slot, quantizer in quantizers.items():
            step[slot], qmin[slot], qmax[slot] = quantizer.step, quantizer.qmin, quantizer.qmax
        self.step = nn.Parameter(step)
        self.register_buffer("qmin", qmin)
        self.register_buffer("qmax", qmax)
        asq = {slot: q for slot, q in quantizers.items() if isinstance(q, AsqInput)}
        self.factors = Factors(asq) if asq else None

    def forward(self, values: Tensor) -> Tensor:
        """Quantize. # shape: (N, K * C, ...)."""
        n, k = len(values), len(self.step)
        rows = values.reshape(n, k, -1)
        step = positive_step(self.step, lsq_gradient_scale(self.qmax, rows.shape[-1])).expand(n, k)
        if self.factors is not None:
            step = step * self.factors(rows)
        qmin, qmax = (bound.repeat(n).unsqueeze(1) for bound in (self.qmin, self.qmax))
        flat = uniform_through(rows.flatten(0, 1), step.reshape(-1, 1), qmin, qmax, n_features=None)
        return flat.view(values.shape)

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write the steps and the adapters back."""
        for slot, quantizer in self._quantizers.items():
            quantizer.step.copy_(self.step[slot])
        if self.factors is not None:
            self.factors.unstack_()


class Factors(nn.Module):
    """The adapters of ASQ's inputs [Zhou2025, algorithm 1] of some slots, as batched products.

    Args:
        quantizers: By slot.
    """

    learning_rate_factor: ClassVar[float] = AsqInput.learning_rate_factor

    slots: Tensor

    def __init__(self, quantizers: Mapping[int, AsqInput]) -> None:
        super().__init__()
        self._adapters = [q.adapter for q in quantizers.values()]
        self._n_channels = next(iter(quantizers.values())).n_channels
        self.register_buffer("slots", torch.tensor(list(quantizers)), persistent=False)
        self.stacked = nn.ParameterDict(
            {
                name.replace(".", "_"): torch.stack([a.get_parameter(name) for a in self._adapters])
                for name, _ in self._adapters[0].named_parameters()
            }
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return one factor a sample and slot, 1 where a slot has no adapter.

        Args:
            rows: Inputs, # shape: (N, K, F)

        Returns:
            Factors, # shape: (N, K)
        """
        n, k, _ = rows.shape
        p = self.stacked
        # Adapters stay in their own precision.
        with torch.autocast(rows.device.type, enabled=False):
            dtype = p["output_weight"].dtype
            means = rows.view(n, k, self._n_channels, -1).mean(dim=-1, dtype=dtype)
            out = means.index_select(1, self.slots).transpose(0, 1)  # shape: (slots, N, C)
            if "hidden_weight" in p:
                weight = p["hidden_weight"].transpose(1, 2)
                out = F.relu(torch.baddbmm(p["hidden_bias"].unsqueeze(1), out, weight))
            weight = p["output_weight"].transpose(1, 2)
            out = F.relu(torch.baddbmm(p["output_bias"].unsqueeze(1), out, weight))
            found = out.squeeze(-1).clamp(min=SMALLEST_FACTOR)  # shape: (slots, N)
            return found.new_ones(n, k).index_copy(1, self.slots, found.transpose(0, 1))

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write the adapters back."""
        for i, adapter in enumerate(self._adapters):
            for name, parameter in adapter.named_parameters():
                parameter.copy_(self.stacked[name.replace(".", "_")][i])
