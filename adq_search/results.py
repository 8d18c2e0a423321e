"""From what a host ran to the folder of results: the front tested, run in integers, reported."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adq_search.donors import donors_of
from adq_search.errors import AdqSearchWarning, IntegerError, StorageError
from adq_search.evaluation import evaluate
from adq_search.hosting import HostedTrial, HostOptions, HostOutcome
from adq_search.integer import lower, verify
from adq_search.policy import save_policy
from adq_search.prior_quality import prior_quality
from adq_search.provenance import provenance
from adq_search.report import (
    FrontReport,
    IntegerCheck,
    Replicate,
    TrialRecord,
    full_precision_point,
    least_violating,
    make_front_report,
    select_front,
    uniform_records,
    write_results,
)
from adq_search.session import Session
from adq_search.store import load_quantized
from adq_search.trial import TrialResult, fingerprint_of, weights_of

#: Validation samples on which a kept policy must run in integers as it was measured.
INTEGER_SAMPLES = 200


def write_outcome(
    session: Session, outcome: HostOutcome, options: HostOptions, *, started: float
) -> FrontReport:
    """Measure the final front on the test part and in integers, and write what a run leaves behind.

    The test part is touched here and nowhere else. Baselines are tested too, so that front and
    baselines can be compared; weights of other policies are removed.

    Args:
        session: The prepared job.
        outcome: What the host ran.
        options: What the user asked of the host.
        started: `time.perf_counter()` at the start of the run.

    Returns:
        The front in numbers, as written to `front.json`.
    """
    began = time.perf_counter()
    plan, search = session.plan, session.plan.job.search
    records = [record_of(trial) for trial in outcome.trials]
    front = select_front(records, search.axes, search.budgets)
    shown = front or least_violating(records, search.budgets, len(records))
    replicates = _replicates(session, front)
    kept = _distinct([*shown, *uniform_records(records)])
    tested: dict[str, float] = {}
    in_integers: dict[str, IntegerCheck] = {}
    integers_s = 0.0
    for record in kept:
        if record.is_complete:
            name = record.policy_hash
            network = load_quantized(plan.task, record.policy, session.weights_file(record.policy))
            tested[name] = evaluate(network, plan.task.test).accuracy
            tested_at = time.perf_counter()
            in_integers[name] = _check_integers(session, name, network)
            integers_s += time.perf_counter() - tested_at
    made = provenance(seed=search.seed)
    for record in kept:
        save_measured_policy(
            session,
            record,
            session.folder / "policies" / f"{record.policy_hash}.json",
            {**made, "study": options.study, "trial": record.number},
            test_accuracy=tested.get(record.policy_hash),
        )
    _remove_other_weights(session, keep={*tested, *donors_of(session.folder, list(tested))})
    training_s = math.fsum(t.result.train_s for t in outcome.trials)
    report = make_front_report(
        options.study,
        objectives=search.axes,
        budgets=search.budgets,
        records=records,
        full_precision=full_precision_point(
            accuracy=session.full_precision.accuracy,
            test_accuracy=evaluate(session.teacher.network, plan.task.test).accuracy,
            loss=session.full_precision.loss,
            cost=plan.totals(plan.full_precision_policy()),
            weights_file="teacher.safetensors",
        ),
        test_accuracies=tested,
        kept_weights=tested.keys(),
        integer_checks=in_integers,
        replicates=replicates,
        seed=search.seed,
        n_rejected=outcome.n_rejected,
        n_repeated=outcome.n_repeated,
        prior=_prior_quality(session, records),
        seconds={
            **session.seconds,
            "trials": math.fsum(t.result.wall_s for t in outcome.trials),
            **_replicates_s(replicates),
            "training": training_s,
            "test": time.perf_counter() - began - integers_s,
            "integers": integers_s,
            "run": time.perf_counter() - started,
        },
        end=None if outcome.end is None else outcome.end.to_json(),
        false_stops=None if outcome.false_stops is None else asdict(outcome.false_stops),
    )
    write_results(
        session.folder,
        report,
        records,
        costs={r.policy_hash: plan.cost(r.policy).to_json() for r in kept},
        run={
            **made,
            "study": options.study,
            "workers": options.workers,
            "threads": torch.get_num_threads(),
            "job": plan.job.to_plain(),
            "fingerprint": plan.fingerprint,
            "coverage": plan.cost(plan.full_precision_policy()).to_json()["coverage"],
        },
    )
    return report


def save_measured_policy(
    session: Session,
    record: TrialRecord,
    file: Path,
    made: Mapping[str, Any],
    *,
    test_accuracy: float | None = None,
) -> None:
    """Write a policy with what was measured of it.

    Args:
        session: The prepared job.
        record: The trial that measured it.
        file: A policy file, as `load_policy` reads it.
        made: Its provenance.
        test_accuracy: 0 to 1; None where the test part was not touched.
    """
    plan = session.plan
    save_policy(
        record.policy,
        file,
        network={"task": plan.job.task, "fingerprint": plan.summary.fingerprint},
        metrics={
            "accuracy": record.accuracy,
            "test_accuracy": test_accuracy,
            "loss": record.loss,
            "kl": record.kl,
            "epochs": record.epochs,
            "cost": record.cost,
        },
        provenance=dict(made),
    )


def record_of(trial: HostedTrial) -> TrialRecord:
    """Return a host's trial in the form that results are written in."""
    result = trial.result
    return TrialRecord(
        number=trial.number,
        policy=result.policy,
        parameters=dict(trial.parameters),
        state=result.state,
        origin=trial.origin,
        accuracy=result.accuracy,
        loss=result.loss,
        kl=result.kl,
        cost=dict(result.cost),
        epochs=result.epochs,
        wall_s=result.wall_s,
        reason=result.reason,
        health=dict(result.health),
        host_label=trial.worker,
        started_at=trial.started_at,
        donor=result.donor,
        epochs_before=result.epochs_before,
    )


