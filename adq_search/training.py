"""One training loop, for teachers and for quantized students."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from adq_search.checkpoint import TrainingCheckpoint, load_training_state_, training_state
from adq_search.distill import DistillationSettings, Teacher, distillation_loss
from adq_search.errors import AdqSearchWarning
from adq_search.global_batch_norm import global_batch_norms
from adq_search.layout import fast_layout
from adq_search.norms import fused_norms
from adq_search.parallel import ALONE, Ranks
from adq_search.progress import Progress
from adq_search.stacking import Stack
from adq_search.tasks import Batch, Task
from adq_search.validation import StrictModel

_MACS_WORTH_THREADS = 1e8


class TrainingSettings(StrictModel):
    """How a network is trained: SGD with momentum, cosine decay to 0 without restarts.

    Attributes:
        epochs: Passes over the training part.
        batch_size: Samples a step.
        learning_rate: At the start.
        momentum: Of SGD (Nesterov).
        weight_decay: On weights and biases of the network; never on quantizer parameters, where
            it would pull step sizes to zero.
        distillation: How the student listens to the teacher.
        calibration_samples: Training samples that initialise the input quantizers.
        batch_norm_batches: Training batches that re-estimate batch-norm statistics at the end.
        precision: Of the network's arithmetic in training; `bfloat16` is autocast, for processors
            and GPUs that multiply in it. Weights, steps, the loss and what is measured stay in
            float32.
        networks_per_pass: Networks that the Optuna host trains at once, as one. With 1, a result
            depends on its policy and the seed alone; with more, it does so within rounding.
        warm_start: Begin each trial from the weights of the nearest policy that was trained, not
            from the teacher's: `adq_search.warm_start`.
        checkpoint_every_s: Seconds of training from one checkpoint of a trial to the next, at
            least; they are written after epochs, but not by passes of several networks. No result
            depends on it.
    """

    epochs: Annotated[int, Field(ge=1)] = 6
    batch_size: Annotated[int, Field(ge=2)] = 64
    learning_rate: Annotated[float, Field(gt=0.0)] = 0.02
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    distillation: DistillationSettings = DistillationSettings()
    calibration_samples: Annotated[int, Field(ge=1)] = 256
    batch_norm_batches: Annotated[int, Field(ge=1)] = 16
    precision: Literal["float32", "bfloat16"] = "float32"
    networks_per_pass: Annotated[int, Field(ge=1, le=64)] = 1
    warm_start: bool = False
    checkpoint_every_s: Annotated[float, Field(ge=0.0)] = 30.0


class Monitor(Protocol):
    """What watches a training run; hosts implement it."""

    def report(self, epoch: int, loss: float) -> None:
        """Take the mean training loss of an epoch, counted from 1."""
        ...

    def should_stop(self) -> bool:
        """Whether to end the training after this epoch."""
        ...


class Silent:
    """A monitor that listens to nothing and never stops."""

    def report(self, epoch: int, loss: float) -> None:
        """Do nothing."""

    def should_stop(self) -> bool:
        """Never stop."""
        return False


@dataclass(frozen=True, slots=True)
class EpochProgress:
    """A monitor that passes epochs on as progress, and never stops."""

    progress: Progress
    stage: str
    epochs: int

    def report(self, epoch: int, loss: float) -> None:
        """Pass an epoch on."""
        self.progress.update(self.stage, epoch, self.epochs, f"loss {loss:.3f}")

    def should_stop(self) -> bool:
        """Never stop."""
        return False


@dataclass(frozen=True, slots=True)
class FitOutcome:
    """How a training run ended.

    Attributes:
        epochs: Epochs finished.
        loss: Mean training loss of the last epoch.
        is_finite: False when the loss became NaN or infinite; training ended there.
        was_stopped: The monitor ended it.
    """

    epochs: int
    loss: float
    is_finite: bool
    was_stopped: bool


def fit(
    network: nn.Module,
    task: Task,
    settings: TrainingSettings,
    *,
    teacher: Teacher | None = None,
    monitor: Monitor | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    ranks: Ranks = ALONE,
    seed: int,
) -> FitOutcome:
    """Train `network` in place on the task's training part.

    The order of the samples and their augmentation follow `seed` alone, so two policies trained
    with the same seed see the same data (common random numbers).

    Args:
        network: Float or quantized; trained in place, left in train mode.
        task: Gives data and augmentation.
        settings: The recipe.
        teacher: Distil from it, as `settings.distillation` says; None trains on labels.
        monitor: Told of every epoch, those before an interruption too; may end the run.
        checkpoint: Where the run saves itself, and goes on from if it was interrupted.
        ranks: The processes that train it together; `monitor` and `checkpoint` are the first one's.
        seed: Of data order and augmentation.
    """
    watch = monitor or Silent()

    def is_over(epoch: int, loss: float) -> bool:
        watch.report(epoch, loss)
        is_past = checkpoint is not None and epoch < checkpoint.resumed_epochs
        return not is_past and epoch < settings.epochs and watch.should_stop()

    mean_loss = math.nan
    network.train()
    with global_batch_norms(network, ranks), fused_norms(network):
        means = epoch_losses(
            network,
            task,
            settings,
            teacher=teacher,
            checkpoint=checkpoint,
            ranks=ranks,
            seed=seed,
        )
        for epoch, (mean_loss,) in enumerate(means, start=1):
            if not math.isfinite(mean_loss):
                return FitOutcome(epoch, mean_loss, is_finite=False, was_stopped=False)
            if ranks.decided(partial(is_over, epoch, mean_loss)):
                return FitOutcome(epoch, mean_loss, is_finite=True, was_stopped=True)
    return FitOutcome(settings.epochs, mean_loss, is_finite=True, was_stopped=False)


def fit_stack(
    stack: Stack, task: Task, settings: TrainingSettings, *, teacher: Teacher | None, seed: int
) -> list[FitOutcome]:
    """Train several networks at once, each as `fit` would within rounding.

    A network whose loss is not finite any more is trained on with the others; its outcome is that
    of the epoch where it happened.

    Args:
        stack: Trained in place.
        task: Gives data and augmentation.
        settings: The recipe.
        teacher: Distil from it, as `settings.distillation` says.
        seed: Of data order and augmentation.

    Returns:
        One outcome a network, in the stack's order.
    """
    stack.train()
    with fused_norms(stack):
        means = list(epoch_losses(stack, task, settings, teacher=teacher, seed=seed))
    return [_outcome(losses) for losses in zip(*means, strict=True)]


def _outcome(losses: Sequence[float]) -> FitOutcome:
    for epoch, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return FitOutcome(epoch, loss, is_finite=False, was_stopped=False)
    return FitOutcome(len(losses), losses[-1], is_finite=True, was_stopped=False)


def epoch_losses(
    network: nn.Module,
    task: Task,
    settings: TrainingSettings,
    *,
    teacher: Teacher | None,
    checkpoint: TrainingCheckpoint | None = None,
    ranks: Ranks = ALONE,
    seed: int,
) -> Iterator[list[float]]:
    """Train epoch by epoch; yield the mean training loss of each network after each epoch.

    Epochs that a checkpoint holds are not trained again, only their losses are yielded.

    Args:
        network: Returns logits, # shape: (N, classes), or (K, N, classes) if it is K networks.
        task: Gives data and augmentation.
        settings: The recipe.
        teacher: Distil from it, as `settings.distillation` says.
        checkpoint: Where the run saves itself, and goes on from if it was interrupted.
        ranks: The processes that train it together. All begin as the first one does.
        seed: Of data order and augmentation.
    """
    optimizer = torch.optim.SGD(
        _parameter_groups(network, settings),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0.0,
        fused=True,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    n_steps = settings.epochs * math.ceil(len(task.train) / settings.batch_size)
    guide = teacher if settings.distillation.enabled else None
    generator = torch.Generator().manual_seed(seed)
    past, step = ranks.decided(
        lambda: (
            ([], 0) if checkpoint is None else checkpoint.restore_(network, optimizer, generator)
        )
    )
    if ranks.size > 1:
        begin = ranks.copied(training_state(network, optimizer, generator))
        load_training_state_(network, optimizer, generator, begin)
    yield from past
    layout = fast_layout(network, task.example())
    network.train()
    for epoch in range(len(past) + 1, settings.epochs + 1):
        sums: list[Tensor] = []
        for batch in task.train.batches(settings.batch_size, seed=_epoch_seed(seed, epoch)):
            if task.augment is not None:
                batch = batch._replace(inputs=task.augment(batch.inputs, generator))
            batch, share = ranks.share_of(batch)
            answers = None if guide is None else guide.logits(batch)
            with _precision(settings, batch.inputs.device.type):
                logits: Tensor = network(batch.inputs.to(memory_format=layout))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = torch.stack(
                [
                    _batch_loss(own, batch, answers, settings)
                    for own in (logits if logits.ndim == 3 else [logits])
                ]
            )
            optimizer.zero_grad()
            (losses.sum() * share).backward()
            ranks.add_gradients_(network)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1.0 + math.cos(math.pi * step / n_steps)) / 2.0
            optimizer.step()
            step += 1
            sums.append(losses.detach() * len(batch.inputs))
        means = (ranks.total(torch.stack(sums).sum(dim=0)) / len(task.train)).tolist()
        if checkpoint is not None:
            checkpoint.after_epoch(network, optimizer, generator, losses=means, steps=step)
        yield means


def training_inputs(
    network: nn.Module, task: Task, settings: TrainingSettings, *, seed: int
) -> Iterator[Tensor]:
    """Yield the batches that re-estimate a network's batch norms, as training has them."""
    layout = fast_layout(network, task.example())
    generator = torch.Generator().manual_seed(seed)
    batches: Iterable[Any] = task.train.batches(settings.batch_size, seed=seed)
    for _, batch in zip(range(settings.batch_norm_batches), batches, strict=False):
        inputs = batch.inputs if task.augment is None else task.augment(batch.inputs, generator)
        yield inputs.to(memory_format=layout)


