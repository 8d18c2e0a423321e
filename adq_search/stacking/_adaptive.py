r"""ASQ for inputs of some slots: steps of each sample, found by their adapters.

Notation:
    s_a = s \\beta  step of one sample
    S   slots of the group
    N   samples
    C   channels of one network

References:
    [Zhou2025] arXiv 2504.17263, Eqs. 4-9 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.quantizers import Adapter, AsqInput, _native
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._through import (
    lsq_gradient_scale,
    positive_step,
    uniform_inputs_through,
)
from adq_search.quantizers.asq import SMALLEST_FACTOR
from adq_search.stacking._groups import Group
from adq_search.stacking._native import Places, run


class Adapters(nn.Module):
    """Adapters of one width, as one.

    Args:
        adapters: Of S slots.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self._adapters = list(adapters)
        for name, _ in adapters[0].named_parameters():
            own = torch.stack([adapter.get_parameter(name).detach() for adapter in adapters])
            self.register_parameter(name.replace(".", "_"), nn.Parameter(own))
        self.is_deep = adapters[0].hidden is not None

    def forward(self, means: Tensor) -> Tensor:
        """Return the factors, # shape: (S, N).

        Args:
            means: Channel means, # shape: (S, N, C)
        """
        with torch.autocast(means.device.type, enabled=False):
            inner = self._layer("hidden", means) if self.is_deep else means
            out = self._layer("output", inner)
        return out.squeeze(-1).clamp(min=SMALLEST_FACTOR)

    def _layer(self, name: str, values: Tensor) -> Tensor:
        weight, bias = (self.get_parameter(f"{name}_{kind}") for kind in ("weight", "bias"))
        return F.relu(torch.baddbmm(bias.unsqueeze(1), values, weight.mT))

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write the adapters back."""
        for i, adapter in enumerate(self._adapters):
            for name, parameter in adapter.named_parameters():
                parameter.copy_(self.get_parameter(name.replace(".", "_"))[i])


class AsqGroup(Group[AsqInput]):
    """ASQ: a step a slot, times a factor of each sample."""

    qmin: Tensor
    qmax: Tensor

    def __init__(self, quantizers: Mapping[int, AsqInput]) -> None:
        super().__init__(quantizers)
        self.step = nn.Parameter(self._stack("step"))
        self.register_buffer("qmin", self._stack("qmin"))
        self.register_buffer("qmax", self._stack("qmax"))
        self.adapters = Adapters([q.adapter for q in self.quantizers])

    def apart(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Quantize the values of each slot."""
        n = pieces[0][0].numel()
        means = [q.channel_means(p) for q, p in zip(self.quantizers, pieces, strict=True)]
        beta = self.adapters(torch.stack(means).to(self.step.dtype))
        step = positive_step(self.step, lsq_gradient_scale(self.qmax, n)).unsqueeze(1) * beta
        shape = (-1, *(1 for _ in pieces[0].shape[1:]))
        own = zip(pieces, step.unbind(), self.qmin, self.qmax, strict=True)
        return [
            uniform_inputs_through(p, s.view(shape), *codes, n_features=None)
            for p, s, *codes in own
        ]

    @torch.no_grad()
    def forward_into(self, out: Tensor, values: Tensor, at: Places) -> tuple[Tensor, ...]:
        """Quantize in C++."""
        n_slots, n_channels = len(self.slots), self.quantizers[0].n_channels
        means = torch.empty(n_slots, at.rows, n_channels)
        run("means", values, at, n_channels, means)
        step, *adapter = self.trained()
        s_a, beta, *activations = _native.adapted_steps(means, step, EPS, adapter, SMALLEST_FACTOR)
        run("uniform", values, at, s_a, 1, at.rows, 0.0, self.qmin, self.qmax, out)
        return (s_a, step, *adapter, beta, means, *activations)

    def backward_into(
        self, gradient: Tensor, values: Tensor, upstream: Tensor, at: Places, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        """Write the gradient to the values; return those to the steps and the adapters."""
        s_a, step, *adapter, beta, means, inner, outputs = kept
        to_steps = torch.empty_like(s_a)
        grid = (s_a, 1, at.rows, 0.0, self.qmin, self.qmax, 0.0)
        run("uniform_backward", values, at, upstream, *grid, gradient, to_steps)
        to_means, to_step, to_adapters = _native.adapted_steps_backward(
            *(to_steps, step, EPS, self.qmax, at.columns, adapter, SMALLEST_FACTOR),
            *(beta, means, inner, outputs),
        )
        # The second gradient that inputs receive: through their channel means.
        run("means_backward", gradient, at, means.shape[-1], to_means)
        return to_step, *to_adapters

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write the steps and the adapters back."""
        super().unstack_()
        self.adapters.unstack_()
