"""Step sizes of LSQ learned for all bits at once, as the importance of layers.

Notation:
    s^w_lb, s^a_lb: learned step of layer l's weights and input at b bits.
    alpha: weight of weight steps against input steps.
    u: a uniform policy, every layer at the same place of its list of bits.
    K_u: KL of the trained network under u from the float network, nats.
    S_u = sum_l (s^a_lb + alpha s^w_lb), b the bits of u;  kappa = sum_u K_u S_u / sum_u S_u^2.

LIMPQ [Tang2022]_ (section 3.3): one network is trained with a step for each layer and number of
bits; a batch runs once under each uniform policy and once under a random one, gradients are added
up, and a layer whose step came out large needs its bits. The steps see what training repairs, which
no estimate at the float network does.

A step is no loss. What LIMPQ minimises is S; kappa, fitted to the uniform policies of the same
training, turns it into nats and changes no order. Choices that LIMPQ leaves open here: batch norms
stay in evaluation mode, since the bits share the float network's statistics; a quantizer other than
LSQ has LSQ's step at its bits times the ratio of their mean squared errors.

.. [Tang2022] Tang et al. Mixed-Precision Neural Network Quantization via Learned Layer-wise
   Importance. ECCV 2022.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.errors import SensitivityError
from adq_search.layers import QuantLayer, to_quantized_
from adq_search.policy import LayerPrecision
from adq_search.quantizers import InputQuantizer, Quantizer, WeightQuantizer, make_quantizers
from adq_search.sensitivity._answers import answer, kl
from adq_search.sensitivity._base import (
    Scores,
    SensitivityEstimator,
    Subject,
    input_key,
    weight_key,
)
from adq_search.sensitivity._fitted import FittedLayer
from adq_search.sensitivity._registry import register_estimator
from adq_search.sensitivity._watching import layer_inputs, weight_of
from adq_search.tracing import parametric_layers


@register_estimator
@dataclass(frozen=True, slots=True)
class LsqStepsEstimator(SensitivityEstimator):
    """Learned steps, scaled to nats.

    Args:
        repeats: Trainings, whose spread gives the standard error; at least two.
        epochs: Passes over the examples.
        batch_size: Examples a step.
        learning_rate: Of SGD with momentum 0.9, decayed to 0 by a cosine.
        alpha: Weight of weight steps.
    """

    repeats: int = 2
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 0.01
    alpha: float = 2.0

    name: ClassVar[str] = "lsq_steps"

    def n_samples(self, subject: Subject) -> int:
        return self.repeats

    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        """Return the scores of one training.

        Raises:
            SensitivityError: The training diverged.
        """
        generator = torch.Generator().manual_seed(subject.seed * 1_000 + index)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            network = copy.deepcopy(subject.model).eval().requires_grad_()
            answer(network, subject.inputs)  # refuses what is no logits, before any training
            layers = _layers(network, subject)
            self._train(network, layers, subject, generator)
        return _scores(layers, subject.fitted, self._scale(network, layers, subject), self.alpha)

    def _train(
        self,
        network: nn.Module,
        layers: dict[str, _StepLayer],
        subject: Subject,
        generator: torch.Generator,
    ) -> None:
        steps = [p for layer in layers.values() for p in layer.parameters()]
        known = {id(p) for p in steps}
        others = [p for p in network.parameters() if id(p) not in known]
        optimizer = torch.optim.SGD([*others, *steps], lr=self.learning_rate, momentum=0.9)
        n = len(subject.inputs)
        n_steps = self.epochs * math.ceil(n / self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        for _ in range(self.epochs):
            order = torch.randperm(n, generator=generator).to(subject.inputs.device)
            for rows in order.split(self.batch_size):
                optimizer.zero_grad()
                for _ in _policies(layers, generator):
                    logits = network(subject.inputs[rows])
                    F.cross_entropy(logits, subject.targets[rows]).backward()
                optimizer.step()
                schedule.step()
        for name, layer in layers.items():
            if not all(torch.isfinite(step).all() for step in layer.parameters()):
                msg = (
                    f"Learned steps are finite, but those of {name} are not: the training "
                    f"diverged. Lower `learning_rate`, now {self.learning_rate:g}."
                )
                raise SensitivityError(msg)

    def _scale(self, network: nn.Module, layers: dict[str, _StepLayer], subject: Subject) -> float:
        """Return kappa."""
        before = answer(subject.model, subject.inputs)
        above = below = 0.0
        for _ in _uniform(layers):
            rise = kl(before, answer(network, subject.inputs)) / len(subject.inputs)
            total = sum(layer.importance(self.alpha) for layer in layers.values())
            above += rise * total
            below += total**2
        return above / below


@dataclass
class _StepLayer:
    """One layer with LSQ quantizers for each number of bits; it runs with those chosen last.

    Attributes:
        weights: By bits, ascending.
        inputs: Likewise.
        weight_mse: Mean squared error of `weights` before training.
        input_mse: That of `inputs`.
        seen: What the float layer saw, # shape: (rows, *sample)
    """

    layer: QuantLayer
    weights: dict[int, WeightQuantizer]
    inputs: dict[int, InputQuantizer]
    weight_mse: dict[int, float]
    input_mse: dict[int, float]
    seen: Tensor

    def choose(self, weight_place: int, input_place: int) -> None:
        """Take the bits at places of the two ascending lists, the last where a list is shorter."""
        weights, inputs = list(self.weights.values()), list(self.inputs.values())
        self.layer.weight_quantizer = weights[min(weight_place, len(weights) - 1)]
        self.layer.input_quantizer = inputs[min(input_place, len(inputs) - 1)]

    def importance(self, alpha: float) -> float:
        """Return s^a + alpha s^w at the bits chosen."""
        return _step(self.layer.input_quantizer) + alpha * _step(self.layer.weight_quantizer)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the steps."""
        for quantizer in (*self.weights.values(), *self.inputs.values()):
            yield from quantizer.parameters()