def threads_for(macs: int, batch_size: int, *, workers: int) -> int:
    """Return how many threads each of some workers on this machine should train with.

    Below 100 M MACs a step a second thread brought less than a fifth (measured on two cores: 12.8
    to 10.7 ms at 12 M, 48 to 33 ms at 151 M), so other workers use the cores better. The rule looks
    at the job alone: results do not change with the load of the machine.

    Args:
        macs: Of one inference.
        batch_size: Samples a step.
        workers: Processes that train at once.
    """
    if macs * batch_size < _MACS_WORTH_THREADS:
        return 1
    return max(1, (os.cpu_count() or 1) // workers)


def multiplies_bfloat16() -> bool:
    """Return whether torch has more than reference code for bfloat16 on this processor."""
    is_there = torch.backends.mkldnn.is_available()
    return is_there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_precision(settings: TrainingSettings, device: str) -> None:
    """Warn of a precision that slows training down on this machine.

    Args:
        settings: The training recipe.
        device: Kind of the device that trains.
    """
    if settings.precision == "bfloat16" and device == "cpu" and not multiplies_bfloat16():
        msg = (
            "`training: {precision: bfloat16}` will be slow: torch has only reference code for "
            "bfloat16 convolutions on this processor (8 to 14 times the time of float32, measured "
            "on one with AVX2). Results are the same within rounding. Leave `precision` out, or "
            "train on a processor with AVX-512 or Arm's BF16, or on a GPU."
        )
        warnings.warn(msg, AdqSearchWarning, stacklevel=3)


def _parameter_groups(network: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Split parameters into the network's own and the quantizers', with their learning rates."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in network.modules():
        factor: float | None = getattr(module, "learning_rate_factor", None)
        if factor is None:  # neither a quantizer nor stacked quantizers
            continue
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                key = (settings.learning_rate * factor, 0.0)
                groups.setdefault(key, []).append(parameter)
    own = [p for p in network.parameters() if id(p) not in seen]
    groups.setdefault((settings.learning_rate, settings.weight_decay), []).extend(own)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _batch_loss(
    logits: Tensor, batch: Batch, answers: Tensor | None, settings: TrainingSettings
) -> Tensor:
    """Return the mean loss of a share; of an empty one 0, with a graph as the others have it."""
    if len(batch.targets) == 0:
        return logits.sum()
    return distillation_loss(logits, batch.targets, answers, settings.distillation)


def _precision(settings: TrainingSettings, device: str) -> torch.autocast:
    is_half = settings.precision == "bfloat16"
    return torch.autocast(device, dtype=torch.bfloat16, enabled=is_half)


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 100_003 + epoch
