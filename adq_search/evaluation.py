"""How good a network is on data: accuracy, loss, and how far it is from its teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.distill import Teacher, kl_to_teacher
from adq_search.layout import fast_layout
from adq_search.parallel import ALONE, Ranks
from adq_search.tasks import Part

BATCH = 512


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A network measured on one part.

    Attributes:
        accuracy: Share of samples whose class is right, 0 to 1.
        loss: Mean cross-entropy, nats.
        kl: Mean KL from the teacher's distribution, nats; 0 for the teacher itself.
    """

    accuracy: float
    loss: float
    kl: float


@torch.no_grad()
def evaluate(
    network: nn.Module, part: Part, teacher: Teacher | None = None, *, ranks: Ranks = ALONE
) -> Evaluation:
    """Measure `network` on a part, in eval mode.

    Args:
        network: Classifier that returns logits, shape (batch, classes).
        part: What it is measured on.
        teacher: What KL is taken from; None says the network is the teacher (KL 0).
        ranks: The processes that measure it together, each a share.
    """
    was_training = network.training
    network.eval()
    right, loss, kl, n = 0.0, 0.0, 0.0, 0
    layout: torch.memory_format | None = None
    for whole in part.batches(BATCH):
        layout = layout or fast_layout(network, whole.inputs[:1])
        batch, _ = ranks.share_of(whole)
        logits: Tensor = network(batch.inputs.to(memory_format=layout))
        size = len(batch.targets)
        if size == 0:
            continue
        right += float((logits.argmax(dim=-1) == batch.targets).sum())
        loss += float(F.cross_entropy(logits, batch.targets)) * size
        if teacher is not None:
            kl += float(kl_to_teacher(logits, teacher.answers_on(part, batch))) * size
        n += size
    network.train(was_training)
    sums = torch.tensor([right, loss, kl, n], dtype=torch.float64)
    right, loss, kl, n = ranks.total(sums).tolist()
    return Evaluation(accuracy=right / n, loss=loss / n, kl=kl / n)
