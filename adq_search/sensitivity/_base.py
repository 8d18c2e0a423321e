"""What an estimator answers, in samples that can be counted, stored and stopped between.

Notation:
    L_n: cross-entropy of example n, in nats, natural logarithm.
    w_j, x_nj: a layer's weights, and its input for example n.
    C^w_j, C^x_nj: second derivative of the mean loss in w_j, and of L_n in x_nj, as far as the
        estimator keeps it (a diagonal, or one average for all).
    e: quantization error Q(v) - v.

To second order, and at a minimum, quantizing one layer raises the mean loss by
    1/2 sum_j C^w_j (e^w_j)^2  +  1/2 mean_n sum_j C^x_nj (e^x_nj)^2.
Everything that differs between HAWQ-V2, FIT and the Fisher perturbation is how C is estimated;
other estimators measure the rise at the layer's output, at the network's, or by training.

An estimate is a mean over samples: parts of the examples, probes, or repeated trainings. So each
has a standard error, may end early, and goes on where it was interrupted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from adq_search.policy import LayerPrecision
from adq_search.quantizers import resolve_scheme
from adq_search.sensitivity._fitted import FittedLayer, Kind, fit_choices
from adq_search.sensitivity._watching import layer_inputs
from adq_search.space import SearchSpace

#: What of a layer is quantized.
Part = Literal["weights", "inputs", "both"]


class ScoreKey(NamedTuple):
    """What a score belongs to.

    Attributes:
        layer: Its name.
        part: What of the layer is quantized.
        quantizer: Name of the weight or input quantizer; of the scheme where both are.
        weight_bits: 0 where only inputs are quantized.
        input_bits: 0 where only weights are.
    """

    layer: str
    part: Part
    quantizer: str
    weight_bits: int
    input_bits: int


class Estimate(NamedTuple):
    """A predicted loss increase, in nats, and its standard error."""

    value: float
    error: float


#: One sample of every score.
Scores = dict[ScoreKey, float]


@dataclass(frozen=True, eq=False)
class Subject:
    """What is examined: a float network on some examples, and what its layers may become.

    Attributes:
        model: The network; left as it was.
        inputs: Shape (n, *sample).
        targets: Class indices, shape (n,).
        space: Which precisions to score.
        seed: Of everything drawn.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    space: SearchSpace
    seed: int

    @cached_property
    def fitted(self) -> dict[str, FittedLayer]:
        """The layers of the space with their quantizers, fitted to weights and layer inputs."""
        values, _ = layer_inputs(self.model, self.inputs)
        return fit_choices(self.model, self.space, values, seed=self.seed)

    def prepare(self) -> None:
        """Fit the quantizers now, so that the first piece of work takes no longer than others."""
        _ = self.fitted

    def choices_of(self, layer: str) -> dict[LayerPrecision, tuple[Kind, Kind]]:
        """Return the precisions of a layer with their quantizers; momenta are not told apart."""
        group = next(g for g in self.space.groups if layer in g.layers)
        found = {}
        for choice in dict.fromkeys(group.with_median_momentum(p) for p in group.choices):
            if choice.weight_bits is not None and choice.input_bits is not None:
                pair = resolve_scheme(choice.scheme)
                kinds = (pair.weight, choice.weight_bits), (pair.input, choice.input_bits)
                found[choice] = kinds
        return found

    def folds(self, most: int) -> int:
        """Return into how many parts the examples are divided: `most`, where there are as many."""
        return min(most, len(self.inputs))

    def fold(self, index: int, n_folds: int) -> slice:
        """Return one of `n_folds` parts of the examples, equal up to one example."""
        n = len(self.inputs)
        return slice(index * n // n_folds, (index + 1) * n // n_folds)

    def share(self, index: int, n_folds: int) -> float:
        """Return what a fold's mean counts, so that the mean over folds is that over examples."""
        rows = self.fold(index, n_folds)
        n_rows: int = rows.stop - rows.start
        return n_rows * n_folds / len(self.inputs)


class SensitivityEstimator(ABC):
    """One way of predicting what quantization costs. Networks are examined in evaluation mode."""

    __slots__ = ()

    name: ClassVar[str]

    @property
    def min_samples(self) -> int:
        """Samples that no budget cuts off: fewer than two say nothing of their spread."""
        return 2

    @abstractmethod
    def n_samples(self, subject: Subject) -> int:
        """Return how many samples make the estimate, at most."""

    def parts(self, subject: Subject) -> tuple[str, ...]:
        """Return the names of the pieces of work that make one sample."""
        return ("network",)

    @abstractmethod
    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        """Return one part of sample `index`, the same whenever it is asked for.

        Raises:
            SensitivityError: The network's output is no logits, or not finite.
        """

    def is_settled(self, samples: Sequence[Scores]) -> bool:
        """Whether more samples would change little."""
        return False

    def combine(self, subject: Subject, samples: Sequence[Scores]) -> dict[ScoreKey, Estimate]:
        """Return the mean of the samples and its standard error.

        Raises:
            SensitivityError: A mean is beyond repair; the text names the layer.
        """
        return {key: mean_and_error([s[key] for s in samples]) for key in samples[0]}


def mean_and_error(samples: Sequence[float]) -> Estimate:
    """Return the mean and its standard error; of one sample, the error is unknown: NaN."""
    n = len(samples)
    mean = math.fsum(samples) / n
    if n == 1:
        return Estimate(mean, math.nan)
    spread = math.fsum((s - mean) ** 2 for s in samples) / (n * (n - 1))
    return Estimate(mean, math.sqrt(spread))


def weight_key(layer: str, quantizer: str, bits: int) -> ScoreKey:
    """Return the key of a layer with nothing but its weights quantized."""
    return ScoreKey(layer, "weights", quantizer, bits, 0)


def input_key(layer: str, quantizer: str, bits: int) -> ScoreKey:
    """Return the key of a layer with nothing but its input quantized."""
    return ScoreKey(layer, "inputs", quantizer, 0, bits)


def both_key(layer: str, precision: LayerPrecision) -> ScoreKey:
    """Return the key of a layer with weights and input quantized."""
    bits = precision.weight_bits or 0, precision.input_bits or 0
    return ScoreKey(layer, "both", precision.scheme, *bits)
