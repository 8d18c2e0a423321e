"""From curvature and quantization error to scores.

Notation:
    C, e: curvature and error, as in `_base`; one score is 1/2 <C, e^2>.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adq_search.errors import SensitivityError
from adq_search.sensitivity._base import Scores, input_key, weight_key
from adq_search.sensitivity._fitted import FittedLayer


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """Curvature of the loss around one layer.

    Attributes:
        weight: C^w, a shape that broadcasts to the weight's.
        input: C^x, a shape that broadcasts to that of `values`.
        values: What the layer saw, shape (rows, *sample); a layer that is called twice for an
            example has two rows for it.
        weight_error: Standard error of `weight` where it was sampled, else 0.
        input_error: Standard error of `input` likewise.
    """

    weight: Tensor
    input: Tensor
    values: Tensor
    weight_error: float = 0.0
    input_error: float = 0.0


@dataclass(frozen=True, eq=False)
class Curvature:
    """What an estimator found out about a network.

    Attributes:
        estimator: Name of the estimator.
        layers: By layer name.
        n_kept: Examples whose layer inputs are kept: the n of the mean over inputs.
    """

    estimator: str
    layers: dict[str, LayerCurvature]
    n_kept: int


@torch.no_grad()
def curvature_scores(
    curvature: Curvature, fitted: dict[str, FittedLayer], *, share: float = 1.0
) -> Scores:
    """Return the score of every choice of every layer.

    Args:
        curvature: Around the layers, with the inputs they saw.
        fitted: Their quantizers.
        share: Factor of all scores.

    Raises:
        SensitivityError: A layer has no curvature.
    """
    scores: Scores = {}
    for name, layer in fitted.items():
        if name not in curvature.layers:
            msg = f"No curvature was measured for {name}. Measure the whole network again."
            raise SensitivityError(msg)
        around = curvature.layers[name]
        for quantizer, bits in layer.weights:
            error = layer.weight_error(quantizer, bits).square()
            scores[weight_key(name, quantizer, bits)] = 0.5 * share * _sum(around.weight, error)
        for quantizer, bits in layer.inputs:
            error = layer.input_error(quantizer, bits, around.values).square()
            found = 0.5 * share * _sum(around.input, error) / curvature.n_kept
            scores[input_key(name, quantizer, bits)] = found
    return scores


def _sum(curvature: Tensor, squared_error: Tensor) -> float:
    return float((curvature.to(squared_error.device) * squared_error).sum(dtype=torch.float64))
