"""The diagonal of the Fisher information, exact per example.

Notation:
    z_n: logits of example n; p_nc: its softmax; q_nc: weight of class c as its label.
    g_ncj = dL_n/dw_j where the label is c: (dz_n/dw_j)^T (p_n - e_c).
    F_jj = (1/N) sum_n sum_c q_nc g_ncj^2.

The square stands inside the mean: the square of the batch's mean gradient is another, smaller
number. With q = p this is the Fisher information proper, equal to the diagonal of the Gauss-Newton
matrix. With q one at the label of the data it is the empirical Fisher, which vanishes where the
network has fitted its training set (methods.md, sections 1.2h and 4), so the first is the default.
Drawing labels from p has the right mean, but for a network that is sure of itself all of it comes
from a few unlikely draws; where classes are few, the sum over c is done instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from adq_search.sensitivity._base import Scores, SensitivityEstimator, Subject
from adq_search.sensitivity._curvature import Curvature, LayerCurvature, curvature_scores
from adq_search.sensitivity._labels import MODEL_LABELS, Labels
from adq_search.sensitivity._registry import register_estimator
from adq_search.sensitivity._watching import (
    Calls,
    checked_logits,
    n_to_keep,
    watched,
    weight_of,
)
from adq_search.tracing import parametric_layers

#: Elements of the largest layer's per-example gradients held at once.
_CHUNK_ELEMENTS = 2**25


@register_estimator
@dataclass(frozen=True, slots=True)
class FisherEstimator(SensitivityEstimator):
    """Mean squared per-example gradients of weights and layer inputs.

    Args:
        labels: Where labels come from.
        chunk: Examples at once; None chooses by the largest layer.
        n_folds: Parts of the examples whose spread gives the standard error.
    """

    labels: Labels = MODEL_LABELS
    chunk: int | None = None
    n_folds: int = 4

    name: ClassVar[str] = "fisher"

    def n_samples(self, subject: Subject) -> int:
        return subject.folds(self.n_folds)

    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        n_folds = self.n_samples(subject)
        rows = subject.fold(index, n_folds)
        seed = subject.seed + index
        around = self.curvature(
            subject.model, subject.inputs[rows], subject.targets[rows], seed=seed
        )
        return curvature_scores(around, subject.fitted, share=subject.share(index, n_folds))

    def curvature(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, *, seed: int
    ) -> Curvature:
        """Return F for weights and the squared per-example gradient for inputs."""
        layers = parametric_layers(model)
        largest = max(weight_of(layer).numel() for layer in layers.values())
        chunk = self.chunk or max(1, min(64, _CHUNK_ELEMENTS // largest))
        generator = torch.Generator(device=inputs.device).manual_seed(seed)
        squares = {name: torch.zeros_like(weight_of(layer)) for name, layer in layers.items()}
        values: dict[str, list[Tensor]] = {}
        gradients: dict[str, list[Tensor]] = {}
        n, kept, keep = len(inputs), 0, len(inputs)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            labels = targets[rows]
            with watched(model) as calls:
                logits = checked_logits(model(inputs[rows]), len(labels), calls)
                pulls = self.labels.pulls(logits.detach(), labels, generator)
                found = [_gradients(logits, pull, calls) for pull in pulls]
            if start == 0:
                elements = sum(x.numel() for c in calls.values() for x in c.inputs)
                keep = n_to_keep(elements // len(labels), n)
            room = max(0, keep - kept)
            for name, call in calls.items():
                seen = [x.detach() for x in call.inputs]
                by_output = [torch.stack(g) for g in zip(*(f[name][1] for f in found), strict=True)]
                squares[name] += _squared_weight_gradients(layers[name], seen, by_output)
                values.setdefault(name, []).extend(x[:room] for x in seen)
                of_calls = zip(*(by_label[name][0] for by_label in found), strict=True)
                gradients.setdefault(name, []).extend(
                    torch.stack([g[:room].square() for g in gs]).sum(dim=0) for gs in of_calls
                )
            kept = min(keep, kept + len(labels))
        found_layers = {
            name: LayerCurvature(
                weight=squares[name] / n,
                input=torch.cat(gradients[name]),
                values=torch.cat(values[name]),
            )
            for name in values
        }
        return Curvature(self.name, found_layers, kept)


def _gradients(
    logits: Tensor, pull: Tensor, calls: dict[str, Calls]
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Return pull^T dz/d(input) and pull^T dz/d(output) of each layer, as lists of (n, ...)."""
    nodes = [t for c in calls.values() for t in (*c.inputs, *c.outputs)]
    found = torch.autograd.grad(logits, nodes, pull, retain_graph=True, materialize_grads=True)
    flat = iter(found)
    return {
        name: ([next(flat) for _ in c.inputs], [next(flat) for _ in c.outputs])
        for name, c in calls.items()
    }


def _squared_weight_gradients(
    layer: nn.Module, seen: list[Tensor], by_output: list[Tensor]
) -> Tensor:
    """Return sum_c sum_n g_cn^2; shape of the weight.

    A layer that is called several times has one gradient: the sum over its calls.

    Args:
        layer: A parametric layer.
        seen: Its input at each call, # shape: (n, *sample)
        by_output: Gradients of its output at each call, # shape: (labels, n, *output)
    """

    def weight_gradient(seen: list[Tensor], by_output: list[Tensor]) -> Tensor:
        def outputs(weight: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                functional_call(layer, {"weight": weight}, (x.unsqueeze(0),)).squeeze(0)
                for x in seen
            )

        _, pull_back, *_ = vjp(outputs, weight_of(layer).detach())
        gradient: Tensor = pull_back(tuple(by_output))[0]
        return gradient

    each = vmap(vmap(weight_gradient), in_dims=(None, 0))
    total = torch.zeros_like(weight_of(layer))
    n_at_once = max(1, _CHUNK_ELEMENTS // (len(seen[0]) * total.numel()))
    for start in range(0, len(by_output[0]), n_at_once):
        some = [g[start : start + n_at_once] for g in by_output]
        total += each(seen, some).square().sum(dim=(0, 1))  # shape: (labels, n, *weight.shape)
    return total.detach()