def _layers(network: nn.Module, subject: Subject) -> dict[str, _StepLayer]:
    """Quantize the network's searched layers, in place, with steps fitted to weights and inputs."""
    values, _ = layer_inputs(network, subject.inputs)
    layers = parametric_layers(network)
    found = {}
    for name, fitted in subject.fitted.items():
        if not fitted.weights:
            continue
        layer, seen = layers[name], values[name]
        weight = weight_of(layer).detach()
        weights = {bits: _lsq(bits, layer)[0] for bits in sorted({b for _, b in fitted.weights})}
        inputs = {bits: _lsq(bits, layer)[1] for bits in sorted({b for _, b in fitted.inputs})}
        weight_mse = {bits: _fitted_mse(q, weight) for bits, q in weights.items()}
        input_mse = {bits: _fitted_mse(q, seen) for bits, q in inputs.items()}
        to_quantized_(layer, next(iter(weights.values())), next(iter(inputs.values())))
        quantized = cast("QuantLayer", layer)
        found[name] = _StepLayer(quantized, weights, inputs, weight_mse, input_mse, seen)
    return found


def _lsq(bits: int, layer: nn.Module) -> tuple[WeightQuantizer, InputQuantizer]:
    return make_quantizers(LayerPrecision(bits, bits, "lsq"), layer, lambda _: {})


def _fitted_mse(quantizer: Quantizer, values: Tensor) -> float:
    """Fit a quantizer and return its mean squared error."""
    quantizer.initialize_(values)
    with torch.no_grad():
        return float((quantizer(values) - values).square().mean())


def _step(quantizer: nn.Module) -> float:
    """Return the step of an LSQ quantizer, the mean over its channels."""
    return float(cast("Tensor", quantizer.step).detach().abs().mean())


def _uniform(layers: dict[str, _StepLayer]) -> Iterator[None]:
    """Put the network under each uniform policy in turn, fewest bits first."""
    for place in range(max(max(len(x.weights), len(x.inputs)) for x in layers.values())):
        for layer in layers.values():
            layer.choose(place, place)
        yield


def _policies(layers: dict[str, _StepLayer], generator: torch.Generator) -> Iterator[None]:
    """Put the network under each uniform policy in turn, then under a random one."""
    yield from _uniform(layers)
    for layer in layers.values():
        places = (len(layer.weights), len(layer.inputs))
        layer.choose(*(int(torch.randint(n, (), generator=generator)) for n in places))
    yield


@torch.no_grad()
def _scores(
    layers: dict[str, _StepLayer], fitted: dict[str, FittedLayer], scale: float, alpha: float
) -> Scores:
    """Return every layer's scores in nats."""
    scores: Scores = {}
    for name, layer in layers.items():
        for quantizer, bits in fitted[name].weights:
            mse = float(fitted[name].weight_error(quantizer, bits).square().mean())
            learned = alpha * _step(layer.weights[bits])
            found = scale * learned * _ratio(mse, layer.weight_mse[bits])
            scores[weight_key(name, quantizer, bits)] = found
        for quantizer, bits in fitted[name].inputs:
            mse = float(fitted[name].input_error(quantizer, bits, layer.seen).square().mean())
            found = scale * _step(layer.inputs[bits]) * _ratio(mse, layer.input_mse[bits])
            scores[input_key(name, quantizer, bits)] = found
    return scores


def _ratio(mse: float, reference: float) -> float:
    """Return mse / reference; 1 where LSQ errs by nothing, as on an input of zeros."""
    return mse / reference if reference else 1.0
