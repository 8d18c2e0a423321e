"""The average trace of each layer's Hessian, by Hutchinson's estimator.

Notation:
    z: Rademacher probe, entries +-1; H: Hessian of the summed loss, once in the weights of all
        layers, once in all layer inputs; z_l: the part of z that belongs to layer l.

E[z_l^T (H z)_l] = Tr(H_ll): one product H z serves every layer at once, the other layers add
noise, not bias. Weights and inputs are probed apart, since together the weights' noise drowned the
inputs' traces (three to ten times their error, on the digits network). HAWQ-V2 [Dong2020]_ weighs
the squared quantization error by the average trace Tr/n; the same is done here for layer inputs.

.. [Dong2020] Dong et al. HAWQ-V2: Hessian Aware trace-Weighted Quantization. NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adq_search.errors import SensitivityError
from adq_search.sensitivity._base import (
    Calls,
    Curvature,
    LayerCurvature,
    OnProgress,
    checked_logits,
    n_to_keep,
    summed_loss,
    watched,
    weight_of,
)
from adq_search.sensitivity._registry import register_estimator
from adq_search.tracing import parametric_layers


@register_estimator
@dataclass(frozen=True, slots=True)
class HessianEstimator:
    """Average Hessian traces of weights and layer inputs.

    Probing stops when no layer's running mean moves by more than `tolerance`, as a share of
    itself, and not before `min_probes`.

    Args:
        min_probes: At least this many probes.
        max_probes: At most this many; HAWQ-V2 finds 50 enough for ResNet-50.
        tolerance: Relative change of the running means at which to stop.
        chunk: Examples at once; it changes memory and time, not the result's distribution.
    """

    min_probes: int = 8
    max_probes: int = 50
    tolerance: float = 0.01
    chunk: int = 64

    name: ClassVar[str] = "hessian"

    def curvature(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        seed: int,
        on_progress: OnProgress | None = None,
    ) -> Curvature:
        """Return one average second derivative for each layer's weights, one for its inputs."""
        generator = torch.Generator(device=inputs.device).manual_seed(seed)
        values, keep = _layer_inputs(model, inputs)
        probes: list[dict[str, tuple[float, float]]] = []
        while len(probes) < self.max_probes:
            probes.append(self._probe(model, inputs, targets, generator))
            if on_progress is not None:
                on_progress(len(probes), self.max_probes)
            if len(probes) >= self.min_probes and _largest_change(probes) < self.tolerance:
                break
        if on_progress is not None:
            on_progress(self.max_probes, self.max_probes)
        layers = {}
        for name, seen in values.items():
            weight, weight_error = _mean_and_error(name, "weights", [p[name][0] for p in probes])
            by_input, input_error = _mean_and_error(name, "inputs", [p[name][1] for p in probes])
            layers[name] = LayerCurvature(
                weight=torch.tensor(weight, dtype=torch.float64),
                input=torch.tensor(by_input, dtype=torch.float64),
                values=seen,
                weight_error=weight_error,
                input_error=input_error,
            )
        return Curvature(self.name, layers, keep)

    def _probe(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> dict[str, tuple[float, float]]:
        """Return z^T H z of one probe: per weight of the mean loss, and per input element."""
        layers = parametric_layers(model)
        signs = {name: _rademacher(weight_of(layer), generator) for name, layer in layers.items()}
        by_weight = dict.fromkeys(layers, 0.0)
        by_input = dict.fromkeys(layers, 0.0)
        elements = dict.fromkeys(layers, 0)
        for start in range(0, len(inputs), self.chunk):
            rows = slice(start, start + self.chunk)
            with watched(model) as calls:
                logits = checked_logits(model(inputs[rows]), len(targets[rows]), calls)
                loss = summed_loss(logits, targets[rows])
                products = _products(loss, calls, layers, signs, generator)
            for name, (weight, by_layer_input) in products.items():
                by_weight[name] += weight
                by_input[name] += by_layer_input
                elements[name] += sum(x.numel() for x in calls[name].inputs)
        return {
            name: (
                by_weight[name] / (len(inputs) * weight_of(layers[name]).numel()),
                by_input[name] / elements[name],
            )
            for name in layers
            if elements[name]
        }


def _products(
    loss: Tensor,
    calls: dict[str, Calls],
    layers: dict[str, nn.Module],
    signs: dict[str, Tensor],
    generator: torch.Generator,
) -> dict[str, tuple[float, float]]:
    """Return z_l^T (H z)_l of each layer's weights, and of its inputs, by double backward."""
    weights = [weight_of(layers[name]) for name in calls]
    inputs = [x for c in calls.values() for x in c.inputs]
    gradients = torch.autograd.grad(
        loss, [*weights, *inputs], create_graph=True, materialize_grads=True
    )
    by_weight = _quadratic_forms(
        weights, gradients[: len(weights)], [signs[name] for name in calls]
    )
    by_input = iter(
        _quadratic_forms(
            inputs, gradients[len(weights) :], [_rademacher(x, generator) for x in inputs]
        )
    )
    return {
        name: (weight, sum(next(by_input) for _ in c.inputs))
        for (name, c), weight in zip(calls.items(), by_weight, strict=True)
    }


def _quadratic_forms(
    nodes: list[Tensor], gradients: Sequence[Tensor], probe: list[Tensor]
) -> list[float]:
    """Return z_i^T (H z)_i of each node i, with H among these nodes."""
    directional = torch.stack([(g * z).sum() for g, z in zip(gradients, probe, strict=True)]).sum()
    if not directional.requires_grad:  # linear in the nodes: no second derivative
        return [0.0] * len(nodes)
    products = torch.autograd.grad(directional, nodes, retain_graph=True, materialize_grads=True)
    return [float((h * z).sum(dtype=torch.float64)) for h, z in zip(products, probe, strict=True)]


def _layer_inputs(model: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return what each layer sees, for as many examples as fit, and how many those are."""
    with watched(model) as calls:
        model(inputs[:1])
    keep = n_to_keep(sum(x.numel() for c in calls.values() for x in c.inputs), len(inputs))
    with watched(model) as calls:
        model(inputs[:keep])
    return {name: torch.cat([x.detach() for x in c.inputs]) for name, c in calls.items()}, keep


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    coin = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return coin.to(like.dtype).mul_(2.0).sub_(1.0)


def _largest_change(probes: list[dict[str, tuple[float, float]]]) -> float:
    """Return the largest relative change that the last probe made to a running mean."""
    changes = []
    n = len(probes)
    for name in probes[0]:
        for part in (0, 1):
            total = math.fsum(p[name][part] for p in probes)
            mean, before = total / n, (total - probes[-1][name][part]) / (n - 1)
            changes.append(abs(mean - before) / max(abs(before), 1e-300))
    return max(changes)


def _mean_and_error(layer: str, what: str, samples: list[float]) -> tuple[float, float]:
    """Return the mean of the probes and its standard error.

    A mean below zero within three standard errors is noise about a small curvature: the standard
    error, an upper bound, is taken for it. Further below, the loss is no bowl there.

    Raises:
        SensitivityError: The mean is negative beyond noise.
    """
    n = len(samples)
    mean = math.fsum(samples) / n
    error = math.sqrt(math.fsum((s - mean) ** 2 for s in samples) / (n * (n - 1)))
    if mean >= 0.0 or math.isnan(mean):
        return mean, error
    if mean > -3.0 * error:
        return error, error
    msg = (
        f"The Hessian's average trace must not be negative, but for the {what} of {layer} it is "
        f"{mean:.3g} +- {error:.2g}: the network is not at a minimum. Train it longer, or take the "
        "prior 'fisher'."
    )
    raise SensitivityError(msg)
