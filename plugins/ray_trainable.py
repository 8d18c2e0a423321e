"""`policy_trainable`: a trial as a Tune trainable, for the host and for anybody's own `Tuner`.

Example:
    >>> # session = prepare(plan(read_job(Path("my.yaml"))), Path("results/my"))
    >>> # stopping = ASHAScheduler(metric="train_loss", mode="min", max_t=8)
    >>> # tune.Tuner(
    >>> #     policy_trainable(session, cpus=1),
    >>> #     param_space=param_space(session.plan),
    >>> #     tune_config=tune.TuneConfig(num_samples=20, scheduler=stopping, reuse_actors=True),
    >>> #     run_config=tune.RunConfig(callbacks=[SessionRecorder(session)]),
    >>> # ).fit()
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adq_search.job import MEASURED
from adq_search.plan import Plan
from adq_search.plugins._ray_installed import tune
from adq_search.plugins._ray_parcel import Parcel, opened
from adq_search.policy import Policy
from adq_search.session import Session
from adq_search.space import Parameter

#: State of a draw that no training was spent on.
OVER_BUDGET = "over budget"
#: State that a trial reports before its last epoch.
RUNNING = "running"

#: Key of a configuration beside the space's parameters: the seed of a replicate.
REPLICATE_SEED = "replicate_seed"

Trainable = Callable[[dict[str, Any]], None]


def policy_trainable(
    session: Session,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    threads: int | None = None,
    interrupted: Mapping[str, tune.Checkpoint] | None = None,
) -> Trainable:
    """Return a function trainable that measures the policy its configuration stands for.

    Network, data and teacher go through Ray's object store once, and are unpacked once in each
    worker process; with `TuneConfig(reuse_actors=True)` that is once for many trials. No file of
    the driver is needed.

    A trial reports after every epoch, with the epoch as `training_iteration`: the training loss
    (`train_loss`, and its curve so far, `train_losses`), every cost figure, by how much each budget
    is exceeded (`constraints`), and its `state`. Accuracy, loss and KL are NaN until the last
    report, so that nobody takes a trial that was stopped for a finished one: schedulers go by
    `train_loss`. A draw over budget is reported as such, untrained.

    A Tune checkpoint of a trial is a session's folder with this trial alone: after some epochs (as
    `training.checkpoint_every_s` says) its training checkpoint, with the last report its result and
    weights. A trial that is restored goes on from there, bit for bit.

    A configuration with a `replicate_seed` measures its policy with that seed, as a replicate.

    Args:
        session: The prepared job.
        cpus: Processors that a trial reserves.
        gpus: GPUs that a trial reserves; a fraction shares one among several.
        threads: Torch threads of a trial; None for as many as this process has.
        interrupted: Last checkpoints of trials of earlier experiments, by the hash of the policy.
    """
    with_parameters = tune.with_parameters(
        adq_policy,
        parcel=Parcel.of(session),
        n_threads=threads or torch.get_num_threads(),
        interrupted=dict(interrupted or {}),
    )
    resources = {"cpu": cpus} | ({"gpu": gpus} if gpus else {})
    trainable: Trainable = tune.with_resources(with_parameters, resources)
    return trainable


def param_space(plan: Plan) -> dict[str, Any]:
    """Return the plan's parameters as a flat Tune space, for Tune's own searchers."""
    return {parameter.name: _domain(parameter) for parameter in plan.space.parameters}


def adq_policy(
    config: dict[str, Any],
    *,
    parcel: Parcel,
    n_threads: int,
    interrupted: Mapping[str, tune.Checkpoint],
) -> None:
    """Be a Ray trial: train the policy, report every epoch, and leave result and weights.

    Its name is that of the trainable, which `Tuner.restore` compares.
    """
    torch.set_num_threads(n_threads)
    session = opened(parcel)
    plan = session.plan
    params = dict(config)
    seed = params.pop(REPLICATE_SEED, None)
    policy = plan.space.policy_of(params)
    totals = plan.totals(policy)
    excess = plan.excess(totals)
    known = {**totals, "constraints": excess, "policy_hash": policy.hash}
    if any(amount > 0.0 for amount in excess.values()):
        tune.report({**_UNMEASURED, **known, "state": OVER_BUDGET, "training_iteration": 0})
        return
    with tempfile.TemporaryDirectory() as folder:
        own = replace(session, folder=Path(folder))
        _take_up(own, tune.get_checkpoint(), interrupted.get(policy.hash))
        epochs = _Epochs(own, policy, known, seed=seed)
        result = own.measure(policy, epochs, checkpoint=epochs.checkpoint, seed=seed)
        measured = {name: getattr(result, name) for name in MEASURED}
        report = {**known, **_numbers(measured), **epochs.report_of(result.epochs, result.state)}
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _take_up(
    session: Session, restored: tune.Checkpoint | None, interrupted: tune.Checkpoint | None
) -> None:
    """Fill a trial's folder with what an earlier attempt left."""
    if restored is not None:
        restored.to_directory(session.folder)
    elif interrupted is not None:
        interrupted.to_directory(session.folder)
        for half_written in ("trials", "weights"):
            shutil.rmtree(session.folder / half_written, ignore_errors=True)


class _Epochs:
    """A monitor that passes each epoch but the last on to Tune; the last comes with the result.

    Where Tune stops the trial, its report does not return. Epochs before an interruption were
    reported before it.

    Attributes:
        checkpoint: Where the trial saves itself.
    """

    def __init__(
        self, session: Session, policy: Policy, known: Mapping[str, Any], *, seed: int | None
    ) -> None:
        self.checkpoint = session.checkpoint_of(policy, seed=seed, on_saved=self._note)
        self._folder = session.folder
        self._known = known
        self._n_epochs = session.plan.job.training.epochs
        self._losses: list[float] = []
        self._saved_epoch = 0

    def report(self, epoch: int, loss: float) -> None:
        """Take the mean training loss of an epoch."""
        self._losses.append(loss)
        if self.checkpoint.resumed_epochs < epoch < self._n_epochs:
            is_saved = self._saved_epoch == epoch
            tune.report(
                {**_UNMEASURED, **self._known, **self.report_of(epoch, RUNNING)},
                checkpoint=tune.Checkpoint.from_directory(self._folder) if is_saved else None,
            )

    def should_stop(self) -> bool:
        """Never stop: Tune does."""
        return False

    def report_of(self, epoch: int, state: str) -> dict[str, Any]:
        """Return what is reported of training."""
        return {
            "training_iteration": epoch,
            "state": state,
            "train_loss": self._losses[-1] if self._losses else math.nan,
            "train_losses": list(self._losses),
        }

    def _note(self, epoch: int) -> None:
        self._saved_epoch = epoch


_UNMEASURED = {"train_loss": math.nan, "train_losses": [], **dict.fromkeys(MEASURED, math.nan)}


def _numbers(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in figures.items()}


def _domain(parameter: Parameter) -> Any:
    if parameter.kind == "categorical":
        return tune.choice(list(parameter.values))
    if parameter.step == 1:
        return tune.randint(parameter.low, parameter.high + 1)
    return tune.choice(list(range(parameter.low, parameter.high + 1, parameter.step)))
