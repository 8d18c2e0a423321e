"""A job whose every name is resolved, before anything is trained.

Here mistakes are found while they are cheap: tasks, layers, schemes and hardware that do not exist,
empty spaces, budgets nobody can meet, results that belong to another job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adq_search.errors import StorageError
from adq_search.hardware import CostReport, Hardware, cost, load_hardware, total_of
from adq_search.job import MEASURED, Job
from adq_search.policy import FLOAT, Policy
from adq_search.prior import check_budgets, cost_range
from adq_search.space import SearchSpace
from adq_search.tasks import Task, load_task
from adq_search.tracing import ModelSummary, trace
from adq_search.training import check_precision
from adq_search.trial import TrialResult


@dataclass(frozen=True)
class Plan:
    """A job whose every name is resolved; nothing is trained yet.

    Attributes:
        job: What the user asked for.
        task: Network and data.
        summary: The traced network.
        space: Which policies may be tried.
        hardware: The cost model.
        fingerprint: What results of this job must agree on, by part: network, data, space,
            recipe.
    """

    job: Job
    task: Task
    summary: ModelSummary
    space: SearchSpace
    hardware: Hardware
    fingerprint: dict[str, str]

    def cost(self, policy: Policy) -> CostReport:
        """Return the cost of a policy, per layer and in total."""
        return cost(self.summary, policy, self.hardware)

    def totals(self, policy: Policy) -> dict[str, float]:
        """Return the total cost figures of a policy, by name."""
        return total_of(self.cost(policy))

    def excess(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return by how much each budget is exceeded; zero or less is within."""
        return {name: totals[name] - limit for name, limit in self.job.search.budgets.items()}

    def values(self, result: TrialResult) -> tuple[float, ...]:
        """Return the objective values of a complete trial, in the job's order."""
        values = {**result.cost, **{name: getattr(result, name) for name in MEASURED}}
        return tuple(float(values[name]) for name in self.job.search.objectives)

    def cost_range(self, name: str) -> tuple[float, float]:
        """Return the smallest and largest value of a cost figure over the whole space."""
        return cost_range(self.space, self.summary, name, self.hardware)

    def full_precision_policy(self) -> Policy:
        """Return the policy that leaves every layer in floating point."""
        return Policy.uniform(self.summary.all_names, FLOAT)


def plan(job: Job) -> Plan:
    """Resolve a job without training anything.

    Warns (`AdqSearchWarning`) of a precision that is slow on this machine.

    Raises:
        AdqSearchError: A task, layer, scheme or hardware that does not exist, an empty space, or a
            budget that no policy of the space meets.
    """
    task = load_task(job.task, job.task_options)
    check_precision(job.training, task.example().device.type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.search.seed)
        summary = trace(task.make_network(), task.example())
    space = SearchSpace.from_spec(job.space, summary)
    hardware = load_hardware(job.search.hardware)
    fingerprint = _fingerprint(job, task, summary, space, hardware)
    planned = Plan(job, task, summary, space, hardware, fingerprint)
    check_budgets(space, summary, job.search.budgets, hardware)
    return planned


def check_fingerprint(stored: Mapping[str, str], ours: Mapping[str, str], *, where: str) -> None:
    """Refuse results that were made of something else.

    Raises:
        StorageError: Names the parts that differ.
    """
    differing = [part for part in ours if stored.get(part) != ours[part]]
    if differing:
        msg = (
            f"The {where} belongs to another job: {', '.join(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'} "
            f"({'; '.join(f'{p} {stored.get(p)} there, {ours[p]} here' for p in differing)}). "
            "Choose another --study or --out, or run the job it belongs to."
        )
        raise StorageError(msg)


#: Search settings that no single result depends on, so that a search goes on under others.
_NOT_IN_RESULTS = {
    *("trials", "prior", "seeds", "prior_samples", "prior_budget_s"),
    *("sampler", "pruner", "stop", "replicates"),
    "hardware",  # what the file says counts, not where it lies
}


def _fingerprint(
    job: Job, task: Task, summary: ModelSummary, space: SearchSpace, hardware: Hardware
) -> dict[str, str]:
    search = job.search.model_dump(mode="json", exclude=_NOT_IN_RESULTS)
    recipe = {
        "training": _training_of(job),
        "search": search,
        "hardware": repr(hardware),
    }
    text = json.dumps(recipe, sort_keys=True)
    return {
        "network": summary.fingerprint,
        "data": task.fingerprint(),
        "space": space.fingerprint,
        "recipe": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def _training_of(job: Job) -> dict[str, Any]:
    """Return the recipe; a cold start is left out, as by versions that knew no other."""
    recipe = job.training.model_dump(mode="json", exclude={"checkpoint_every_s"})
    return {k: v for k, v in recipe.items() if k != "warm_start" or v}
