"""Samples taken one piece at a time: timed, budgeted, kept, and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from adq_search.errors import SensitivityError
from adq_search.sensitivity._base import Scores, SensitivityEstimator, Subject
from adq_search.sensitivity._ledger import Ledger

OnProgress = Callable[[int, int], None]
OnEta = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long an estimate may take, and who hears of it.

    Attributes:
        budget_s: Seconds after which no new sample begins; None for no limit.
        on_progress: Called with pieces done and pieces in all.
        on_eta: Called once, after the first piece, with the seconds that the rest will take.
    """

    budget_s: float | None = None
    on_progress: OnProgress | None = None
    on_eta: OnEta | None = None


def take_samples(
    estimator: SensitivityEstimator, subject: Subject, ledger: Ledger, effort: Effort
) -> list[Scores]:
    """Return the samples of an estimate; pieces that the ledger knows are not done again.

    Sampling ends when all are taken, when the estimator is settled, or when the next sample would
    pass the budget; never below the estimator's least number. What a budget ended stays ended until
    a larger one is given.

    Raises:
        SensitivityError: The least number of samples would not fit the budget.
    """
    start = time.perf_counter()
    parts = estimator.parts(subject)
    most = estimator.n_samples(subject)
    least = min(estimator.min_samples, most)
    total, spent, n_timed = most * len(parts), 0.0, 0
    samples: list[Scores] = []
    for index in range(most):
        if ledger.is_end(index, effort.budget_s):
            break
        found: Scores = {}
        for i, part in enumerate(parts):
            known = ledger.recall(index, part)
            if known is None:
                subject.prepare()
                began = time.perf_counter()
                known = estimator.sample(subject, index, part)
                spent += time.perf_counter() - began
                n_timed += 1
                ledger.record(index, part, known)
                if n_timed == 1:
                    left = spent * (least * len(parts) - index * len(parts) - i - 1)
                    _check_budget(effort.budget_s, spent + left, estimator.name, least)
                    if effort.on_eta is not None:
                        effort.on_eta(spent * (total - index * len(parts) - i - 1))
            found |= known
            if effort.on_progress is not None:
                effort.on_progress(index * len(parts) + i + 1, total)
        samples.append(found)
        if len(samples) < least:
            continue
        next_s = spent / max(n_timed, 1) * len(parts)
        passed = time.perf_counter() - start
        is_late = effort.budget_s is not None and passed + next_s > effort.budget_s
        if is_late and effort.budget_s is not None:
            ledger.record_end(len(samples), effort.budget_s)
        if is_late or estimator.is_settled(samples):
            break
    if effort.on_progress is not None:
        effort.on_progress(total, total)
    return samples


def _check_budget(budget_s: float | None, needed_s: float, name: str, least: int) -> None:
    if budget_s is not None and needed_s > budget_s:
        msg = (
            f"An estimate needs {least} samples at least, for which '{name}' takes about "
            f"{needed_s:.3g} s here, but the time budget is {budget_s:.3g} s. Give more time or "
            "fewer examples, or take the estimator 'fisher'."
        )
        raise SensitivityError(msg)
