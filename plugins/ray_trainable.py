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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adq_search.donors import bring_donor, donor_result, is_donor_chosen
from adq_search.errors import StorageError
from adq_search.job import MEASURED
from adq_search.own_process import set_up_process
from adq_search.plan import Plan
from adq_search.plugins._ray_home import donor_at_home, measured_at_home
from adq_search.plugins._ray_installed import tune
from adq_search.plugins._ray_parcel import Parcel, opened
from adq_search.policy import Policy
from adq_search.session import Session
from adq_search.space import Parameter
from adq_search.trial import TrialResult

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

    A policy that has ended already in the session's folder is not trained again: its trial reports
    what is recorded, with `repeated` set, and no checkpoint. Of two that draw a policy at once, the
    second waits for the first, and takes its place should that fail. Warm trials
    (`training.warm_start`) begin from the donor that the folder names, and from the teacher, with a
    `warning`, where its weights cannot be had. All this needs a `SessionRecorder` among the
    callbacks, which answers for the folder.

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
    set_up_process(n_threads)
    session = opened(parcel)
    plan = session.plan
    params = dict(config)
    seed = params.pop(REPLICATE_SEED, None)
    policy = plan.space.policy_of(params)
    totals = plan.totals(policy)
    excess = plan.excess(totals)
    known = {**_UNTOLD, **totals, "constraints": excess, "policy_hash": policy.hash}
    if any(amount > 0.0 for amount in excess.values()):
        tune.report({**_UNMEASURED, **known, "state": OVER_BUDGET, "training_iteration": 0})
        return
    trial_id = tune.get_context().get_trial_id()
    earlier = measured_at_home(parcel.home, policy.hash, trial_id) if seed is None else None
    if earlier is not None:
        tune.report({**known, **_report_of(earlier.result, earlier.train_losses), "repeated": True})
        return
    with tempfile.TemporaryDirectory() as folder:
        own = replace(session, folder=Path(folder))
        _take_up(own, tune.get_checkpoint(), interrupted.get(policy.hash))
        if plan.job.training.warm_start:
            known |= _begin_warm(own, policy, parcel.home, may_be_cold=seed is None)
        epochs = _Epochs(own, policy, known, seed=seed)
        result = own.measure(policy, epochs, checkpoint=epochs.checkpoint, seed=seed)
        report = {**known, **_report_of(result, epochs.losses)}
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _take_up(
    session: Session, restored: tune.Checkpoint | None, interrupted: tune.Checkpoint | None
) -> None:
    """Fill a trial's folder with what an earlier attempt left."""
    if restored is not None:
        restored.to_directory(session.folder)
    elif interrupted is not None:
        interrupted.to_directory(session.folder)
        for half_written in ("trials", "weights", "donors"):
            shutil.rmtree(session.folder / half_written, ignore_errors=True)


def _begin_warm(
    session: Session, policy: Policy, home: str, *, may_be_cold: bool
) -> dict[str, Any]:
    """Bring a trial's donor into its folder, unless an earlier attempt did.

    Args:
        session: With the trial's own folder.
        policy: What is to be trained.
        home: The search's folder on the driver's machine.
        may_be_cold: Whether training may begin from the teacher where the donor cannot be had.

    Returns:
        What is reported of the donor.

    Raises:
        StorageError: The donor cannot be had, and training may not begin from the teacher.
    """
    warning = ""
    if not is_donor_chosen(session.folder, policy):
        try:
            files = donor_at_home(home, policy)
        except StorageError as error:
            if not may_be_cold:
                raise
            files, warning = None, f"Policy {policy.hash} is trained from the teacher. {error}"
        bring_donor(session.folder, policy, files)
    donor = donor_result(session.folder, policy)
    if donor is None:
        return {"warning": warning}
    return {"donor": donor.policy.hash, "epochs_before": donor.epochs + donor.epochs_before}


class _Epochs:
    """A monitor that passes each epoch but the last on to Tune; the last comes with the result.

    Where Tune stops the trial, its report does not return. Epochs before an interruption were
    reported before it.

    Attributes:
        checkpoint: Where the trial saves itself.
        losses: Mean training loss of each epoch so far.
    """

    def __init__(
        self, session: Session, policy: Policy, known: Mapping[str, Any], *, seed: int | None
    ) -> None:
        self.checkpoint = session.checkpoint_of(policy, seed=seed, on_saved=self._note)
        self._folder = session.folder
        self._known = known
        self._n_epochs = session.plan.job.training.epochs
        self.losses: list[float] = []
        self._saved_epoch = 0

    def report(self, epoch: int, loss: float) -> None:
        """Take the mean training loss of an epoch."""
        self.losses.append(loss)
        if self.checkpoint.resumed_epochs < epoch < self._n_epochs:
            is_saved = self._saved_epoch == epoch
            tune.report(
                {
                    **_UNMEASURED,
                    **self._known,
                    **_training_report(epoch, RUNNING, self.losses),
                },
                checkpoint=tune.Checkpoint.from_directory(self._folder) if is_saved else None,
            )

    def should_stop(self) -> bool:
        """Never stop: Tune does."""
        return False

    def _note(self, epoch: int) -> None:
        self._saved_epoch = epoch


_UNMEASURED = {"train_loss": math.nan, "train_losses": [], **dict.fromkeys(MEASURED, math.nan)}
_UNTOLD = {"repeated": False, "donor": None, "epochs_before": 0, "warning": ""}


def _training_report(epoch: int, state: str, losses: Sequence[float]) -> dict[str, Any]:
    return {
        "training_iteration": epoch,
        "state": state,
        "train_loss": losses[-1] if losses else math.nan,
        "train_losses": list(losses),
    }


def _report_of(result: TrialResult, losses: Sequence[float]) -> dict[str, Any]:
    """Return the last report of a trial; what was not measured is NaN."""
    figures = {name: getattr(result, name) for name in MEASURED}
    return {
        **{name: math.nan if value is None else value for name, value in figures.items()},
        **_training_report(result.epochs, result.state, losses),
        "donor": result.donor,
        "epochs_before": result.epochs_before,
    }


def _domain(parameter: Parameter) -> Any:
    if parameter.kind == "categorical":
        return tune.choice(list(parameter.values))
    if parameter.step == 1:
        return tune.randint(parameter.low, parameter.high + 1)
    return tune.choice(list(range(parameter.low, parameter.high + 1, parameter.step)))
