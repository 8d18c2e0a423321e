"""K networks of one architecture as one network that runs and trains them all.

Activations of the K networks stand one after the other along the channels: convolutions get K
times the groups, batch norms K times the channels, linear layers become batched products. What
acts on each channel alone (activations, pooling, sums of branches, flattening) stays as it is.
Code that mixes channels (concatenation, padding of channels) would mix networks:
`why_not_stackable` finds that by running the stack against its networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from adq_search.stacking._layers import StackedConv, StackedLinear, StackedNorm

#: What a layer becomes.
STACKED: Mapping[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: StackedConv,
    nn.Conv2d: StackedConv,
    nn.Linear: StackedLinear,
    _BatchNorm: StackedNorm,
}
_RELATIVE, _ABSOLUTE = 1e-9, 1e-9  # float64


class Stack(nn.Module):
    """K networks as one. Parameters are copies: `unstack_` writes them back.

    Args:
        networks: Of one architecture, each float or quantized by its own policy; float quantizers
            that run alone are shared with the stack and train in place.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.n_slots = len(networks)
        self.body = copy.deepcopy(networks[0])
        _replace_(self.body, networks)
        self.train(networks[0].training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run all networks on the same inputs.

        Args:
            inputs: # shape: (N, C, ...)

        Returns:
            Logits, # shape: (K, N, classes)
        """
        repeats = (1, self.n_slots, *(1 for _ in inputs.shape[2:]))
        out: Tensor = self.body(inputs.repeat(repeats))
        return out.view(len(inputs), self.n_slots, -1).transpose(0, 1)

    def unstack_(self) -> None:
        """Write weights, quantizers and running statistics back into the networks."""
        for module in self.body.modules():
            if isinstance(module, StackedConv | StackedLinear | StackedNorm):
                module.unstack_()


def _replace_(body: nn.Module, networks: Sequence[nn.Module]) -> None:
    """Put stacked layers in the place of layers with parameters, and leave all else."""
    for name, module in list(body.named_children()):
        own = [network.get_submodule(name) for network in networks]
        kind = next((s for plain, s in STACKED.items() if isinstance(module, plain)), None)
        if kind is None:
            _replace_(module, own)
        else:
            setattr(body, name, kind(own))


def why_not_stackable(make: Sequence[nn.Module], inputs: Tensor) -> str | None:
    """Return why networks of this architecture cannot be stacked, None where they can."""
    return None
