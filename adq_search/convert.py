"""Put a policy on a network and take it off again; look after what only quantized networks need.

`apply_policy_` exchanges the class of each layer that the policy quantizes, in place; the network
keeps its structure, its parameters and its code. Nothing is traced.

Example:
    >>> import torch
    >>> from adq_search.policy import LayerPrecision, Policy
    >>> network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> w4a4 = LayerPrecision(weight_bits=4, input_bits=4, scheme="lsq")
    >>> network = apply_policy_(network, Policy.of({"0": w4a4}), torch.randn(8, 4))
    >>> sorted(quantized_layers(network))
    ['0']
    >>> restore_(network)
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
    )
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adq_search.errors import AdqSearchError, PolicyError, QuantizerError, TaskError
from adq_search.layers import QuantLayer, to_float_, to_quantized_
from adq_search.policy import Policy
from adq_search.quantizers import (
    InputQuantizer,
    QuantizerHealth,
    WeightQuantizer,
    check_options,
    check_precision,
    make_quantizers,
)
from adq_search.tracing import evaluation_mode, parametric_layers

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """Health of one layer's two quantizers."""

    weight: QuantizerHealth
    input: QuantizerHealth


@dataclass(frozen=True, slots=True)
class HealthRecord:
    """What may be wrong with the quantizers of a network: totals, then layer by layer.

    Args:
        n_steps: Trained steps that must be positive, in all quantizers.
        wrong_sign_steps: How many are not.
        n_levels: Levels of all quantizers.
        dead_levels: Levels that no weight or no input of the batch reaches.
        max_saturated: Largest share of values beyond the range of one quantizer, 0 to 1.
        layers: Health by layer name; a layer that the batch does not reach is missing.
    """

    n_steps: int
    wrong_sign_steps: int
    n_levels: int
    dead_levels: int
    max_saturated: float
    layers: dict[str, LayerHealth]


def check_policy_fits(policy: Policy, names: Sequence[str]) -> None:
    """Check that a policy says something valid about exactly these layers.

    Args:
        policy: Any policy.
        names: The network's parametric layers.

    Raises:
        PolicyError: Layers differ, a scheme is unknown, or a momentum or option is wrong.
    """
    difference = policy.difference(names)
    if difference:
        msg = (
            f"The policy does not fit the network: {difference}. Use the network that the policy "
            "was made for, or name exactly its layers ('float' leaves one as it is)."
        )
        raise PolicyError(msg)
    for name, precision in policy:
        check_precision(name, precision)
    for quantizer, options in policy.options:
        with _saying("Options of the policy: ", PolicyError):
            check_options(quantizer, dict(options))


def apply_policy_(model: nn.Module, policy: Policy, calibration: Inputs | None = None) -> nn.Module:
    """Quantize a network as a policy says, in place.

    Weight quantizers are fitted to the weights at once; input quantizers to what their layer sees
    first in one forward of the *float* network on the calibration batch (evaluation mode, without
    gradients; no activation is kept). After an error the network is as it was.

    Args:
        model: A float network; the class of its layers is exchanged, parameters stay the same
            objects.
        policy: Precision of every parametric layer.
        calibration: A batch for `model(batch)`, or a tuple for `model(*batch)`. Without one the
            network runs only after a state dict was loaded.

    Returns:
        The same `model`.

    Raises:
        PolicyError: The policy does not fit the network, the network is quantized already, or
            the calibration batch does not reach a layer.
        QuantizerError: A layer's weights or inputs are not finite.
    """
    layers = parametric_layers(model)
    if quantized_layers(model):
        msg = "A policy is applied to a float network, but this one is quantized. `restore_` it."
        raise PolicyError(msg)
    check_policy_fits(policy, tuple(layers))
    chosen = {name: p for name, p in policy if not p.is_float}
    made: dict[str, tuple[WeightQuantizer, InputQuantizer]] = {}
    for name, precision in chosen.items():
        made[name] = make_quantizers(precision, layers[name], policy.options_of)
        weight = layers[name].get_parameter("weight")
        with _saying(f"Weights of layer '{name}': ", QuantizerError):
            made[name][0].initialize_(weight)
    if calibration is not None:
        _calibrate(model, {n: (layers[n], pair[1]) for n, pair in made.items()}, calibration)
    for name, (weight_quantizer, input_quantizer) in made.items():
        to_quantized_(layers[name], weight_quantizer, input_quantizer)
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Turn every quantized layer back into the float one it was, in place.

    Returns:
        The same `model`, with the weights it has now; quantizers are dropped.
    """
    for layer in quantized_layers(model).values():
        to_float_(layer)
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers by name, in order of definition."""
    layers = parametric_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, QuantLayer)}


