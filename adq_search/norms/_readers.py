"""What reads the output of a network's batch norms, found in a trace of torch.fx."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from adq_search.layers import QuantLayer
from adq_search.quantizers import InputQuantizer
from adq_search.tracing import is_parametric

Range = tuple[float, float]
EVERYTHING: Range = (-math.inf, math.inf)
#: Modules that only clip, with the range they let through.
RANGES: Mapping[type[nn.Module], Range] = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}


@dataclass(frozen=True, slots=True)
class Reader:
    """What comes between a batch norm and whatever else reads what it computes.

    Args:
        passes: Range of the clipping modules that alone read the norm; everything without one.
        quantizer: The input quantizer that alone reads what they let through, or the norm itself.
    """

    passes: Range = EVERYTHING
    quantizer: InputQuantizer | None = None


def find_readers(network: nn.Module) -> dict[nn.Module, Reader]:
    """Return the readers of batch norms of two dimensions, and of clipping modules without a norm.

    The quantizer of a clipping module is that of the first layer that reads it; others may read it
    too. A module that is called several times has the same reader after each call, or none. What
    hooks watch is left alone.

    Args:
        network: Traced by torch.fx; of a network that cannot be, no reader is known.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception:  # whatever the user's forward raises
        return {}
    modules = dict(network.named_modules(remove_duplicate=False))
    found: dict[nn.Module, set[Reader]] = {}
    behind_norms: set[fx.Node] = set()
    for node in graph.nodes:
        module = _called(node, modules)
        if module is None or module._forward_hooks:
            continue
        if type(module) is nn.BatchNorm2d:
            reader = _reader_of(node, modules)
            found.setdefault(module, set()).add(reader)
            behind_norms.update(node.users if reader.passes != EVERYTHING else ())
        elif type(module) in RANGES and node not in behind_norms:
            quantizers = [_quantizer_of(_called(user, modules)) for user in node.users]
            known = next((quantizer for quantizer in quantizers if quantizer is not None), None)
            found.setdefault(module, set()).add(Reader(RANGES[type(module)], known))
    return {module: next(iter(all_of)) for module, all_of in found.items() if len(all_of) == 1}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_parametric(m) or super().is_leaf_module(m, module_qualified_name)


def _reader_of(norm: fx.Node, modules: Mapping[str, nn.Module]) -> Reader:
    clips = [_called(user, modules) for user in norm.users]
    ranges = {None if module is None else RANGES.get(type(module)) for module in clips}
    passes = next(iter(ranges)) if len(ranges) == 1 else None
    if passes is None:
        return Reader(quantizer=_only_quantizer([norm], modules))
    is_watched = any(module is not None and module._forward_hooks for module in clips)
    return Reader(passes, None if is_watched else _only_quantizer(list(norm.users), modules))


def _only_quantizer(
    nodes: list[fx.Node], modules: Mapping[str, nn.Module]
) -> InputQuantizer | None:
    """Return the input quantizer of the one layer that reads these nodes, if it is one."""
    layers = {_called(user, modules) for node in nodes for user in node.users}
    return _quantizer_of(next(iter(layers))) if len(layers) == 1 else None


def _quantizer_of(layer: nn.Module | None) -> InputQuantizer | None:
    """Return the input quantizer of a quantized layer, if no hook watches it."""
    if not isinstance(layer, QuantLayer) or layer._forward_pre_hooks:
        return None
    quantizer = layer.input_quantizer
    return None if quantizer.is_watched else quantizer


def _called(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None
