import math

import pytest
import torch
from torch import nn

from adq_search.distill import DistillationSettings, Teacher, distillation_loss, kl_to_teacher
from adq_search.tasks import Batch, Task


def slow_kl(student, teacher, t):
    total = 0.0
    for s, z in zip(student.tolist(), teacher.tolist()):
        ps = [math.exp(v / t) for v in s]
        pt = [math.exp(v / t) for v in z]
        ps = [v / sum(ps) for v in ps]
        pt = [v / sum(pt) for v in pt]
        total += sum(a * math.log(a / b) for a, b in zip(pt, ps))
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_textbook_sum(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    found = kl_to_teacher(student, teacher, temperature=temperature)
    assert float(found) == pytest.approx(slow_kl(student, teacher, temperature))
    assert float(kl_to_teacher(teacher, teacher)) == pytest.approx(0.0, abs=1e-12)


def test_loss_weighs_labels_and_teacher():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    targets = torch.tensor([0, 1, 2, 3, 0])
    hard = float(nn.functional.cross_entropy(student, targets))
    soft = 9.0 * slow_kl(student, teacher, 3.0)
    settings = DistillationSettings(weight=0.3, temperature=3.0)
    assert float(distillation_loss(student, targets, teacher, settings)) == pytest.approx(
        0.7 * hard + 0.3 * soft
    )
    off = DistillationSettings(enabled=False)
    assert float(distillation_loss(student, targets, teacher, off)) == pytest.approx(hard)
    assert float(distillation_loss(student, targets, None, settings)) == pytest.approx(hard)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = 0
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        self.seen += len(x)
        return self.linear(x)


def make_task(augment=None):
    part = (torch.randn(10, 3), torch.zeros(10))
    return Task("t", Counting, part, part, part, n_classes=2, augment=augment)


def test_answers_to_unchanged_inputs_are_computed_once():
    task = make_task()
    network = Counting()
    teacher = Teacher(network, task)
    fresh = [teacher.logits(b) for b in task.train.batches(4, seed=0)]
    assert network.seen == 10
    for epoch in range(3):
        for batch in task.train.batches(4, seed=epoch):
            assert torch.equal(teacher.logits(batch), network.linear(batch.inputs))
    assert network.seen == 10
    assert len(fresh) == 3


def test_augmented_inputs_are_answered_anew():
    task = make_task(augment=lambda x, generator: x + 1)
    network = Counting()
    teacher = Teacher(network, task)
    batch = Batch(torch.zeros(2, 3), torch.zeros(2), torch.tensor([0, 1]))
    teacher.logits(batch)
    changed = batch._replace(inputs=torch.ones(2, 3))
    assert torch.equal(teacher.logits(changed), network.linear(torch.ones(2, 3)))
    assert network.seen == 4


def test_the_teacher_never_learns():
    network = Counting().train()
    Teacher(network, make_task())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
