"""From what a host ran to the folder of results: test accuracy of the front, policies, report."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

from adq_search.hosting import HostedTrial, HostOptions, HostOutcome
from adq_search.policy import save_policy
from adq_search.prior import rank_correlation
from adq_search.provenance import provenance
from adq_search.report import (
    FrontReport,
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
from adq_search.training import evaluate


def write_outcome(
    session: Session, outcome: HostOutcome, options: HostOptions, *, started: float
) -> FrontReport:
    """Measure the final front on the test part, and write everything a run leaves behind.

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
    records = [_record(trial) for trial in outcome.trials]
    front = select_front(records, search.axes, search.budgets)
    shown = front or least_violating(records, search.budgets, len(records))
    kept = _distinct([*shown, *uniform_records(records)])
    tested = {r.policy_hash: _test_accuracy(session, r) for r in kept if r.is_complete}
    made = provenance(seed=search.seed)
    for record in kept:
        save_policy(
            record.policy,
            session.folder / "policies" / f"{record.policy_hash}.json",
            network={"task": plan.job.task, "fingerprint": plan.summary.fingerprint},
            metrics={
                "accuracy": record.accuracy,
                "test_accuracy": tested.get(record.policy_hash),
                "loss": record.loss,
                "kl": record.kl,
                "epochs": record.epochs,
                "cost": record.cost,
            },
            provenance={**made, "study": options.study, "trial": record.number},
        )
    _remove_other_weights(session, keep=tested)
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
        n_rejected=outcome.n_rejected,
        n_repeated=outcome.n_repeated,
        prior=_prior_quality(session, records),
        seconds={
            **session.seconds,
            "trials": math.fsum(t.result.wall_s for t in outcome.trials),
            "training": training_s,
            "test": time.perf_counter() - began,
            "run": time.perf_counter() - started,
        },
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


def _record(trial: HostedTrial) -> TrialRecord:
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
    )


def _distinct(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return list({record.policy_hash: record for record in records}.values())


def _test_accuracy(session: Session, record: TrialRecord) -> float:
    file = session.weights_file(record.policy)
    network = load_quantized(session.plan.task, record.policy, file)
    return evaluate(network, session.plan.task.test).accuracy


def _remove_other_weights(session: Session, *, keep: Iterable[str]) -> None:
    kept = set(keep)
    for file in (session.folder / "weights").glob("*.safetensors"):
        if file.stem not in kept:
            file.unlink()


def _prior_quality(session: Session, records: list[TrialRecord]) -> dict[str, Any] | None:
    """Say how well the prior ranked its own proposals: predicted loss increase against KL."""
    predicted = {s.policy.hash: s.predicted for s in session.seeds if s.predicted is not None}
    if not predicted:
        return None
    pairs = [
        (predicted[r.policy_hash], r.kl)
        for r in records
        if r.policy_hash in predicted and r.kl is not None
    ]
    correlation = rank_correlation([p for p, _ in pairs], [k for _, k in pairs])
    return {
        "estimator": session.plan.job.search.prior,
        "n_seeds": len(predicted),
        "n_measured": len(pairs),
        "rank_correlation": None if math.isnan(correlation) else correlation,
    }
