"""A trial: train the network under one policy from the teacher's weights, and measure it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from adq_search.convert import apply_policy_, measure_health, reestimate_batch_norm_
from adq_search.distill import Teacher
from adq_search.integer import snap_codebooks_
from adq_search.policy import Policy
from adq_search.tasks import Task
from adq_search.training import (
    Evaluation,
    Monitor,
    TrainingSettings,
    evaluate,
    fit,
    training_inputs,
)

State = Literal["complete", "diverged", "stopped"]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a trial measured; a plain value that goes to and comes from JSON.

    Attributes:
        policy: What was trained.
        state: `complete`; `stopped` early by the monitor; `diverged`, with its reason.
        accuracy: On the validation part, 0 to 1; None where the loss was not finite.
        loss: Validation cross-entropy, nats.
        kl: Validation KL from the teacher, nats.
        cost: Total cost figures by name.
        epochs: Epochs trained (the fidelity).
        wall_s: Seconds the whole trial took.
        train_s: Seconds of it spent in training, batch-norm re-estimation and evaluation; the
            rest is conversion, calibration and cost.
        health: Steps of wrong sign, saturation, dead levels; per layer and in total.
        reason: Why it diverged or stopped.
        weights_fingerprint: Of the weights that were measured, see `fingerprint_of`; None in
            results of versions that did not take it.
    """

    policy: Policy
    state: State
    accuracy: float | None
    loss: float | None
    kl: float | None
    cost: dict[str, float]
    epochs: int
    wall_s: float
    train_s: float
    health: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    weights_fingerprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; NaN never appears, a missing figure is null."""
        return {
            "policy": self.policy.to_json(),
            **{k: v for k, v in _shallow(self).items() if k != "policy"},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Build a result from its JSON form."""
        return cls(**{**content, "policy": Policy.from_json(content["policy"])})


def run_trial(
    policy: Policy,
    task: Task,
    teacher: Teacher,
    settings: TrainingSettings,
    cost: Mapping[str, float],
    *,
    monitor: Monitor | None = None,
    seed: int,
) -> tuple[TrialResult, nn.Module]:
    """Train the network under `policy` from the teacher's weights, and measure it.

    The result depends on the policy, the task, the teacher, the settings and the seed, and on
    nothing that ran before it in the process. What is measured is what is deployed: after
    training, codebooks are rounded to integer level words, batch norms are re-estimated for the
    rounded levels, and only then accuracy is taken.

    Args:
        policy: Precision of every parametric layer.
        task: Network and data; only its train and validation parts are touched.
        teacher: Full-precision network: where training starts and what it is distilled from.
        settings: The training recipe.
        cost: The policy's total cost figures, known before training; copied into the result.
        monitor: Told of every epoch; may stop the trial.
        seed: Of everything random in the trial.

    Returns:
        The result, and the trained quantized network.

    Raises:
        PolicyError: The policy does not fit the network.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = task.make_network()
        network.load_state_dict(teacher.network.state_dict())
        apply_policy_(network, policy, task.calibration(settings.calibration_samples, seed=seed))
        ready = time.perf_counter()
        outcome = fit(network, task, settings, teacher=teacher, monitor=monitor, seed=seed)
        draft = TrialResult(
            policy=policy,
            state="stopped" if outcome.was_stopped else "complete",
            accuracy=None,
            loss=None,
            kl=None,
            cost=dict(cost),
            epochs=outcome.epochs,
            wall_s=0.0,
            train_s=0.0,
            reason="stopped by the monitor" if outcome.was_stopped else None,
        )
        if outcome.is_finite:
            snap_codebooks_(network)
            reestimate_batch_norm_(network, training_inputs(task, settings, seed=seed))
            measured = evaluate(network, task.validation, teacher)
            trained = time.perf_counter()
            health = measure_health(
                network, task.calibration(settings.calibration_samples, seed=seed)
            )
            draft = replace(
                _judged(draft, measured, task),
                health=asdict(health),
                weights_fingerprint=fingerprint_of(weights_of(network)),
            )
        else:
            trained = time.perf_counter()
            reason = f"the training loss became {outcome.loss} in epoch {outcome.epochs}"
            draft = replace(draft, state="diverged", reason=reason)
    return replace(draft, wall_s=time.perf_counter() - start, train_s=trained - ready), network


def _judged(draft: TrialResult, measured: Evaluation, task: Task) -> TrialResult:
    """Fill in the measurements, and call an accuracy at chance what it is.

    At chance: within two standard errors of 1 / classes on this many samples.
    """
    if not (math.isfinite(measured.loss) and math.isfinite(measured.kl)):
        return replace(draft, state="diverged", reason="the validation loss is not finite")
    filled = replace(draft, accuracy=measured.accuracy, loss=measured.loss, kl=measured.kl)
    chance = 1.0 / task.n_classes
    bound = chance + 2.0 * math.sqrt(chance * (1.0 - chance) / len(task.validation))
    if measured.accuracy > bound:
        return filled
    reason = (
        f"validation accuracy {measured.accuracy:.3f} is at chance "
        f"({chance:.3f}; two standard errors reach {bound:.3f})"
    )
    return replace(filled, state="diverged", reason=reason)


def _shallow(result: TrialResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__slots__}


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Return what a weights file holds: every parameter and buffer, contiguous, on the CPU."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in network.state_dict().items()}


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of the names, shapes and bytes of `weights_of` a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
