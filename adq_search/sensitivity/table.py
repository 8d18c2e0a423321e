"""From curvature to the loss increase that each precision of each layer is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adq_search.errors import SensitivityError
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import Quantizer, make_quantizers, resolve_scheme
from adq_search.sensitivity._base import (
    Curvature,
    LayerCurvature,
    OnProgress,
    SensitivityEstimator,
    weight_of,
)
from adq_search.sensitivity._registry import make_estimator
from adq_search.space import SearchSpace
from adq_search.tracing import parametric_layers

#: (layer, quantizer, bits)
Key = tuple[str, str, int]


@dataclass(frozen=True)
class SensitivityTable:
    """Predicted increase of the loss, in nats, of quantizing one layer's weights or inputs.

    Attributes:
        estimator: Where the curvature comes from.
        weights: By (layer, weight quantizer, bits).
        inputs: By (layer, input quantizer, bits).
        relative_error: By layer, the standard error of its curvatures as a share of them, the
            larger of the two; 0 where nothing was sampled.
    """

    estimator: str
    weights: Mapping[Key, float]
    inputs: Mapping[Key, float]
    relative_error: Mapping[str, float]

    def score(self, layer: str, precision: LayerPrecision) -> float:
        """Return the predicted loss increase of one layer at one precision; 0 in float.

        Raises:
            SensitivityError: That layer or precision was not measured.
        """
        if precision.is_float:
            return 0.0
        pair = resolve_scheme(precision.scheme)
        weight = (layer, pair.weight, precision.weight_bits)
        by_input = (layer, pair.input, precision.input_bits)
        try:
            return self.weights[weight] + self.inputs[by_input]  # type: ignore[index]
        except KeyError:
            msg = (
                f"No sensitivity was measured for {layer} at {precision}. Measure it with a space "
                "that holds this precision."
            )
            raise SensitivityError(msg) from None

    def predict(self, policy: Policy) -> float:
        """Return the predicted loss increase of a policy: the sum over its layers, in nats."""
        return math.fsum(self.score(layer, precision) for layer, precision in policy)

    def to_json(self) -> dict[str, Any]:
        """Return the table as rows of plain values."""
        return {
            "estimator": self.estimator,
            "weights": _rows(self.weights),
            "inputs": _rows(self.inputs),
            "relative_error": dict(self.relative_error),
        }


def sensitivity_table(
    source: str | SensitivityEstimator | Curvature,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    space: SearchSpace,
    *,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> SensitivityTable:
    """Predict what each precision of the space costs in loss, layer by layer.

    The quantization error is that of the real quantizers, initialised on the weights and on the
    layer inputs that were seen. Scores are made non-increasing in bits, for each layer and
    quantizer, by a running minimum from few bits to many: more bits never predict more loss.

    Args:
        source: Name of an estimator, an estimator, or a curvature measured before.
        model: The float network; left as it was.
        inputs: Training samples, shape (n, *sample).
        targets: Their classes, shape (n,).
        space: Which precisions to score; pinned ones are scored too.
        seed: Of labels, probes and adapters.
        on_progress: Called with steps done and steps in all.

    Raises:
        SensitivityError: A score is NaN, infinite or negative; the text names the layer.
    """
    layers = parametric_layers(model)
    for name in space.names:
        if not torch.isfinite(weight_of(layers[name])).all():
            msg = f"The weights of {name} are not all finite numbers. Train the network again."
            raise SensitivityError(msg)
    choices = {n: p for group in space.groups for n in group.layers for p in [group.choices]}
    curvature = _curvature(source, model, inputs, targets, seed, on_progress, len(choices))
    weights: dict[Key, float] = {}
    by_input: dict[Key, float] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)  # the adapters of ASQ start at random
        for i, (name, precisions) in enumerate(choices.items(), start=1):
            found = _layer_scores(name, layers[name], precisions, curvature, space)
            weights |= found[0]
            by_input |= found[1]
            if on_progress is not None:
                on_progress(_ESTIMATING + i, _ESTIMATING + len(choices))
    errors = {name: _relative_error(curvature.layers[name]) for name in choices}
    return SensitivityTable(curvature.estimator, weights, by_input, errors)


#: Steps of progress given to the estimator; each layer's scores are one step more.
_ESTIMATING = 100


def _curvature(
    source: str | SensitivityEstimator | Curvature,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    seed: int,
    on_progress: OnProgress | None,
    n_layers: int,
) -> Curvature:
    if isinstance(source, Curvature):
        return source
    estimator = make_estimator(source) if isinstance(source, str) else source

    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(_ESTIMATING * done // total, _ESTIMATING + n_layers)

    return estimator.curvature(model, inputs, targets, seed=seed, on_progress=tell)


def _layer_scores(
    name: str,
    layer: nn.Module,
    precisions: Iterable[LayerPrecision],
    curvature: Curvature,
    space: SearchSpace,
) -> tuple[dict[Key, float], dict[Key, float]]:
    """Return the scores of one layer's weights and of its inputs."""
    if name not in curvature.layers:
        msg = f"No curvature was measured for {name}. Measure the whole network again."
        raise SensitivityError(msg)
    around = curvature.layers[name]
    weight = weight_of(layer).detach()
    weights: dict[Key, float] = {}
    by_input: dict[Key, float] = {}
    for precision in precisions:
        if precision.weight_bits is None or precision.input_bits is None:
            continue
        pair = resolve_scheme(precision.scheme)
        weight_key = (name, pair.weight, precision.weight_bits)
        input_key = (name, pair.input, precision.input_bits)
        if weight_key in weights and input_key in by_input:
            continue
        weight_quantizer, input_quantizer = make_quantizers(precision, layer, space.options_of)
        if weight_key not in weights:
            error = _squared_error(weight_quantizer, weight)
            weights[weight_key] = 0.5 * _weighted(around.weight, error)
        if input_key not in by_input:
            error = _squared_error(input_quantizer, around.values)
            by_input[input_key] = 0.5 * _weighted(around.input, error) / curvature.n_kept
    return _clean(weights, "weights"), _clean(by_input, "inputs")


