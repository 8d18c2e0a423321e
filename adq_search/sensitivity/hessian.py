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
    Estimate,
    Part,
    ScoreKey,
    Scores,
    SensitivityEstimator,
    Subject,
    mean_and_error,
)
from adq_search.sensitivity._curvature import Curvature, LayerCurvature, curvature_scores
from adq_search.sensitivity._registry import register_estimator
from adq_search.sensitivity._watching import (
    Calls,
    checked_logits,
    layer_inputs,
    summed_loss,
    watched,
    weight_of,
)
from adq_search.tracing import parametric_layers

_PARTS: tuple[Part, ...] = ("weights", "inputs")
#: Keeps the probes of one seed from those of the next.
_PRIME = 1_000_003


@register_estimator
@dataclass(frozen=True, slots=True)
class HessianEstimator(SensitivityEstimator):
    """Average Hessian traces of weights and layer inputs.

    The standard error is that of the probes; the choice of examples is not in it. Probing stops
    when no layer's running mean moves by more than `tolerance`, as a share of itself, and not
    before `min_probes`.

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

    @property
    def min_samples(self) -> int:
        return self.min_probes

    def n_samples(self, subject: Subject) -> int:
        return self.max_probes

    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        """Return the average trace that one probe finds, for each layer's weights and inputs."""
        device = subject.inputs.device
        generator = torch.Generator(device).manual_seed(_PRIME * subject.seed + index)
        found = self._probe(subject.model, subject.inputs, subject.targets, generator)
        return {
            _trace_key(name, of): trace
            for name, traces in found.items()
            for of, trace in zip(_PARTS, traces, strict=True)
        }

    def is_settled(self, samples: Sequence[Scores]) -> bool:
        return _largest_change(samples) < self.tolerance

    def combine(self, subject: Subject, samples: Sequence[Scores]) -> dict[ScoreKey, Estimate]:
        """Return half the average trace times the squared quantization error.

        Raises:
            SensitivityError: A trace is negative beyond noise.
        """
        traces = self.traces(samples)
        values, n_kept = layer_inputs(subject.model, subject.inputs)
        layers = {}
        for name, seen in values.items():
            by_weight, by_input = (traces[_trace_key(name, part)].value for part in _PARTS)
            layers[name] = LayerCurvature(torch.tensor(by_weight), torch.tensor(by_input), seen)
        scores = curvature_scores(Curvature(self.name, layers, n_kept), subject.fitted)
        found = {}
        for key, score in scores.items():
            trace, error = traces[_trace_key(key.layer, key.part)]
            found[key] = Estimate(score, score * error / trace if trace else 0.0)
        return found

    def traces(self, samples: Sequence[Scores]) -> dict[ScoreKey, Estimate]:
        """Return the mean of the probes and its standard error, for each layer and part.

        A mean below zero within three standard errors is noise about a small curvature: the
        standard error, an upper bound, is taken for it. Further below, the loss is no bowl there.

        Raises:
            SensitivityError: A mean is negative beyond noise.
        """
        found = {}
        for key in samples[0]:
            mean, error = mean_and_error([s[key] for s in samples])
            if mean < -3.0 * error:
                msg = (
                    f"The Hessian's average trace must not be negative, but for the {key.part} of "
                    f"{key.layer} it is {mean:.3g} +- {error:.2g}: the network is not at a "
                    "minimum. Train it longer, or take the prior 'fisher'."
                )
                raise SensitivityError(msg)
            found[key] = Estimate(error if mean < 0.0 else mean, error)
        return found

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


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    coin = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return coin.to(like.dtype).mul_(2.0).sub_(1.0)


def _largest_change(probes: Sequence[Scores]) -> float:
    """Return the largest relative change that the last probe made to a running mean."""
    changes = []
    n = len(probes)
    for key in probes[0]:
        total = math.fsum(p[key] for p in probes)
        mean, before = total / n, (total - probes[-1][key]) / (n - 1)
        changes.append(abs(mean - before) / max(abs(before), 1e-300))
    return max(changes)


def _trace_key(layer: str, part: Part) -> ScoreKey:
    return ScoreKey(layer, part, "", 0, 0)
