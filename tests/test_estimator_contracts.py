"""Every estimator keeps the contract; four are computed once more, slowly."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.sensitivity import (
    FisherEstimator,
    FisherOutputEstimator,
    HessianEstimator,
    KlEstimator,
    LsqStepsEstimator,
    estimator_names,
)
from adq_search.testing import EstimatorContract, FormulaEstimatorContract
from adq_search.tracing import parametric_layers


def per_class_gradients(logits: Tensor, of: Tensor):
    """Yield p_c and the gradient of -log p_c in some values for each class of one example."""
    for log in logits.log_softmax(dim=1)[0]:
        (gradient,) = torch.autograd.grad(-log, of, retain_graph=True)
        yield float(log.detach().exp()), gradient.flatten().tolist()


class TestFisher(FormulaEstimatorContract):
    estimator_class = FisherEstimator

    def slow_score(self, network, inputs, targets, name, quantized):
        weight = parametric_layers(network)[name].weight
        error = (quantized - weight).flatten().tolist()
        total = 0.0
        for x in inputs:
            for p, gradient in per_class_gradients(network(x.unsqueeze(0)), weight):
                total += sum(0.5 * p * g * g * e * e for g, e in zip(gradient, error, strict=True))
        return total / len(inputs)


class TestFisherOutput(FormulaEstimatorContract):
    estimator_class = FisherOutputEstimator

    def slow_score(self, network, inputs, targets, name, quantized):
        layer = parametric_layers(network)[name]
        changed = copy.deepcopy(layer)
        changed.weight.data.copy_(quantized)
        calls: list[tuple[Tensor, Tensor]] = []  # the output, and what quantization adds to it

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append((output, (changed(args[0]) - output).detach()))
            return output.clone()  # in-place activations follow

        hook = layer.register_forward_hook(watch)
        total = 0.0
        for x in inputs:
            calls.clear()
            logits = network(x.unsqueeze(0))
            for output, error in list(calls):
                for p, gradient in per_class_gradients(logits, output):
                    pairs = zip(gradient, error.flatten().tolist(), strict=True)
                    total += sum(0.5 * p * (g * e) ** 2 for g, e in pairs)
        hook.remove()
        return total / len(inputs)


class TestHessian(FormulaEstimatorContract):
    estimator_class = HessianEstimator
    settings: ClassVar = {"max_probes": 12}
    many_samples: ClassVar = {"min_probes": 300, "max_probes": 300}

    def slow_score(self, network, inputs, targets, name, quantized):
        layer = parametric_layers(network)[name]
        at = layer.weight.detach()

        def loss(flat: Tensor) -> Tensor:
            found = torch.func.functional_call(
                network, {f"{name}.weight": flat.view_as(at)}, (inputs,)
            )
            return F.cross_entropy(found, targets)

        hessian = torch.autograd.functional.hessian(loss, at.flatten())
        average = sum(float(hessian[i, i]) for i in range(len(hessian))) / at.numel()
        return 0.5 * average * float((quantized - at).square().sum())


class TestKl(FormulaEstimatorContract):
    estimator_class = KlEstimator

    def slow_score(self, network, inputs, targets, name, quantized):
        changed = copy.deepcopy(network)
        parametric_layers(changed)[name].weight.data.copy_(quantized)
        with torch.no_grad():
            before, after = (n(inputs).softmax(dim=1).tolist() for n in (network, changed))
        rows = zip(before, after, strict=True)
        terms = [p * math.log(p / q) for a, b in rows for p, q in zip(a, b, strict=True)]
        return sum(terms) / len(inputs)


class TestLsqSteps(EstimatorContract):
    estimator_class = LsqStepsEstimator


def test_no_estimator_goes_without_the_contract() -> None:
    kept = {
        c.estimator_class.name
        for c in (TestFisher, TestFisherOutput, TestHessian, TestKl, TestLsqSteps)
    }
    assert kept == set(estimator_names())
