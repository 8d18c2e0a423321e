"""The network's graph, read by torch.fx without running user code twice, and what its nodes are."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from adq_search.errors import IntegerError
from adq_search.integer.steps import Window
from adq_search.layers import QuantLayer
from adq_search.norms import RANGES, Range

#: Modules that only clip, or do nothing in evaluation, with the range they let through.
CLIPPING: Mapping[type[nn.Module], Range] = {
    **RANGES,
    nn.Identity: (-math.inf, math.inf),
    nn.Dropout: (-math.inf, math.inf),
    nn.Dropout2d: (-math.inf, math.inf),
}
#: Functions and methods likewise.
CLIPPING_CALLS: Mapping[Any, Range] = {
    F.relu: (0.0, math.inf),
    torch.relu: (0.0, math.inf),
    F.relu6: (0.0, 6.0),
    "relu": (0.0, math.inf),
    "relu_": (0.0, math.inf),
    "contiguous": (-math.inf, math.inf),
}
NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)
ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
INPLACE: frozenset[Any] = frozenset({operator.iadd, "add_", "relu_"})
FLATTENINGS: frozenset[Any] = frozenset({torch.flatten, "flatten"})
MEANS: frozenset[Any] = frozenset({torch.mean, "mean"})


@dataclass(frozen=True)
class NetworkGraph:
    """The nodes of a network, with modules and shapes.

    Args:
        nodes: In order of execution.
        modules: By dotted name.
        shapes: Of the result of each node that has one, on the example.
    """

    nodes: tuple[fx.Node, ...]
    modules: Mapping[str, nn.Module]
    shapes: Mapping[fx.Node, tuple[int, ...]]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that the node calls, None where it calls none."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def clip_of(self, node: fx.Node) -> Range | None:
        """Return the range that a clipping node lets through, None for other nodes."""
        module = self.module_of(node)
        if module is not None:
            return CLIPPING.get(type(module))
        return CLIPPING_CALLS.get(node.target) if node.op != "placeholder" else None

    @property
    def largest_sample(self) -> int:
        """Values that the largest tensor holds of one sample."""
        return max(math.prod(shape[1:]) for shape in self.shapes.values())

    def spoils_input(self, node: fx.Node) -> bool:
        """Whether a node overwrites its first input while others still read it."""
        module = self.module_of(node)
        is_inplace = node.target in INPLACE or bool(node.kwargs.get("inplace"))
        if not (is_inplace or getattr(module, "inplace", False)):
            return False
        order = {n: i for i, n in enumerate(self.nodes)}
        return any(order[user] > order[node] for user in node.all_input_nodes[0].users)

    def keeps_samples(self, node: fx.Node) -> bool:
        """Whether a node leaves the samples of the batch apart."""
        source = node.all_input_nodes[0]
        return node in self.shapes and self.shapes[node][0] == self.shapes[source][0]

    def only_user(self, node: fx.Node) -> fx.Node | None:
        """Return the one node that reads this one, None where there are several or none."""
        users = list(node.users)
        return users[0] if len(users) == 1 else None

    def place(self, node: fx.Node) -> str:
        """Name a node as the user knows it."""
        module = self.module_of(node)
        if module is not None:
            return f"Module '{node.target}' ({type(module).__name__})"
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inside = f" in module '{stack[-1][0]}'" if stack else ""
        what = node.target if isinstance(node.target, str) else node.target.__name__
        return f"The call of '{what}'{inside}"


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantLayer) or super().is_leaf_module(m, module_qualified_name)


def read_graph(network: nn.Module, example: Tensor) -> NetworkGraph:
    """Read a network's graph.

    Args:
        network: In evaluation mode.
        example: A batch it runs on.

    Raises:
        IntegerError: The network's forward depends on its data, or does not run.
    """
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
        traced.graph.eliminate_dead_code()
        ShapeProp(traced).propagate(example)
    except Exception as error:  # whatever the user's forward raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        msg = (
            f"An integer network needs a forward that torch.fx can trace, but that of "
            f"{type(network).__name__} stops: {first} Write it without branches on tensors."
        )
        raise IntegerError(msg) from error
    graph = traced.graph
    shapes = {
        node: tuple(node.meta["tensor_meta"].shape)
        for node in graph.nodes
        if isinstance(node.meta.get("tensor_meta"), fx.passes.shape_prop.TensorMetadata)
    }
    return NetworkGraph(tuple(graph.nodes), dict(network.named_modules()), shapes)


def moving_function(node: fx.Node, module: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """Return a function that does what the node does, where that only moves integers."""
    if isinstance(module, nn.Flatten | nn.MaxPool1d | nn.MaxPool2d | nn.ZeroPad2d):
        return module
    arguments: tuple[Any, ...] = node.args[1:]
    keywords: dict[str, Any] = dict(node.kwargs)
    has_nodes = len(node.all_input_nodes) != 1
    if has_nodes or not arguments or node.op not in ("call_function", "call_method"):
        return None
    target: Any = node.target
    if target in FLATTENINGS:
        return lambda values: torch.flatten(values, *arguments, **keywords)
    if target is operator.getitem:
        index: Any = arguments[0]
        keeps_batch = isinstance(index, tuple) and index[0] == slice(None)
        return (lambda values: values[index]) if keeps_batch else None
    is_zero_pad = target is F.pad and {*arguments[1:2], keywords.get("mode", "constant")} == {
        "constant"
    }
    fill = keywords.get("value") or (arguments[2] if len(arguments) > 2 else 0)
    if is_zero_pad and not fill:
        return lambda values: F.pad(values, arguments[0])
    return None


@dataclass(frozen=True, slots=True)
class MeanWindow:
    """What a mean pooling averages.

    Args:
        size: Values of one mean.
        window: The windows; None for one over all positions.
        keeps_dimensions: Whether pooled dimensions stay, of size 1.
    """

    size: int
    window: Window | None
    keeps_dimensions: bool = True


def mean_window(
    node: fx.Node, module: nn.Module | None, shapes: Mapping[fx.Node, tuple[int, ...]]
) -> MeanWindow | None:
    """Return what a node averages, None where it is no mean over positions."""
    if len(node.all_input_nodes) != 1:
        return None
    shape = shapes[node.all_input_nodes[0]]
    over_all = math.prod(shape[2:])
    arguments = {**dict(zip(("dim", "keepdim"), node.args[1:], strict=False)), **node.kwargs}
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        arguments = {"output_size": module.output_size}
    elif node.target in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d):
        arguments = {"output_size": node.args[1]}
    elif isinstance(module, nn.AvgPool2d):
        n_spatial = len(shape) - 2
        size, stride, padding = (
            _per_dimension(v, n_spatial)
            for v in (module.kernel_size, module.stride, module.padding)
        )
        is_plain = module.count_include_pad and not module.ceil_mode
        is_plain = is_plain and module.divisor_override is None
        return MeanWindow(math.prod(size), (size, stride, padding)) if is_plain else None
    elif node.target not in MEANS:
        return None
    if "output_size" in arguments:
        ones = _per_dimension(arguments["output_size"], len(shape) - 2)
        return MeanWindow(over_all, None) if set(ones) == {1} else None
    dims = arguments.get("dim")
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    given = {d % len(shape) for d in dims if isinstance(d, int)}
    if given != set(range(2, len(shape))) or not given:
        return None
    return MeanWindow(over_all, None, keeps_dimensions=bool(arguments.get("keepdim", False)))


def _per_dimension(value: Any, n: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * n
