"""The Fisher information in output space: what an error does once it went through its layer.

Notation:
    Y_n: output of one layer for example n; dY_n: what quantizing the layer adds to it.
    g_nco = dL_n/dY_no where the label is c; q_nc: weight of that label, as in `_labels`.
    S = 1/2 mean_n sum_o (sum_c q_nc g_nco^2) dY_no^2

The error keeps its direction through the layer, where the Fisher information in weight space takes
every weight's error for independent; the outputs alone are taken for independent. BRECQ [Li2021]_
(section 3.2, Eq. 10) minimises this form, ModelOpt scores by it without the half.

.. [Li2021] Li et al. BRECQ: Pushing the Limit of Post-Training Quantization by Block
   Reconstruction. ICLR 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from adq_search.sensitivity._base import (
    ScoreKey,
    Scores,
    SensitivityEstimator,
    Subject,
    both_key,
    input_key,
    weight_key,
)
from adq_search.sensitivity._fitted import FittedLayer, Kind
from adq_search.sensitivity._labels import MODEL_LABELS, Labels
from adq_search.sensitivity._registry import register_estimator
from adq_search.sensitivity._watching import Calls, checked_logits, watched, weight_of


@register_estimator
@dataclass(frozen=True, slots=True)
class FisherOutputEstimator(SensitivityEstimator):
    """Squared per-example gradients of layer outputs times the squared change of those outputs.

    Args:
        labels: Where labels come from.
        joint: Also measure weights and input quantized together, for every scheme and its bits;
            else the two scores are added, which leaves out how their errors meet.
        n_folds: Parts of the examples whose spread gives the standard error.
        chunk: Examples at once.
    """

    labels: Labels = MODEL_LABELS
    joint: bool = False
    n_folds: int = 4
    chunk: int = 64

    name: ClassVar[str] = "fisher_output"

    def n_samples(self, subject: Subject) -> int:
        return subject.folds(self.n_folds)

    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        n_folds = self.n_samples(subject)
        fold = subject.fold(index, n_folds)
        inputs, targets = subject.inputs[fold], subject.targets[fold]
        generator = torch.Generator(inputs.device).manual_seed(subject.seed + index)
        scores: Scores = {}
        for start in range(0, len(inputs), self.chunk):
            rows = slice(start, start + self.chunk)
            with watched(subject.model) as calls:
                logits = checked_logits(subject.model(inputs[rows]), len(targets[rows]), calls)
                pulls = self.labels.pulls(logits.detach(), targets[rows], generator)
                curvature = _curvature(logits, pulls, calls)
            for name, layer in subject.fitted.items():
                for key, of_weight, of_input in self._choices(subject, name):
                    rise = _rise(layer, calls[name], curvature[name], of_weight, of_input)
                    scores[key] = scores.get(key, 0.0) + rise
        scale = subject.share(index, n_folds) / len(inputs)
        return {key: scale * score for key, score in scores.items()}

    def _choices(
        self, subject: Subject, name: str
    ) -> list[tuple[ScoreKey, Kind | None, Kind | None]]:
        layer = subject.fitted[name]
        return [
            *((weight_key(name, *kind), kind, None) for kind in layer.weights),
            *((input_key(name, *kind), None, kind) for kind in layer.inputs),
            *(
                (both_key(name, choice), *kinds)
                for choice, kinds in (subject.choices_of(name) if self.joint else {}).items()
            ),
        ]


def _curvature(
    logits: Tensor, pulls: list[Tensor], calls: dict[str, Calls]
) -> dict[str, list[Tensor]]:
    """Return sum_c q_c g_co^2 for each layer and call, # shape: that of the output."""
    nodes = [y for c in calls.values() for y in c.outputs]
    squares = [torch.zeros_like(y) for y in nodes]
    for pull in pulls:
        found = torch.autograd.grad(logits, nodes, pull, retain_graph=True, materialize_grads=True)
        for square, gradient in zip(squares, found, strict=True):
            square += gradient.square()
    flat = iter(squares)
    return {name: [next(flat) for _ in c.outputs] for name, c in calls.items()}


@torch.no_grad()
def _rise(
    layer: FittedLayer,
    calls: Calls,
    curvature: list[Tensor],
    of_weight: Kind | None,
    of_input: Kind | None,
) -> float:
    """Return 1/2 sum_no C_no dY_no^2 of one layer with some of it quantized."""
    weight = weight_of(layer.layer)
    if of_weight is not None:
        weight = layer.weights[of_weight](weight)
    total = 0.0
    for x, y, c in zip(calls.inputs, calls.outputs, curvature, strict=True):
        seen = x if of_input is None else layer.inputs[of_input](x)
        change = functional_call(layer.layer, {"weight": weight}, (seen,)) - y
        total += 0.5 * float((c * change.square()).sum(dtype=torch.float64))
    return total
