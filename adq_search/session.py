"""A planned job made ready in a folder: teacher trained, seeds chosen, results kept.

`prepare` trains the teacher, asks the prior for seeds, and writes both down; `reopen` reads them
back, in another process or after an interruption. Hosts see a `Session` and nothing below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from adq_search.checkpoint import TrainingCheckpoint
from adq_search.distill import Teacher
from adq_search.donors import donor_of
from adq_search.errors import StorageError
from adq_search.evaluation import Evaluation, evaluate
from adq_search.files import read_json, write_atomic, write_json
from adq_search.following import lead_trial
from adq_search.job import Job
from adq_search.parallel import ALONE, Ranks
from adq_search.plan import Plan, check_fingerprint, plan
from adq_search.policy import Policy
from adq_search.prior import propose_seeds
from adq_search.progress import NoProgress, Progress
from adq_search.sensitivity import SensitivityEstimator, SensitivityTable, sensitivity_table
from adq_search.teacher import load_weights_, make_teacher
from adq_search.training import EpochProgress, Monitor
from adq_search.trial import TrialResult, fingerprint_of, run_trial, run_trials, weights_of
from adq_search.warm_start import Donor

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
        ranks: The processes that train each trial together; see `leading`.
    """

    plan: Plan
    folder: Path
    teacher: Teacher
    full_precision: Evaluation
    seeds: tuple[Seed, ...]
    seconds: dict[str, float]
    ranks: Ranks = ALONE

    def measure(
        self,
        policy: Policy,
        monitor: Monitor | None = None,
        *,
        checkpoint: TrainingCheckpoint | None = None,
        seed: int | None = None,
    ) -> TrialResult:
        """Return the result of a policy: from the folder if it was ever measured, else by a trial.

        The result and the weights are on disk before this returns, so that whatever kills the
        caller loses nothing that was finished. A trial that was interrupted goes on from its
        checkpoint; once its result is kept, the checkpoint is removed.

        Args:
            policy: What to measure.
            monitor: Told of every epoch; may stop the trial.
            checkpoint: Where the trial saves itself; `checkpoint_of` the policy by default.
            seed: Of everything random in the trial; None for the job's. With another seed it is a
                replicate: its result is kept apart, its weights are not kept.
        """
        known = self.result_of(policy, seed=seed)
        if known is not None:
            return known
        job = self.plan.job
        drawn = job.search.seed if seed is None else seed
        saved = checkpoint or self.checkpoint_of(policy, seed=drawn)
        lead_trial(self.ranks, policy, seed=drawn)
        result, network = run_trial(
            policy,
            self.plan.task,
            self.teacher,
            job.training,
            self.plan.totals(policy),
            monitor=monitor,
            donor=self._donor_of(policy),
            checkpoint=saved,
            ranks=self.ranks,
            seed=drawn,
        )
        self._keep(result, network)
        saved.remove()
        return result

    def checkpoint_of(
        self,
        policy: Policy,
        *,
        seed: int | None = None,
        file: Path | None = None,
        on_saved: Callable[[int], None] | None = None,
    ) -> TrainingCheckpoint:
        """Return where the trial of a policy saves itself, and goes on from if it was interrupted.

        Args:
            policy: What the trial measures.
            seed: Of the trial; None for the job's.
            file: A `.safetensors` file; `checkpoint_file` by default.
            on_saved: Called with the number of finished epochs once the file is in its place.
        """
        parts, donor = self.plan.fingerprint, self._donor_of(policy)
        drawn = self.plan.job.search.seed if seed is None else seed
        return TrainingCheckpoint(
            file or self.checkpoint_file(policy, seed=drawn),
            {
                **{part: parts[part] for part in ("network", "data", "recipe")},
                "teacher": self._teacher_fingerprint,
                "policy": policy.hash,
                "seed": str(drawn),
                "donor": "teacher" if donor is None else donor.policy.hash,
            },
            every_s=self.plan.job.training.checkpoint_every_s,
            on_saved=on_saved,
        )

    @cached_property
    def _teacher_fingerprint(self) -> str:
        return fingerprint_of(weights_of(self.teacher.network))

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
                donors=[self._donor_of(policy) for policy in new],
                seed=job.search.seed,
            )
            for result, network in measured:
                self._keep(result, network)
        return [self.measure(policy) for policy in policies]

    def _keep(self, result: TrialResult, network: nn.Module) -> None:
        """Write the weights of a complete trial, unless it is a replicate, and then its result."""
        if result.state == "complete" and result.seed == self.plan.job.search.seed:
            state = weights_of(network)
            write_atomic(self.weights_file(result.policy), lambda path: save_file(state, path))
        write_json(self._result_file(result.policy.hash, result.seed), result.to_json())

    def adopt(self, result: TrialResult) -> None:
        """Keep a result that was measured elsewhere, unless the folder has it."""
        self.checkpoint_file(result.policy, seed=result.seed).unlink(missing_ok=True)
        file = self._result_file(result.policy.hash, result.seed)
        if not file.exists():
            write_json(file, result.to_json())

    def _donor_of(self, policy: Policy) -> Donor | None:
        return donor_of(self.folder, policy) if self.plan.job.training.warm_start else None

    def result_of(self, policy: Policy, *, seed: int | None = None) -> TrialResult | None:
        """Return what was measured of a policy before, None if nothing was.

        Args:
            policy: What was trained.
            seed: Of its training; None for the job's.
        """
        return self.result_of_hash(policy.hash, seed=seed)

    def result_of_hash(self, policy_hash: str, *, seed: int | None = None) -> TrialResult | None:
        """Return what was measured of the policy with this hash."""
        file = self._result_file(policy_hash, seed)
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

    def checkpoint_file(self, policy: Policy, *, seed: int | None = None) -> Path:
        """Return where an unfinished trial of a policy saves itself."""
        name = f"{policy.hash}-{seed}" if self._is_replicate(seed) else policy.hash
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def _result_file(self, policy_hash: str, seed: int | None = None) -> Path:
        if self._is_replicate(seed):
            return self.folder / "replicates" / f"{policy_hash}-{seed}.json"
        return self.folder / "trials" / f"{policy_hash}.json"

    def _is_replicate(self, seed: int | None) -> bool:
        return seed not in (None, self.plan.job.search.seed)


def prepare(planned: Plan, folder: Path, progress: Progress | None = None) -> Session:
    """Train the teacher, ask the prior for seeds, and write both into `folder`.

    Where the folder holds a prepared session of the same fingerprint, that is reopened instead.

    Raises:
        StorageError: The folder belongs to another job.
    """
    if (folder / "session.json").exists():
        session = reopen(folder, planned)
        write_json(folder / "job.json", planned.job.to_plain())  # what may change, as `trials` may
        return session
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
        budget_s: Seconds after which no new sample begins; None for the job's.

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
        budget_s=settings.prior_budget_s if budget_s is None else budget_s,
        file=file,
    )
