"""Layers of K networks as one layer: channels of the networks stand one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from adq_search.convolution import convolve
from adq_search.layers import QuantLayer
from adq_search.stacking._quantizers import stack_input_quantizers, stack_weight_quantizers


class StackedLayer(nn.Module):
    """What layers with weights have in common.

    Args:
        layers: The same layer of K networks, each quantized or not.
    """

    def __init__(self, layers: Sequence[nn.Conv1d | nn.Conv2d | nn.Linear]) -> None:
        super().__init__()
        self._layers = list(layers)  # a plain list: its modules are not ours
        self.n_slots = len(layers)
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))
        self.bias: nn.Parameter | None = None
        if layers[0].bias is not None:
            biases = [cast("Tensor", layer.bias).detach() for layer in layers]
            self.bias = nn.Parameter(torch.cat(biases))
        quantized = [layer if isinstance(layer, QuantLayer) else None for layer in layers]
        self.weights = stack_weight_quantizers(
            [None if layer is None else layer.weight_quantizer for layer in quantized]
        )
        self.inputs = stack_input_quantizers(
            [None if layer is None else layer.input_quantizer for layer in quantized]
        )

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write what was trained back into the layers."""
        self.weights.unstack_()
        self.inputs.unstack_()
        pieces = self.weight.chunk(self.n_slots)
        for layer, piece in zip(self._layers, pieces, strict=True):
            layer.weight.copy_(piece)
        if self.bias is not None:
            for layer, piece in zip(self._layers, self.bias.chunk(self.n_slots), strict=True):
                cast("Tensor", layer.bias).copy_(piece)


class StackedConv(StackedLayer):
    """A convolution of K networks, as one with K times the groups."""

    _convolve: Callable[..., Tensor]

    def __init__(self, layers: Sequence[nn.Conv1d | nn.Conv2d]) -> None:
        super().__init__(layers)
        one = layers[0]
        self._convolve = convolve if isinstance(one, nn.Conv2d) else F.conv1d
        self._geometry = (one.stride, one.padding, one.dilation, one.groups * self.n_slots)

    def forward(self, values: Tensor) -> Tensor:
        """Convolve. # shape: (N, K * in, ...) to (N, K * out, ...)."""
        weight = self.weights(self.weight)
        return self._convolve(self.inputs(values), weight, self.bias, *self._geometry)


class StackedLinear(StackedLayer):
    """A linear layer of K networks, as one batched product."""

    def forward(self, values: Tensor) -> Tensor:
        """Multiply. # shape: (N, K * in) to (N, K * out)."""
        inputs = self.inputs(values).view(len(values), self.n_slots, -1).transpose(0, 1)
        weight = self.weights(self.weight).view(self.n_slots, -1, inputs.shape[-1])
        out = torch.bmm(inputs, weight.transpose(1, 2)).transpose(0, 1).reshape(len(values), -1)
        return out if self.bias is None else out + self.bias


class StackedNorm(nn.Module):
    """A batch norm of K networks: one with K times the channels.

    Args:
        layers: The same batch norm of K networks.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        super().__init__()
        self._layers = list(layers)
        one = layers[0]
        self.norm = type(one)(
            one.num_features * len(layers),
            eps=one.eps,
            momentum=one.momentum,
            affine=one.affine,
            track_running_stats=one.track_running_stats,
        )
        some = next(iter(one.state_dict().values()), torch.empty(()))
        self.norm.to(device=some.device, dtype=some.dtype)
        with torch.no_grad():
            for name, own in self.norm.state_dict().items():
                values = [layer.state_dict()[name] for layer in layers]
                own.copy_(torch.cat(values) if own.ndim else values[0])

    def forward(self, values: Tensor) -> Tensor:
        """Normalise. # shape: (N, K * C, ...)."""
        out: Tensor = self.norm(values)
        return out

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write parameters and running statistics back."""
        for name, own in self.norm.state_dict().items():
            n = len(self._layers)
            pieces = own.chunk(n) if own.ndim else (own,) * n
            for layer, piece in zip(self._layers, pieces, strict=True):
                layer.state_dict()[name].copy_(piece)