@torch.no_grad()
def measure_health(model: nn.Module, batch: Inputs) -> HealthRecord:
    """Measure every quantizer on the weights and on what its layer sees first in one forward.

    Args:
        model: A quantized network; it runs in evaluation mode, and its mode is restored.
        batch: A batch for `model(batch)`, or a tuple for `model(*batch)`.
    """
    seen: dict[str, QuantizerHealth] = {}

    def look(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name not in seen and isinstance(layer, QuantLayer):
            seen[name] = layer.input_quantizer.health(args[0])

    layers = quantized_layers(model)
    with evaluation_mode(model), _watching(layers, look):
        _run(model, batch)
    record = {
        name: LayerHealth(
            weight=layer.weight_quantizer.health(layer.get_parameter("weight")), input=seen[name]
        )
        for name, layer in layers.items()
        if name in seen
    }
    every = [health for pair in record.values() for health in (pair.weight, pair.input)]
    return HealthRecord(
        n_steps=sum(h.n_steps for h in every),
        wrong_sign_steps=sum(h.wrong_sign_steps for h in every),
        n_levels=sum(h.n_levels for h in every),
        dead_levels=sum(h.dead_levels for h in every),
        max_saturated=max((h.saturated for h in every), default=0.0),
        layers=record,
    )


@torch.no_grad()
def reestimate_batch_norm_(model: nn.Module, batches: Iterable[Inputs]) -> None:
    """Replace the running statistics of batch norms by plain averages over batches.

    Only batch norms run in training mode, so codebooks and everything else stay; modes and
    momenta are restored. A network without batch norms is left alone.

    Args:
        model: Any network.
        batches: Batches for `model(batch)`, or tuples for `model(*batch)`.

    Raises:
        TaskError: There are no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        msg = "Batch-norm re-estimation needs at least one batch, but there is none. Give some."
        raise TaskError(msg)
    momenta = [norm.momentum for norm in norms]
    with evaluation_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's cumulative average
                norm.training = True
            for batch in chain([first], rest):
                _run(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@torch.no_grad()
def _calibrate(
    model: nn.Module, chosen: Mapping[str, tuple[nn.Module, InputQuantizer]], batch: Inputs
) -> None:
    def fit(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
        quantizer = chosen[name][1]
        if not quantizer.is_initialized:
            with _saying(f"Inputs of layer '{name}': ", QuantizerError):
                quantizer.initialize_(args[0])

    layers = {name: layer for name, (layer, _) in chosen.items()}
    with evaluation_mode(model), _watching(layers, fit):
        _run(model, batch)
    unreached = [name for name, (_, q) in chosen.items() if not q.is_initialized]
    if unreached:
        msg = (
            f"The calibration batch does not reach: {', '.join(unreached)}. Leave these layers in "
            "'float', or give a batch on which the network uses them."
        )
        raise PolicyError(msg)


@contextmanager
def _saying(place: str, kind: type[AdqSearchError]) -> Iterator[None]:
    """Put the place in front of an error's text."""
    try:
        yield
    except QuantizerError as error:
        msg = f"{place}{error}"
        raise kind(msg) from error


@contextmanager
def _watching(layers: Mapping[str, nn.Module], look: Any) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, batch: Inputs) -> None:
    if isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
