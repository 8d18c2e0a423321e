"""What one quantized group does to the network's answer: KL, measured, not modelled.

Notation:
    p_n, p_n': softmax of the network's logits for example n, in float and with one group quantized.
    S = mean_n KL(p_n || p_n')

ZeroQ [Cai2020]_ (section 3.3, Eq. 5) scores bits so. KL from the float network is the rise of the
cross-entropy where labels follow the network's own softmax, in nats. Nothing is trained, and no
second-order model is trusted; the price is a forward for each group, choice and example.

.. [Cai2020] Cai et al. ZeroQ: A Novel Zero Shot Quantization Framework. CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adq_search.errors import SensitivityError
from adq_search.sensitivity._answers import answer, kl
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
from adq_search.sensitivity._registry import register_estimator
from adq_search.sensitivity._watching import weight_of
from adq_search.space import Group


@register_estimator
@dataclass(frozen=True, slots=True)
class KlEstimator(SensitivityEstimator):
    """KL of the network's answer with one group quantized at a time.

    A group is quantized whole, since its layers share one decision; each of its layers is given an
    equal share of the score, so that their sum is what was measured.

    Args:
        joint: Also measure weights and input quantized together, for every scheme and its bits;
            else the two scores are added.
        n_folds: Parts of the examples whose spread gives the standard error.
        chunk: Examples at once.
    """

    joint: bool = False
    n_folds: int = 4
    chunk: int = 128

    name: ClassVar[str] = "kl"

    def n_samples(self, subject: Subject) -> int:
        return subject.folds(self.n_folds)

    def parts(self, subject: Subject) -> tuple[str, ...]:
        """Return the groups: each is a piece of work of its own."""
        return tuple(group.name for group in subject.space.groups)

    def sample(self, subject: Subject, index: int, part: str) -> Scores:
        group = next(g for g in subject.space.groups if g.name == part)
        layers = [subject.fitted[name] for name in group.layers]
        n_folds = self.n_samples(subject)
        inputs = subject.inputs[subject.fold(index, n_folds)]
        share = subject.share(index, n_folds) / len(group.layers)
        scores: Scores = {}
        chunks = inputs.split(self.chunk)
        before = [answer(subject.model, chunk) for chunk in chunks]
        for keys, of_weight, of_input in self._choices(subject, group):
            with _quantized(layers, of_weight, of_input), _named(part, of_weight, of_input):
                after = [answer(subject.model, chunk) for chunk in chunks]
            total = sum(kl(b, a) for b, a in zip(before, after, strict=True))
            scores |= dict.fromkeys(keys, share * total / len(inputs))
        return scores

    def _choices(
        self, subject: Subject, group: Group
    ) -> list[tuple[list[ScoreKey], Kind | None, Kind | None]]:
        first = subject.fitted[group.layers[0]]
        both = subject.choices_of(group.layers[0]) if self.joint else {}
        return [
            *(([weight_key(n, *kind) for n in group.layers], kind, None) for kind in first.weights),
            *(([input_key(n, *kind) for n in group.layers], None, kind) for kind in first.inputs),
            *(([both_key(n, p) for n in group.layers], *kinds) for p, kinds in both.items()),
        ]


@contextmanager
def _named(group: str, *kinds: Kind | None) -> Iterator[None]:
    """Say in an error which group was quantized, and how."""
    try:
        yield
    except SensitivityError as error:
        how = " and ".join(f"{kind[0]} at {kind[1]} bits" for kind in kinds if kind is not None)
        msg = f"With {group} quantized ({how}): {error} Or leave this choice out of the space."
        raise SensitivityError(msg) from error


@contextmanager
def _quantized(
    layers: list[FittedLayer], of_weight: Kind | None, of_input: Kind | None
) -> Iterator[None]:
    """Quantize the weights and the inputs of some layers, as long as the context lasts."""
    kept = [weight_of(layer.layer).detach().clone() for layer in layers]
    handles = []
    try:
        for layer, weight in zip(layers, kept, strict=True):
            if of_weight is not None:
                _put_(layer.layer, layer.weights[of_weight](weight))
            if of_input is not None:
                look = partial(_quantize_input, layer.inputs[of_input])
                handles.append(layer.layer.register_forward_pre_hook(look))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight in zip(layers, kept, strict=True):
            _put_(layer.layer, weight)


def _quantize_input(quantizer: nn.Module, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantizer(args[0]), *args[1:])


@torch.no_grad()
def _put_(layer: nn.Module, weight: Tensor) -> None:
    weight_of(layer).copy_(weight)
