"""What each precision of each layer is predicted to cost in loss, clean enough for a solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adq_search.errors import SensitivityError
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import resolve_scheme
from adq_search.sensitivity._base import Estimate, ScoreKey, SensitivityEstimator, Subject
from adq_search.sensitivity._curvature import Curvature, curvature_scores
from adq_search.sensitivity._fitted import check_weights, fit_choices
from adq_search.sensitivity._ledger import open_ledger
from adq_search.sensitivity._registry import make_estimator
from adq_search.sensitivity._work import Effort, OnEta, OnProgress, take_samples
from adq_search.space import SearchSpace

#: (layer, quantizer, bits)
Key = tuple[str, str, int]
#: (layer, scheme, weight bits, input bits)
BothKey = tuple[str, str, int, int]

_NOTHING = Estimate(0.0, 0.0)


@dataclass(frozen=True)
class SensitivityTable:
    """Predicted increase of the loss, in nats, of quantizing one layer.

    Args:
        estimator: Who predicts.
        weights: Of quantizing the weights alone, by (layer, weight quantizer, bits).
        inputs: Of quantizing the input alone, by (layer, input quantizer, bits).
        weight_errors: Standard errors of `weights`; NaN where one sample alone was taken, absent
            where nothing was sampled.
        input_errors: Those of `inputs`.
        both: Of quantizing both, by (layer, scheme, weight bits, input bits), where that was
            measured; elsewhere the two are added.
        both_errors: Standard errors of `both`.

    Raises:
        SensitivityError: A score is NaN, infinite or negative; the text names the layer.
    """

    estimator: str
    weights: Mapping[Key, float]
    inputs: Mapping[Key, float]
    weight_errors: Mapping[Key, float] = field(default_factory=dict)
    input_errors: Mapping[Key, float] = field(default_factory=dict)
    both: Mapping[BothKey, float] = field(default_factory=dict)
    both_errors: Mapping[BothKey, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, scores in (("weights", self.weights), ("inputs", self.inputs)):
            for (layer, quantizer, bits), score in scores.items():
                _check_score(layer, part, f"{quantizer}, {bits} bits", score)
        for (layer, scheme, weight_bits, input_bits), score in self.both.items():
            _check_score(layer, "both parts", f"W{weight_bits}A{input_bits} {scheme}", score)

    def parts(self, layer: str, precision: LayerPrecision) -> tuple[Estimate, Estimate, Estimate]:
        """Return the loss increase of a layer's weights, of its input, and of both together.

        Zeros in float. Where both were not measured, they are added.

        Raises:
            SensitivityError: That layer or precision was not measured.
        """
        if precision.is_float:
            return (_NOTHING,) * 3
        together, weight, by_input = _keys(layer, precision)
        try:
            alone = (
                Estimate(self.weights[weight], self.weight_errors.get(weight, 0.0)),
                Estimate(self.inputs[by_input], self.input_errors.get(by_input, 0.0)),
            )
        except KeyError:
            msg = (
                f"No sensitivity was measured for {layer} at {precision}. Measure it with a space "
                "that holds this precision."
            )
            raise SensitivityError(msg) from None
        if together in self.both:
            return (*alone, Estimate(self.both[together], self.both_errors.get(together, 0.0)))
        (a, error_a), (b, error_b) = alone
        return (*alone, Estimate(a + b, math.hypot(error_a, error_b)))

    def score(self, layer: str, precision: LayerPrecision) -> float:
        """Return the predicted loss increase of one layer at one precision; 0 in float.

        Raises:
            SensitivityError: That layer or precision was not measured.
        """
        return self.parts(layer, precision)[2].value

    def standard_error(self, layer: str, precision: LayerPrecision) -> float:
        """Return the standard error of `score`; 0 where nothing was sampled.

        Raises:
            SensitivityError: That layer or precision was not measured.
        """
        return self.parts(layer, precision)[2].error

    def predict(self, policy: Policy) -> float:
        """Return the predicted loss increase of a policy: the sum over its layers, in nats."""
        return math.fsum(self.score(layer, precision) for layer, precision in policy)

    def to_json(self) -> dict[str, Any]:
        """Return the table as rows of plain values; an unknown standard error is null."""
        return {
            "estimator": self.estimator,
            "weights": _rows(self.weights, self.weight_errors),
            "inputs": _rows(self.inputs, self.input_errors),
            "both": [
                {
                    "layer": layer,
                    "scheme": scheme,
                    "weight_bits": weight_bits,
                    "input_bits": input_bits,
                    "loss_increase": score,
                    "standard_error": _finite(
                        self.both_errors.get((layer, scheme, weight_bits, input_bits), 0.0)
                    ),
                }
                for (layer, scheme, weight_bits, input_bits), score in self.both.items()
            ],
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
    on_eta: OnEta | None = None,
    budget_s: float | None = None,
    file: Path | None = None,
) -> SensitivityTable:
    """Predict what each precision of the space costs in loss, layer by layer.

    The quantization error is that of the real quantizers, initialised on the weights and on the
    layer inputs that were seen. Scores are made non-increasing in bits, for each layer and
    quantizer, by a running minimum from few bits to many: more bits never predict more loss. A
    lowered score takes the standard error of the one it was lowered to.

    Args:
        source: Name of an estimator, an estimator, or a curvature measured before.
        model: The float network; left as it was.
        inputs: Training samples, shape (n, *sample).
        targets: Their classes, shape (n,).
        space: Which precisions to score; pinned ones are scored too.
        seed: Of labels, probes and adapters.
        on_progress: Called with pieces of work done and pieces in all.
        on_eta: Called once, after the first piece, with the seconds left.
        budget_s: Seconds after which no new sample begins.
        file: Where finished pieces are kept, so that an interrupted estimate goes on and a
            finished one is read back; None for nowhere.

    Raises:
        SensitivityError: A score is NaN, infinite or negative; the text names the layer. Or the
            least number of samples would not fit the budget.
        StorageError: The file belongs to another network, data set, space, seed or version.
    """
    check_weights(model, space.names)
    if isinstance(source, Curvature):
        values = {name: layer.values for name, layer in source.layers.items()}
        scores = curvature_scores(source, fit_choices(model, space, values, seed=seed))
        return _clean(source.estimator, {key: Estimate(v, 0.0) for key, v in scores.items()})
    estimator = make_estimator(source) if isinstance(source, str) else source
    subject = Subject(model, inputs, targets, space, seed)
    with open_ledger(file, estimator, subject) as ledger:
        samples = take_samples(estimator, subject, ledger, Effort(budget_s, on_progress, on_eta))
    return _clean(estimator.name, estimator.combine(subject, samples))


def _clean(name: str, found: Mapping[ScoreKey, Estimate]) -> SensitivityTable:
    """Return the table of running minima.

    Raises:
        SensitivityError: A score is NaN, infinite or negative.
    """
    for key, (value, _) in found.items():
        _check_score(key.layer, key.part, _choice(key), value)
    values: dict[str, dict[Any, float]] = {"weights": {}, "inputs": {}, "both": {}}
    errors: dict[str, dict[Any, float]] = {"weights": {}, "inputs": {}, "both": {}}
    series: dict[tuple[str, str, str], list[ScoreKey]] = {}
    for key in found:
        series.setdefault(key[:3], []).append(key)
    for keys in series.values():
        for key in sorted(keys, key=lambda k: k[3:]):
            fewer = [k for k in keys if k[3] <= key[3] and k[4] <= key[4]]
            value, error = min((found[k] for k in fewer), key=lambda e: e.value)
            short = (key.layer, key.quantizer, *(b for b in key[3:] if b))
            values[key.part][short] = value
            errors[key.part][short] = error
    return SensitivityTable(
        name,
        values["weights"],
        values["inputs"],
        errors["weights"],
        errors["inputs"],
        values["both"],
        errors["both"],
    )


def _check_score(layer: str, part: str, choice: str, score: float) -> None:
    """Refuse a score that would break a solver.

    Raises:
        SensitivityError: It is NaN, infinite or negative.
    """
    if not math.isfinite(score) or score < 0.0:
        msg = (
            f"A sensitivity is a finite number and not negative, but for the {part} of {layer} "
            f"({choice}) it is {score}. Look for NaN in the network's weights and data, or search "
            "without a prior (`prior: null`)."
        )
        raise SensitivityError(msg)


def _choice(key: ScoreKey) -> str:
    if key.part == "both":
        return f"W{key.weight_bits}A{key.input_bits} {key.quantizer}"
    return f"{key.quantizer}, {key.weight_bits or key.input_bits} bits"


def _keys(layer: str, precision: LayerPrecision) -> tuple[BothKey, Key, Key]:
    pair = resolve_scheme(precision.scheme)
    weight_bits, input_bits = precision.weight_bits or 0, precision.input_bits or 0
    return (
        (layer, precision.scheme, weight_bits, input_bits),
        (layer, pair.weight, weight_bits),
        (layer, pair.input, input_bits),
    )


def _rows(scores: Mapping[Key, float], errors: Mapping[Key, float]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "quantizer": quantizer,
            "bits": bits,
            "loss_increase": score,
            "standard_error": _finite(errors.get((layer, quantizer, bits), 0.0)),
        }
        for (layer, quantizer, bits), score in scores.items()
    ]


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