def _replicates(session: Session, front: Iterable[TrialRecord]) -> dict[str, list[Replicate]]:
    """Return the further trainings of a front that the job asks for; train those that lack."""
    seeds = session.plan.job.search.replicate_seeds
    return {
        record.policy_hash: [_replicate_of(session.measure(record.policy, seed=s)) for s in seeds]
        for record in front
        if seeds
    }


def _replicates_s(replicates: Mapping[str, list[Replicate]]) -> dict[str, float]:
    if not replicates:
        return {}
    return {"replicates": math.fsum(r.wall_s for runs in replicates.values() for r in runs)}


def _replicate_of(result: TrialResult) -> Replicate:
    return Replicate(
        seed=int(result.seed or 0),
        state=result.state,
        accuracy=result.accuracy,
        loss=result.loss,
        kl=result.kl,
        epochs=result.epochs,
        wall_s=result.wall_s,
        reason=result.reason,
    )


def _distinct(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return list({record.policy_hash: record for record in records}.values())


def _check_integers(session: Session, policy_hash: str, network: nn.Module) -> IntegerCheck:
    """Lower a trained network and compare it with itself, code by code and class by class."""
    result = session.result_of_hash(policy_hash)
    measured = None if result is None else result.weights_fingerprint
    if measured not in (None, fingerprint_of(weights_of(network))):
        return IntegerCheck(False, 0, "The weights file holds other weights than were measured.")
    task = session.plan.task
    inputs = next(task.validation.batches(INTEGER_SAMPLES)).inputs
    try:
        integer = lower(network, task.calibration(INTEGER_SAMPLES, seed=0))
    except IntegerError as error:
        return IntegerCheck(None, 0, str(error))
    found = verify(network, integer, [inputs])
    if found.is_verified:
        return IntegerCheck(True, found.samples)
    reason = (
        f"Of {found.codes} codes {found.unexplained} differ and are no ties; of {found.samples} "
        f"samples {found.other_classes} get another class."
    )
    return IntegerCheck(False, found.samples, reason)


def _remove_other_weights(session: Session, *, keep: Iterable[str]) -> None:
    kept = set(keep)
    for file in (session.folder / "weights").glob("*.safetensors"):
        if file.stem not in kept:
            file.unlink()


def _prior_quality(session: Session, records: list[TrialRecord]) -> dict[str, Any] | None:
    """Say how well the prior ranked what was measured; None where there is none to judge."""
    seeds = {s.policy.hash for s in session.seeds if s.predicted is not None}
    if not seeds:
        return None
    try:
        table = session.sensitivity()
    except StorageError as error:  # written by another version: a report does not fail for it
        warnings.warn(f"The prior is not judged. {error}", AdqSearchWarning, stacklevel=2)
        return None
    space = session.plan.space
    measured = {r.policy_hash: (r.policy, r.kl) for r in records if r.kl is not None}
    of_seeds = [pair for name, pair in measured.items() if name in seeds]
    return {
        **prior_quality(space, table, list(measured.values())).to_json(),
        "n_seeds": len(seeds),
        "seeds_rank_correlation": prior_quality(space, table, of_seeds).rank_correlation,
    }
