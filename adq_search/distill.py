"""Distillation from the full-precision network: the loss, and the teacher's answers.

Notation:
    z_S, z_T: logits of student and teacher, shape (batch, classes)
    T: temperature
    w: share of the distillation term

    L = (1 - w) CE(z_S, y) + w T^2 KL(softmax(z_T / T) || softmax(z_S / T))     [Hinton2015]_

With T = 1 and w = 0.5 this is the recipe of LSQ with distillation (methods.md section 5). A
temperature of 5 cost eleven points of accuracy at W3A8 in Intel Distiller's table: the default
stays at 1.

.. [Hinton2015] Hinton, Vinyals, Dean. Distilling the knowledge in a neural network. 2015.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.tasks import Batch, Part, Task
from adq_search.validation import StrictModel

#: Samples that the teacher answers at once where its answers are kept.
_BATCH = 512


class DistillationSettings(StrictModel):
    """How much the student listens to the teacher.

    Attributes:
        enabled: False trains on the labels alone.
        weight: Share w of the distillation term, 0 to 1.
        temperature: T > 0.
    """

    enabled: bool = True
    weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    temperature: Annotated[float, Field(gt=0.0)] = 1.0


def kl_to_teacher(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) in nats, averaged over the batch.

    Args:
        student: Logits, shape (batch, classes).
        teacher: Logits of the teacher on the same inputs, same shape.
        temperature: Divides both logits.
    """
    return F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def distillation_loss(
    student: Tensor, targets: Tensor, teacher: Tensor | None, settings: DistillationSettings
) -> Tensor:
    """Return the loss a student is trained on, a scalar.

    Args:
        student: Logits, shape (batch, classes).
        targets: Class indices, shape (batch,).
        teacher: Teacher's logits, or None for labels alone.
        settings: Weight and temperature.
    """
    hard = F.cross_entropy(student, targets)
    if teacher is None or not settings.enabled:
        return hard
    t = settings.temperature
    soft = kl_to_teacher(student, teacher, temperature=t) * t**2
    return (1.0 - settings.weight) * hard + settings.weight * soft


class Teacher:
    """The full-precision network, never trained and never quantized, and its answers.

    Answers to inputs that come back unchanged, every epoch or with every trial, are computed once
    and kept. They are computed in the order of the data, so that a trial which goes on from a
    checkpoint in another process hears the same, to the last bit.

    Args:
        network: The trained network; a private copy of its state is not made.
        task: Decides whether training inputs are augmented, which forbids keeping answers.
    """

    def __init__(self, network: nn.Module, task: Task) -> None:
        self.network = network.eval().requires_grad_(requires_grad=False)
        self._train = task.train
        self._augments = task.augment is not None
        # By the part's identity, which stays its own while it is held.
        self._kept: dict[int, tuple[Part, Tensor]] = {}  # tensors' shape: (n, classes)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits for a training batch, shape (batch, classes)."""
        if self._augments:
            return self.answer(batch.inputs)
        return self.answers_on(self._train, batch)

    def answers_on(self, part: Part, batch: Batch) -> Tensor:
        """Return the logits for a batch of a part as it lies there, shape (batch, classes)."""
        if not part.is_in_memory:
            return self.answer(batch.inputs)
        if id(part) not in self._kept:
            answers = [self.answer(piece.inputs) for piece in part.batches(_BATCH)]
            self._kept[id(part)] = part, torch.cat(answers)
        return self._kept[id(part)][1][batch.indices]

    @torch.no_grad()
    def answer(self, inputs: Tensor) -> Tensor:
        """Return the logits for any inputs, computed now."""
        logits: Tensor = self.network(inputs)
        return logits
