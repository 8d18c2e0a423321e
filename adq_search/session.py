"""A planned job made ready in a folder: teacher trained, seeds chosen, results kept.

`prepare` trains the teacher, asks the prior for seeds, and writes both down; `reopen` reads them
back, in another process or after an interruption. Hosts see a `Session` and nothing below it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from adq_search.distill import Teacher
from adq_search.errors import StorageError
from adq_search.files import read_json, write_atomic, write_json
from adq_search.job import Job
from adq_search.plan import Plan, check_fingerprint, plan
from adq_search.policy import Policy
from adq_search.prior import propose_seeds
from adq_search.progress import NoProgress, Progress
from adq_search.sensitivity import SensitivityEstimator, SensitivityTable, sensitivity_table
from adq_search.teacher import load_weights_, make_teacher
from adq_search.training import EpochProgress, Evaluation, Monitor, evaluate
from adq_search.trial import TrialResult, run_trial, run_trials, weights_of

SCHEMA = "adq_search.session/1"
#: What the prior measured, beside the session's other files.
SENSITIVITY_FILE = "sensitivity.json"


@dataclass(frozen=True, slots=True)
class Seed:
    """A policy to try before any the sampler draws.

    Attributes:
        policy: What to try.
        origin: Who proposed it: `uniform W4A4`, `prior fisher 3/8`.
        predicted: The loss increase its prior predicts, nats; None for a baseline.
    """

    policy: Policy
    origin: str
    predicted: float | None = None


@dataclass(frozen=True)
class Session:
    """A prepared job in its folder: teacher trained, seeds chosen, results kept.

    Attributes:
        plan: The job, resolved.
        folder: Where everything of this search is written.
        teacher: The full-precision network.
        full_precision: The teacher on the validation part.
        seeds: Baselines and the prior's proposals, in the order they should run.
        seconds: Time spent on the teacher and on the prior.
    """

    plan: Plan
    folder: Path
    teacher: Teacher
    full_precision: Evaluation
    seeds: tuple[Seed, ...]
    seconds: dict[str, float]

    def measure(self, policy: Policy, monitor: Monitor | None = None) -> TrialResult:
        """Return the result of a policy: from the folder if it was ever measured, else by a trial.

        The result and the weights are on disk before this returns, so that whatever kills the
        caller loses nothing that was finished.
        """
        known = self.result_of(policy)
        if known is not None:
            return known
        job = self.plan.job
        result, network = run_trial(
            policy,
            self.plan.task,
            self.teacher,
            job.training,
            self.plan.totals(policy),
            monitor=monitor,
            seed=job.search.seed,
        )
        self._keep(result, network)
        return result

    def measure_together(self, policies: Sequence[Policy]) -> list[TrialResult]:
        """Return the results of several policies, as `measure`; train the new ones in one pass.

        Args:
            policies: No two the same.
        """
        job = self.plan.job
        new = [policy for policy in policies if self.result_of(policy) is None]
        if new:
            measured = run_trials(
                new,
                self.plan.task,
                self.teacher,
                job.training,
                [self.plan.totals(policy) for policy in new],
                seed=job.search.seed,
            )
            for result, network in measured:
                self._keep(result, network)
        return [self.measure(policy) for policy in policies]

    def _keep(self, result: TrialResult, network: nn.Module) -> None:
        """Write the weights of a complete trial, and then its result."""
        if result.state == "complete":
            state = weights_of(network)
            write_atomic(self.weights_file(result.policy), lambda path: save_file(state, path))
        write_json(self._result_file(result.policy.hash), result.to_json())

    def adopt(self, result: TrialResult) -> None:
        """Keep a result that was measured elsewhere, unless the folder has one of its policy."""
        file = self._result_file(result.policy.hash)
        if not file.exists():
            write_json(file, result.to_json())

    def result_of(self, policy: Policy) -> TrialResult | None:
        """Return what was measured of a policy before, None if nothing was."""
        return self.result_of_hash(policy.hash)

    def result_of_hash(self, policy_hash: str) -> TrialResult | None:
        """Return what was measured of the policy with this hash."""
        file = self._result_file(policy_hash)
        if not file.exists():
            return None
        return TrialResult.from_json(read_json(file, StorageError, what="trial"))

    def sensitivity(self) -> SensitivityTable:
        """Return what the prior predicts; read back from the folder where it was measured."""
        return measure_sensitivity(self.plan, self.teacher, file=self.folder / SENSITIVITY_FILE)

    def origin_of(self, policy: Policy) -> str:
        """Return who proposed a policy: a seed's origin, or `sampler`."""
        return next((s.origin for s in self.seeds if s.policy == policy), "sampler")

    def weights_file(self, policy: Policy) -> Path:
        """Return where the trained weights of a policy lie."""
        return self.folder / "weights" / f"{policy.hash}.safetensors"

    def _result_file(self, policy_hash: str) -> Path:
        return self.folder / "trials" / f"{policy_hash}.json"


