"""Test vectors of a package: a few samples, and what the quantized network makes of them.

Written from the trained network itself, they hold the package to it: whoever reads the package, our
loader or a test bench, compares codes and outputs with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adq_search.convert import quantized_layers
from adq_search.export.agreement import Outcome
from adq_search.files import write_atomic
from adq_search.layers import QuantLayer

VECTORS = "vectors.safetensors"
_CODES = ".codes."


@torch.no_grad()
def write_vectors(file: Path, network: nn.Module, inputs: Tensor) -> None:
    """Write inputs, every layer's input codes and the outputs.

    Args:
        file: Replaced whole.
        network: Quantized, in eval mode.
        inputs: # shape: (N, ...)
    """
    codes: dict[str, Tensor] = {}
    n_calls: dict[str, int] = {}

    def look(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, QuantLayer)
        call = n_calls[name] = n_calls.get(name, -1) + 1
        found = layer.input_quantizer.codes(args[0])
        codes[f"{name}{_CODES}{call}"] = found.to(torch.int16).contiguous()

    layers = quantized_layers(network)
    handles = [q.register_forward_pre_hook(partial(look, name)) for name, q in layers.items()]
    try:
        outputs = network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    content = {"inputs": inputs.clone().contiguous(), "outputs": outputs.contiguous(), **codes}
    write_atomic(file, lambda path: save_file(content, path))


def vectors_outcome(tensors: Mapping[str, Tensor]) -> Outcome:
    """Return what the network made of the inputs of a vectors file."""
    codes: dict[str, list[Tensor]] = {}
    places = [(*key.rpartition(_CODES)[::2], key) for key in tensors if _CODES in key]
    for layer, _, key in sorted(places, key=lambda place: (place[0], int(place[1]))):
        codes.setdefault(layer, []).append(tensors[key].long())
    return Outcome(codes, tensors["outputs"])
