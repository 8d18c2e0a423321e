"""How images lie in memory while a network runs on them.

Convolutions of oneDNN and cuDNN want the channels of a pixel side by side ("channels last"). In
torch's own order, channel by channel, each call copies its input and its output into that order and
back: a step of float training took 1.2 times as long on `digits` and 1.3 times on `mnist5k`. What
the network makes of its input keeps the layout of that input, and so one conversion does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adq_search.convolution import is_unsound
from adq_search.tracing import evaluation_mode


@torch.no_grad()
def fast_layout(network: nn.Module, example: Tensor) -> torch.memory_format:
    """Return the layout that batches should have: channels last where that runs.

    Args:
        network: Runs once, in evaluation mode. A network that asks for one layout, as `view` does
            after a convolution, gets what it asks for; so does one with a float convolution whose
            gradients oneDNN takes wrongly in the other (`adq_search.convolution`).
        example: An input as a batch, # shape: (1, *sample)

    Returns:
        For `Tensor.to(memory_format=...)`.
    """
    if example.ndim != 4 or any(_is_unsound(module) for module in network.modules()):
        return torch.preserve_format
    with evaluation_mode(network):
        try:
            network(example.to(memory_format=torch.channels_last))
        except RuntimeError:  # torch's "view size is not compatible with input tensor's size"
            return torch.preserve_format
    return torch.channels_last


def _is_unsound(module: nn.Module) -> bool:
    # By the class itself: our quantized layers, which inherit from it, go around what is unsound.
    if type(module) is not nn.Conv2d:
        return False
    padding = module.padding if module.padding_mode == "zeros" else (0, 0)
    geometry = (module.stride, padding, module.dilation, module.groups)
    return is_unsound(module.weight, *geometry)
