"""`adq-search allocate` and `adq-search train`: policies without a search, and policies found."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from adq_search.cli._progress import ShownProgress
from adq_search.cli._spaces import find_job, named_spaces
from adq_search.convert import check_policy_fits
from adq_search.distill import Teacher
from adq_search.errors import SpaceError
from adq_search.evaluation import evaluate
from adq_search.files import write_atomic, write_json
from adq_search.hardware import cost, load_hardware, total_of
from adq_search.job import Job
from adq_search.own_process import set_up_process
from adq_search.plan import plan
from adq_search.policy import load_policy, save_policy
from adq_search.prior import allocate as allocate_bits
from adq_search.provenance import provenance
from adq_search.session import measure_sensitivity
from adq_search.space import has_codebook
from adq_search.tasks import Task, load_task
from adq_search.teacher import make_teacher
from adq_search.tracing import trace
from adq_search.training import EpochProgress, threads_for
from adq_search.trial import run_trial, weights_of
from adq_search.validation import validated

TaskOption = Annotated[str, typer.Option(help="A task's name, or package.module:factory.")]
TeacherOption = Annotated[
    Path | None, typer.Option(help="Weights of the full-precision network [train it].")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


def allocate(
    task: TaskOption,
    average_bits: Annotated[float, typer.Option(help="Average weight bits of the mixed layers.")],
    out: Annotated[Path, typer.Option(help="Policy file to write.")],
    scheme: Annotated[str, typer.Option(help="Scheme of the mixed layers.")] = "adq",
    bits: Annotated[str, typer.Option(help="Weight bits to choose from.")] = "2,3,4",
    input_bits: Annotated[int, typer.Option(help="Input bits of the mixed layers.")] = 4,
    momentum: Annotated[
        float, typer.Option(help="EMA momentum, where there is a codebook.")
    ] = 0.99,
    estimator: Annotated[str, typer.Option(help="Sensitivity estimator.")] = "fisher",
    teacher: TeacherOption = None,
    seed: SeedOption = 0,
) -> None:
    """Give each layer its bits by sensitivity, under an average: the ADQ paper's own flow.

    First and last layer stay at 8 bits and out of the average.
    """
    console = Console()
    rule = {"weight_bits": _bits(bits), "input_bits": [input_bits], "schemes": [scheme]}
    if has_codebook(scheme):
        rule["ema_momenta"] = [momentum]
    content = {
        "task": task,
        "space": {"default": rule},
        "search": {"prior": estimator, "seed": seed},
    }
    job = validated(Job, content, SpaceError, what="the allocation")
    planned = plan(job)
    set_up_process(threads_for(planned.summary.macs, job.training.batch_size, workers=1))
    with ShownProgress(console) as progress:
        network = teacher_of(with_teacher(planned.task, teacher), seed, progress)
        table = measure_sensitivity(planned, Teacher(network, planned.task), progress)
    policy = allocate_bits(
        planned.space,
        planned.summary,
        table,
        {"average_bits_inner": average_bits},
        planned.hardware,
    ).policy
    totals = planned.totals(policy)
    save_policy(
        policy,
        out,
        network={"task": task, "fingerprint": planned.summary.fingerprint},
        metrics={"predicted_loss_increase": table.predict(policy), "cost": totals},
        provenance=provenance(seed=seed),
    )
    shown = Table("layer", "precision", "weights", "predicted loss increase")
    for name, precision in policy:
        score = table.score(name, precision)
        shown.add_row(name, str(precision), f"{planned.summary[name].n_weights:,}", f"{score:.3g}")
    console.print(shown)
    console.print(
        f"average weight bits: {totals['average_bits_inner']:.4f} of the mixed layers (asked for "
        f"{average_bits:g}), {totals['average_bits_weighted']:.4f} of all weights, "
        f"{totals['average_bits_layers']:.4f} over layers\npolicy: {out}",
        highlight=False,
    )


def train(
    policy: Annotated[Path, typer.Option(help="Policy file.")],
    task: TaskOption,
    out: Annotated[Path, typer.Option(help="Folder of weights and result.")],
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs.")] = None,
    space: Annotated[
        str | None, typer.Option(help="Take the training recipe from this search space.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Start of the cosine decay.")] = None,
    distillation: Annotated[
        bool, typer.Option(help="Learn from the full-precision network.")
    ] = True,
    teacher: TeacherOption = None,
    seed: SeedOption = 0,
) -> None:
    """Train the task's network under a policy, and measure it on the test part."""
    start = time.perf_counter()
    console = Console()
    chosen = load_policy(policy)
    if (out / "result.json").exists():
        msg = f"{out} holds a result already. Choose another --out; nothing measured is replaced."
        raise SpaceError(msg)
    job = recipe_of(task, space)
    changes = {"epochs": epochs, "learning_rate": learning_rate}
    job = job.with_training(
        **{key: value for key, value in changes.items() if value is not None},
        distillation={**job.training.distillation.model_dump(), "enabled": distillation},
    )
    found = with_teacher(load_task(task, job.task_options), teacher)
    summary = trace(found.make_network(), found.example())
    check_policy_fits(chosen, summary.all_names)
    set_up_process(threads_for(summary.macs, job.training.batch_size, workers=1))
    report = cost(summary, chosen, load_hardware(job.search.hardware))
    with ShownProgress(console) as progress:
        network = teacher_of(found, seed, progress)
        expert = Teacher(network, found)
        result, trained = run_trial(
            chosen,
            found,
            expert,
            job.training,
            total_of(report),
            monitor=EpochProgress(progress, "training", job.training.epochs),
            seed=seed,
        )
    test = evaluate(trained, found.test, expert)
    state = weights_of(trained)
    write_atomic(out / "weights.safetensors", lambda path: save_file(state, path))
    measured: dict[str, Any] = {
        "state": result.state,
        "reason": result.reason,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "kl": result.kl,
        "test_accuracy": test.accuracy,
        "full_precision_accuracy": evaluate(network, found.validation).accuracy,
        "full_precision_test_accuracy": evaluate(network, found.test).accuracy,
        "epochs": result.epochs,
        "cost": result.cost,
    }
    made = provenance(seed=seed)
    network_is = {"task": task, "fingerprint": summary.fingerprint}
    save_policy(chosen, out / "policy.json", network=network_is, metrics=measured, provenance=made)
    write_json(
        out / "result.json",
        {
            "schema": "adq_search.training/1",
            "policy_hash": chosen.hash,
            **measured,
            "health": result.health,
            "training": job.training.model_dump(mode="json"),
            "wall_s": time.perf_counter() - start,
            "provenance": made,
        },
    )
    full_precision = _percent(measured["full_precision_test_accuracy"])
    console.print(
        f"{result.state}: validation accuracy {_percent(result.accuracy)}, test accuracy "
        f"{_percent(test.accuracy)} (full precision {full_precision}), {result.epochs} epochs\n"
        f"weights: {out / 'weights.safetensors'}",
        highlight=False,
        soft_wrap=True,
    )


def recipe_of(task: str, space: str | None) -> Job:
    """Return the job whose training recipe fits: a named space's, or the task's own space's."""
    if space is not None:
        job, _ = find_job(space)
        if job.task != task:
            msg = f"Space '{space}' is about task '{job.task}', not '{task}'. Give its own task."
            raise SpaceError(msg)
        return job
    if task in named_spaces():
        job, _ = find_job(task)
        return job
    return Job(task=task)


def teacher_of(task: Task, seed: int, progress: ShownProgress) -> nn.Module:
    """Return the task's full-precision network, trained or read."""
    monitor = EpochProgress(progress, "teacher", task.teacher.epochs)
    return make_teacher(task, seed=seed, monitor=monitor)


def with_teacher(task: Task, weights: Path | None) -> Task:
    """Return the task with its teacher read from a file, if one is given."""
    if weights is None:
        return task
    return replace(task, teacher=replace(task.teacher, weights_file=weights))


def _bits(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        msg = f"Bits are written like 2,3,4, but this is '{text}'."
        raise SpaceError(msg) from error


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100.0 * share:.2f} %"
