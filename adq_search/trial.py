"""A trial: train the network under one policy from the teacher's weights, and measure it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from adq_search.checkpoint import Origin, TrainingCheckpoint
from adq_search.convert import apply_policy_, measure_health, reestimate_batch_norm_
from adq_search.distill import Teacher
from adq_search.evaluation import Evaluation, evaluate
from adq_search.global_batch_norm import global_batch_norms
from adq_search.integer import snap_codebooks_
from adq_search.norms import fused_norms
from adq_search.parallel import ALONE, Ranks
from adq_search.policy import Policy
from adq_search.stacking import Stack
from adq_search.tasks import Task
from adq_search.training import (
    FitOutcome,
    Monitor,
    TrainingSettings,
    fit,
    fit_stack,
    training_inputs,
)
from adq_search.warm_start import Donor, begin_from_

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
        seed: Of everything random in the trial; None in results of versions that did not tell.
        donor: Hash of the policy whose weights training began from; None for the teacher's.
        epochs_before: Epochs that those weights had been trained for, by donors of donors too.
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
    seed: int | None = None
    donor: str | None = None
    epochs_before: int = 0

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
    donor: Donor | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    ranks: Ranks = ALONE,
    seed: int,
) -> tuple[TrialResult, nn.Module]:
    """Train the network under `policy` from the teacher's weights, and measure it.

    The result depends on the policy, the task, the teacher, the settings, the donor and the seed,
    and on nothing that ran before it in the process. What is measured is what is deployed: after
    training, codebooks are rounded to integer level words, batch norms are re-estimated for the
    rounded levels, and only then accuracy is taken.

    Args:
        policy: Precision of every parametric layer.
        task: Network and data; only its train and validation parts are touched.
        teacher: Full-precision network: where training starts and what it is distilled from.
        settings: The training recipe.
        cost: The policy's total cost figures, known before training; copied into the result.
        monitor: Told of every epoch; may stop the trial.
        donor: Whose weights training begins from, instead of the teacher's.
        checkpoint: Where training saves itself, and goes on from if it was interrupted: the result
            is the same, but for its seconds.
        ranks: The processes that train it together; each calls this with the same policy, task,
            teacher, settings and seed, and has the same result, which is that of one process within
            rounding. Monitor, donor and checkpoint are asked in the first one alone.
        seed: Of everything random in the trial.

    Returns:
        The result, and the trained quantized network.

    Raises:
        PolicyError: The policy does not fit the network.
        ParallelError: The processes were given different trials, or lost each other.
    """
    start = time.perf_counter()
    ranks.check_same("trial", f"{policy.hash} {seed} {settings.model_dump_json()}")
    with torch.random.fork_rng(devices=[]):
        network = _student(policy, task, teacher, settings, donor, seed)
        ready = time.perf_counter()
        origin = _origin_of(donor)
        if checkpoint is not None:
            checkpoint.origin = origin
        outcome = fit(
            network,
            task,
            settings,
            teacher=teacher,
            monitor=monitor,
            checkpoint=checkpoint,
            ranks=ranks,
            seed=seed,
        )
        if outcome.is_finite:
            snap_codebooks_(network)
            inputs = training_inputs(network, task, settings, seed=seed)
            with global_batch_norms(network, ranks), fused_norms(network):
                reestimate_batch_norm_(network, (x[ranks.own(len(x))] for x in inputs))
        trained = time.perf_counter() + (0.0 if checkpoint is None else checkpoint.resumed_s)
        draft = replace(
            _draft(policy, outcome, cost, wall_s=trained - start, train_s=trained - ready),
            seed=seed,
            **(origin if checkpoint is None else checkpoint.origin).model_dump(),
        )
        return _measured(draft, network, task, teacher, settings, seed, ranks), network


def run_trials(
    policies: Sequence[Policy],
    task: Task,
    teacher: Teacher,
    settings: TrainingSettings,
    costs: Sequence[Mapping[str, float]],
    *,
    donors: Sequence[Donor | None] | None = None,
    seed: int,
) -> list[tuple[TrialResult, nn.Module]]:
    """Train the networks of several policies in one pass, and measure each.

    The same pass has the same results, bit for bit. Each is that of `run_trial` within rounding,
    which training amplifies: in floating point the order of sums depends on the whole pass. Shared
    seconds are divided evenly.

    Args:
        policies: Any number; their networks are trained as one.
        task: Network and data; `why_not_stackable` must find nothing in its network.
        teacher: Full-precision network.
        settings: The training recipe.
        costs: The total cost figures of each policy.
        donors: Whose weights each begins from; None where it is the teacher's.
        seed: Of everything random in each trial.

    Returns:
        For each policy its result and its trained quantized network.

    Raises:
        PolicyError: A policy does not fit the network.
    """
    start = time.perf_counter()
    begun = donors or [None] * len(policies)
    with torch.random.fork_rng(devices=[]):
        networks = [
            _student(policy, task, teacher, settings, donor, seed)
            for policy, donor in zip(policies, begun, strict=True)
        ]
        ready = time.perf_counter()
        stack = Stack(networks)
        outcomes = fit_stack(stack, task, settings, teacher=teacher, seed=seed)
        stack.unstack_()
        for network, outcome in zip(networks, outcomes, strict=True):
            if outcome.is_finite:
                snap_codebooks_(network)
        stack = Stack(networks)
        with fused_norms(stack):
            reestimate_batch_norm_(stack, training_inputs(stack, task, settings, seed=seed))
        stack.unstack_()
        trained = time.perf_counter()
        wall_s, train_s = ((trained - since) / len(policies) for since in (start, ready))
        drafts = [
            replace(
                _draft(policy, outcome, cost, wall_s=wall_s, train_s=train_s),
                seed=seed,
                **_origin_of(donor).model_dump(),
            )
            for policy, outcome, cost, donor in zip(policies, outcomes, costs, begun, strict=True)
        ]
        return [
            (_measured(draft, network, task, teacher, settings, seed), network)
            for draft, network in zip(drafts, networks, strict=True)
        ]


def _student(
    policy: Policy,
    task: Task,
    teacher: Teacher,
    settings: TrainingSettings,
    donor: Donor | None,
    seed: int,
) -> nn.Module:
    """Return the network under a policy with the weights that training begins from, calibrated."""
    torch.manual_seed(seed)
    network = task.make_network()
    calibration = task.calibration(settings.calibration_samples, seed=seed)
    if donor is not None:
        return begin_from_(network, policy, donor, calibration)
    network.load_state_dict(teacher.network.state_dict())
    return apply_policy_(network, policy, calibration)


def _origin_of(donor: Donor | None) -> Origin:
    if donor is None:
        return Origin()
    return Origin(donor=donor.policy.hash, epochs_before=donor.epochs)


def _draft(
    policy: Policy, outcome: FitOutcome, cost: Mapping[str, float], *, wall_s: float, train_s: float
) -> TrialResult:
    """Return what is known after training."""
    state: State = "complete"
    reason = None
    if outcome.was_stopped:
        state, reason = "stopped", "stopped by the monitor"
    if not outcome.is_finite:
        state = "diverged"
        reason = f"the training loss became {outcome.loss} in epoch {outcome.epochs}"
    return TrialResult(
        policy=policy,
        state=state,
        accuracy=None,
        loss=None,
        kl=None,
        cost=dict(cost),
        epochs=outcome.epochs,
        wall_s=wall_s,
        train_s=train_s,
        reason=reason,
    )


def _measured(
    draft: TrialResult,
    network: nn.Module,
    task: Task,
    teacher: Teacher,
    settings: TrainingSettings,
    seed: int,
    ranks: Ranks = ALONE,
) -> TrialResult:
    """Fill in what the validation part and the quantizers say; nothing after a divergence."""
    if draft.state == "diverged":
        return draft
    start = time.perf_counter()
    with global_batch_norms(network, ranks):
        measured = evaluate(network, task.validation, teacher, ranks=ranks)
    evaluated = time.perf_counter()
    health = measure_health(network, task.calibration(settings.calibration_samples, seed=seed))
    return replace(
        _judged(draft, measured, task),
        health=asdict(health),
        weights_fingerprint=fingerprint_of(weights_of(network)),
        wall_s=draft.wall_s + time.perf_counter() - start,
        train_s=draft.train_s + evaluated - start,
    )


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
