"""The network's answer, and how far another is from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.sensitivity._watching import checked_logits
from adq_search.tracing import evaluation_mode


@torch.no_grad()
def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return log-probabilities in double precision, in evaluation mode, # shape: (n, classes).

    Raises:
        SensitivityError: The output is no logits, or not finite.
    """
    with evaluation_mode(model):
        logits = checked_logits(model(inputs), len(inputs), {})
    return logits.double().log_softmax(dim=1)


def kl(before: Tensor, after: Tensor) -> float:
    """Return KL(before || after) in nats, summed over examples; both are log-probabilities.

    KL is not negative; what rounding makes of a KL of nothing may be, and is taken for 0.
    """
    return max(0.0, float(F.kl_div(after, before, reduction="sum", log_target=True)))
