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

from adq_search.stacking._layers import StackedConv, StackedLinear, StackedNorm

#: What a layer becomes.
STACKED: Mapping[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: StackedConv,
    nn.Conv2d: StackedConv,
    nn.Linear: StackedLinear,
    _BatchNorm: StackedNorm,
}
_N_SAMPLES = 5


class Stack(nn.Module):
    """K networks as one. Parameters are copies: `unstack_` writes them back.

    Args:
        networks: Of one architecture, each under its own policy. Quantizers that do not run
            together with others are shared with the stack, and train in place.
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
        # Not channels last: the values of each network lie together in each sample.
        out: Tensor = self.body(inputs.contiguous().repeat(repeats))
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


def why_not_stackable(make_network: Callable[[], nn.Module], example: Tensor) -> str | None:
    """Return why networks of an architecture cannot be stacked, None where they can.

    Two networks with different random parameters run on random inputs in training mode, in
    float64, stacked and apart.

    Args:
        make_network: Makes the network.
        example: An input as a batch, # shape: (1, *sample)
    """
    if not example.is_floating_point():
        return f"its inputs are {example.dtype}, not floating point"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        networks = [make_network().double().train() for _ in range(2)]
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        inputs = torch.randn(_N_SAMPLES, *example.shape[1:], dtype=torch.float64)
        try:
            found = Stack(networks)(inputs)
            wanted = torch.stack([network(inputs) for network in networks])
        except Exception as error:  # whatever foreign code raises on channels it did not expect
            return f"its code refuses stacked channels: {' '.join(str(error).split())[:200]}"
    if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-9, atol=1e-9):
        return None
    return (
        "stacked, it returns something else: its code mixes channels or draws random numbers, or a "
        f"layer is none of {', '.join(kind.__name__.strip('_') for kind in STACKED)}"
    )