def prepare(planned: Plan, folder: Path, progress: Progress | None = None) -> Session:
    """Train the teacher, ask the prior for seeds, and write both into `folder`.

    Where the folder holds a prepared session of the same fingerprint, that is reopened instead.

    Raises:
        StorageError: The folder belongs to another job.
    """
    if (folder / "session.json").exists():
        return reopen(folder, planned)
    heard = progress or NoProgress()
    job = planned.job
    start = time.perf_counter()
    epochs = planned.task.teacher.epochs
    network = make_teacher(
        planned.task, seed=job.search.seed, monitor=EpochProgress(heard, "teacher", epochs)
    )
    teacher = Teacher(network, planned.task)
    trained = time.perf_counter()
    seeds = _seeds(planned, teacher, folder, heard)
    seconds = {"teacher": trained - start, "prior": time.perf_counter() - trained}
    full_precision = evaluate(network, planned.task.validation)
    state = weights_of(network)
    write_atomic(folder / "teacher.safetensors", lambda path: save_file(state, path))
    write_json(folder / "job.json", job.to_plain())
    write_json(
        folder / "session.json",
        {
            "schema": SCHEMA,
            "fingerprint": planned.fingerprint,
            "full_precision": asdict(full_precision),
            "seeds": [
                {"origin": s.origin, "predicted": s.predicted, "policy": s.policy.to_json()}
                for s in seeds
            ],
            "seconds": seconds,
        },
    )
    return Session(planned, folder, teacher, full_precision, seeds, seconds)


def reopen(folder: Path, planned: Plan | None = None) -> Session:
    """Read a prepared session back.

    Args:
        folder: Where `prepare` wrote it.
        planned: The job it must belong to; None takes the job from the folder.

    Raises:
        StorageError: The folder holds no session, is damaged, or belongs to another job.
    """
    content = read_json(folder / "session.json", StorageError, what="session")
    if content.get("schema") != SCHEMA:
        msg = (
            f"{folder} was written by another version ({content.get('schema')}, not {SCHEMA}). "
            "Choose another folder with --out."
        )
        raise StorageError(msg)
    if planned is None:
        planned = plan(Job.model_validate(read_json(folder / "job.json", StorageError, what="job")))
    check_fingerprint(content["fingerprint"], planned.fingerprint, where=f"folder {folder}")
    network = planned.task.make_network()
    load_weights_(network, folder / "teacher.safetensors")
    seeds = tuple(
        Seed(Policy.from_json(s["policy"]), s["origin"], s["predicted"]) for s in content["seeds"]
    )
    return Session(
        planned,
        folder,
        Teacher(network, planned.task),
        Evaluation(**content["full_precision"]),
        seeds,
        content["seconds"],
    )


def _seeds(planned: Plan, teacher: Teacher, folder: Path, progress: Progress) -> tuple[Seed, ...]:
    """Return uniform baselines and the prior's proposals, no policy twice."""
    settings = planned.job.search
    proposals = [Seed(p, origin) for origin, p in planned.space.uniform_policies().items()]
    if settings.prior is not None and settings.seeds > 0:
        table = measure_sensitivity(planned, teacher, progress, file=folder / SENSITIVITY_FILE)
        found = propose_seeds(
            planned.space,
            planned.summary,
            table,
            settings.cost_axis,
            planned.hardware,
            n=settings.seeds,
            budgets=settings.budgets,
        )
        proposals += [
            Seed(s.policy, f"prior {settings.prior} {i}/{len(found)}", s.predicted)
            for i, s in enumerate(found, start=1)
        ]
    return tuple(_distinct(proposals))


def _distinct(seeds: list[Seed]) -> Iterator[Seed]:
    seen: set[Policy] = set()
    for seed in seeds:
        if seed.policy not in seen:
            seen.add(seed.policy)
            yield seed


def measure_sensitivity(
    planned: Plan,
    teacher: Teacher,
    progress: Progress | None = None,
    *,
    file: Path | None = None,
    estimator: str | SensitivityEstimator | None = None,
    budget_s: float | None = None,
) -> SensitivityTable:
    """Ask a prior how much loss each precision of each layer costs.

    Args:
        planned: The job.
        teacher: Its full-precision network.
        progress: Hears of the pieces of work, and of the time they take once the first is done.
        file: Where finished pieces are kept and found again; None for nowhere.
        estimator: Who estimates; None for the job's prior, or Fisher information without one.
        budget_s: Seconds after which no new sample begins.

    Raises:
        SensitivityError: A score is no finite number, or the budget is too small.
        StorageError: The file was measured on something else.
    """
    settings = planned.job.search
    heard = progress or NoProgress()
    n = min(settings.prior_samples, len(planned.task.train))
    batch = next(planned.task.train.batches(n, seed=settings.seed))
    note = ""

    def tell_eta(seconds: float) -> None:
        nonlocal note
        note = f"about {seconds:.3g} s left"

    def tell(done: int, total: int) -> None:
        nonlocal note
        heard.update("sensitivity", done, total, note)
        note = ""

    return sensitivity_table(
        estimator or settings.prior or "fisher",
        teacher.network,
        batch.inputs,
        batch.targets,
        planned.space,
        seed=settings.seed,
        on_progress=tell,
        on_eta=tell_eta,
        budget_s=budget_s,
        file=file,
    )