def _squared_error(quantizer: Quantizer, values: Tensor) -> Tensor:
    quantizer.initialize_(values)
    quantizer.eval()
    error: Tensor = quantizer(values) - values
    return error.square()


def _weighted(curvature: Tensor, squared_error: Tensor) -> float:
    return float((curvature.to(squared_error.device) * squared_error).sum(dtype=torch.float64))


def _clean(scores: dict[Key, float], what: str) -> dict[Key, float]:
    """Return the scores as a running minimum from few bits to many.

    Raises:
        SensitivityError: A score is NaN, infinite or negative.
    """
    out: dict[Key, float] = {}
    lowest: dict[str, float] = {}
    for (layer, quantizer, bits), score in sorted(scores.items()):
        if not math.isfinite(score) or score < 0.0:
            msg = (
                f"A sensitivity is a finite number and not negative, but for the {what} of {layer} "
                f"({quantizer}, {bits} bits) it is {score}. Look for NaN in the network's weights "
                "and data, or search without a prior (`prior: null`)."
            )
            raise SensitivityError(msg)
        lowest[quantizer] = min(score, lowest.get(quantizer, math.inf))
        out[layer, quantizer, bits] = lowest[quantizer]
    return out


def _relative_error(layer: LayerCurvature) -> float:
    pairs = ((layer.weight, layer.weight_error), (layer.input, layer.input_error))
    return max(error / float(mean) if error else 0.0 for mean, error in pairs)


def _rows(scores: Mapping[Key, float]) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "quantizer": quantizer, "bits": bits, "loss_increase": score}
        for (layer, quantizer, bits), score in scores.items()
    ]
