"""What a network computes: its parametric layers, their shapes and multiply-accumulates (MACs).

One real forward with hooks; nothing is demanded of the network's source. Whatever the hooks cannot
account for is named in `Coverage.unknown`, found by a second witness: torch's own count of
floating-point operations (two for each MAC), taken module by module.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import activation, batchnorm, dropout, instancenorm, padding, pooling
from torch.utils.flop_counter import FlopCounterMode

from adq_search.errors import TaskError

#: The layers that a policy gives a precision; exact types, since a subclass may compute otherwise.
PARAMETRIC: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
}

#: Free by design: batch norms fold into the layer before them, the rest does no MACs.
FREE: tuple[type[nn.Module], ...] = (
    *(batchnorm._NormBase, instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.LocalResponseNorm, dropout._DropoutNd, nn.Identity, nn.Flatten, nn.Unflatten),
    *(pooling._AvgPoolNd, pooling._MaxPoolNd, pooling._AdaptiveAvgPoolNd),
    *(pooling._AdaptiveMaxPoolNd, pooling._LPPoolNd, nn.Upsample, nn.PixelShuffle),
    *(padding._ConstantPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd),
    *(getattr(activation, n) for n in activation.__all__ if n != "MultiheadAttention"),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict),
)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One parametric layer as it ran.

    Args:
        name: Dotted module name, such as `layer1.0.conv1`.
        kind: `conv1d`, `conv2d` or `linear`.
        weight_shape: `(out, in / groups, *kernel)`, or `(out, in)`.
        groups: Groups of a convolution, 1 for a linear layer.
        input_shape: Of one sample, at the first call, without the batch dimension.
        output_shape: Of one sample, at the first call.
        macs: Multiply-accumulates for one sample, summed over all calls.
        n_weights: Elements of the weight.
        n_bias: Elements of the bias, 0 without one.
        n_later_inputs: Elements read by the calls after the first; 0 for a layer called once.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    groups: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    n_weights: int
    n_bias: int
    n_later_inputs: int = 0

    @property
    def n_inputs(self) -> int:
        """Elements of one sample's input, at one call."""
        return math.prod(self.input_shape)

    @property
    def n_outputs(self) -> int:
        """Elements of one sample's output, at one call."""
        return math.prod(self.output_shape)

    @property
    def n_input_reads(self) -> int:
        """Input elements for one sample, summed over all calls."""
        return self.n_inputs + self.n_later_inputs

    @property
    def n_output_writes(self) -> int:
        """Output elements for one sample, summed over all calls."""
        return self.macs // self.fan_in

    @property
    def fan_in(self) -> int:
        """MACs for each output element."""
        return math.prod(self.weight_shape[1:])

    @property
    def out_channels(self) -> int:
        """Output channels or features."""
        return self.weight_shape[0]

    @property
    def in_channels(self) -> int:
        """Input channels or features, of all groups together."""
        return self.weight_shape[1] * self.groups


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which modules the MAC count accounts for.

    Args:
        counted: Layers whose MACs are counted.
        free: Modules that do none, by design.
        unknown: `name (Class: why)` for each module whose work or parameters are not accounted for.
    """

    counted: tuple[str, ...]
    free: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The parametric layers of a network in execution order, and what was left out.

    Args:
        layers: Those that ran.
        coverage: Which modules the figures account for.
        idle: Parametric layers that never ran, such as heads used in training alone; a policy
            names them too and leaves them in floating point.
    """

    layers: tuple[LayerInfo, ...]
    coverage: Coverage
    idle: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers that ran, in execution order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every layer that a policy names: those that ran, then the idle ones."""
        return (*self.names, *self.idle)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(layer.macs for layer in self.layers)

    @property
    def n_weights(self) -> int:
        """Weights of all layers, without biases."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the structure: names, kinds and shapes, not the weights."""
        content = [
            (i.name, i.kind, i.weight_shape, i.groups, i.input_shape, i.output_shape, i.n_bias)
            for i in self.layers
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def __getitem__(self, name: str) -> LayerInfo:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[LayerInfo]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def is_parametric(module: nn.Module) -> bool:
    """Whether a policy gives this module a precision."""
    return type(module) in PARAMETRIC or bool(getattr(module, "is_quantized", False))


def parametric_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that a policy may name, in order of definition.

    Exact `Conv1d`, `Conv2d` and `Linear`, or what they are once quantized; not the layers inside a
    quantizer. A layer shared under several names appears under its first.
    """
    return {name: module for name, module in _outer_modules(model) if is_parametric(module)}


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> ModelSummary:
    """Run the network once on one sample and return what its layers compute.

    The forward runs in evaluation mode without gradients; every module's mode is restored.

    Args:
        model: Any network; its forward is called as `model(example)` or `model(*example)`.
        example: Input with a leading batch dimension, on the network's device. Only the first
            sample is used.

    Raises:
        TaskError: The network does not run on the example, or has no parametric layer that runs.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    witness = _Witness()
    with evaluation_mode(model), _plain_attention(), torch.no_grad(), ExitStack() as hooks:
        for name, module in _outer_modules(model):
            hooks.enter_context(module.register_forward_pre_hook(partial(_enter, witness)))
            leave = partial(_leave, witness, name)
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        try:
            with witness.counter:
                model(*(t[:1] if t.dim() else t for t in inputs))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
            msg = (
                f"The network must run on its example, but with inputs of shape {shapes} it "
                f"stops: {error}. Give the shape that its forward takes, batch first."
            )
            raise TaskError(msg) from error
    coverage = _coverage(model, witness)
    if not witness.layers:
        found = f": {'; '.join(coverage.unknown)}" if coverage.unknown else ""
        msg = (
            "A network needs at least one Conv1d, Conv2d or Linear layer that runs, but this "
            f"{type(model).__name__} has none{found}. Give another network."
        )
        raise TaskError(msg)
    idle = tuple(name for name in parametric_layers(model) if name not in witness.layers)
    return ModelSummary(tuple(witness.layers.values()), coverage, idle)


@dataclass(slots=True)
class _Witness:
    """What the hooks saw."""

    counter: FlopCounterMode = field(default_factory=partial(FlopCounterMode, display=False))
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    #: Operations at entry, and those of finished children, for each module now running.
    stack: list[list[int]] = field(default_factory=list)
    own_macs: dict[str, int] = field(default_factory=dict)


def _enter(witness: _Witness, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
    witness.stack.append([witness.counter.get_total_flops(), 0])


def _leave(
    witness: _Witness,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    at_entry, of_children = witness.stack.pop()
    inclusive = witness.counter.get_total_flops() - at_entry
    if witness.stack:
        witness.stack[-1][1] += inclusive
    witness.called.add(name)
    witness.own_macs[name] = witness.own_macs.get(name, 0) + (inclusive - of_children) // 2
    if is_parametric(module):
        _record(witness.layers, name, module, args[0] if args else kwargs["input"], output)


def _record(
    layers: dict[str, LayerInfo], name: str, module: nn.Module, values: Tensor, output: Tensor
) -> None:
    weight = module.weight
    bias = module.bias
    assert isinstance(weight, Tensor)
    kind = next(k for t, k in PARAMETRIC.items() if isinstance(module, t))
    macs = output.numel() * math.prod(weight.shape[1:])
    before = layers.get(name)
    layers[name] = LayerInfo(
        name=name,
        kind=kind,
        weight_shape=tuple(weight.shape),
        groups=int(getattr(module, "groups", 1)),
        input_shape=before.input_shape if before else _one_sample(values, weight),
        output_shape=before.output_shape if before else _one_sample(output, weight),
        macs=macs + (before.macs if before else 0),
        n_weights=weight.numel(),
        n_bias=bias.numel() if isinstance(bias, Tensor) else 0,
        n_later_inputs=before.n_later_inputs + values.numel() if before else 0,
    )


def _one_sample(values: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Drop the batch dimension, unless the network folded something else into it."""
    is_batched = values.dim() >= weight.dim() and values.shape[0] == 1
    return tuple(values.shape[1:] if is_batched else values.shape)


def _coverage(model: nn.Module, witness: _Witness) -> Coverage:
    free: list[str] = []
    unknown: list[str] = []
    for name, module in _outer_modules(model):
        if name in witness.layers:
            continue
        reason = _why_unknown(name, module, witness)
        is_leaf = next(module.children(), None) is None
        if reason:
            unknown.append(f"{name or '(network)'} ({type(module).__name__}: {reason})")
        elif is_leaf:
            free.append(name)
    for name, layer in witness.layers.items():
        module = model.get_submodule(name)
        seen = witness.own_macs[name]
        if type(module) in PARAMETRIC and seen != layer.macs:
            unknown.append(
                f"{name} ({type(module).__name__}: {layer.macs} MACs by its shape, but torch "
                f"counts {seen})"
            )
    return Coverage(tuple(witness.layers), tuple(free), tuple(unknown))


def _why_unknown(name: str, module: nn.Module, witness: _Witness) -> str | None:
    macs = witness.own_macs.get(name, 0)
    work = f", {macs} MACs" if macs else ""
    parent = next((t for t in PARAMETRIC if isinstance(module, t)), None)
    if parent is not None and is_parametric(module):
        return "never called in the forward"
    if parent is not None:
        return f"a subclass of {parent.__name__} may compute otherwise, so it is not counted{work}"
    if macs:
        return f"{macs} MACs of its own that no layer accounts for"
    own = [n for n, _ in module.named_parameters(recurse=False)]
    if own and not isinstance(module, FREE):
        never = "" if name in witness.called else ", never called in the forward"
        return f"own parameters that no layer accounts for: {', '.join(own)}{never}"
    return None


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, but nothing inside a parametric layer."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if is_parametric(module):
            inside = (*inside, f"{name}." if name else "")
        yield name, module


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and each of its modules back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep out the fused attention kernels, which hide their matrix products from the counter."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
