"""`adq-search sensitivity`: what each precision of each layer is predicted to cost in loss."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adq_search.cli._progress import ShownProgress
from adq_search.cli._reuse import (
    SeedOption,
    TaskOption,
    TeacherOption,
    recipe_of,
    teacher_of,
    with_teacher,
)
from adq_search.distill import Teacher
from adq_search.errors import SensitivityError, did_you_mean
from adq_search.files import write_json, write_text
from adq_search.own_process import set_up_process
from adq_search.plan import plan
from adq_search.policy import LayerPrecision
from adq_search.provenance import provenance
from adq_search.report.heat_map import sensitivity_svg
from adq_search.sensitivity import Labels, SensitivityEstimator, SensitivityTable, make_estimator
from adq_search.session import measure_sensitivity
from adq_search.space import Group, SearchSpace
from adq_search.training import threads_for


def sensitivity(
    task: TaskOption,
    estimator: Annotated[
        str, typer.Option(help="fisher, fisher_output, hessian, kl or lsq_steps.")
    ] = "fisher",
    space: Annotated[
        str | None, typer.Option(help="Precisions to score: a search space [the task's own].")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Training samples to look at.")] = None,
    time_budget: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds after which no new sample begins.")
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Measure both together too: kl, fisher_output.")
    ] = False,
    labels: Annotated[
        str | None, typer.Option(help="Of fisher, fisher_output: model, drawn (from it) or data.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder [results/sensitivity_TASK].")] = None,
    teacher: TeacherOption = None,
    seed: SeedOption = 0,
) -> None:
    """Measure sensitivities: print them, and save them as CSV, JSON and a heat map.

    What is measured is kept piece by piece, so that the same command goes on after an interruption.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    asked = _estimator(estimator, joint, labels)
    changes: dict[str, Any] = {"prior": estimator, "seed": seed}
    if samples is not None:
        changes["prior_samples"] = samples
    job = recipe_of(task, space).with_search(**changes)
    planned = plan(job)
    folder = out or Path("results") / f"sensitivity_{planned.task.name}"
    set_up_process(threads_for(planned.summary.macs, job.training.batch_size, workers=1))
    with ShownProgress(console) as progress:
        network = teacher_of(with_teacher(planned.task, teacher), seed, progress)
        table = measure_sensitivity(
            planned,
            Teacher(network, planned.task),
            progress,
            file=folder / f"{estimator}.samples.json",
            estimator=asked,
            budget_s=time_budget,
        )
    name = f"{planned.task.name}: predicted loss increase, {estimator}"
    write_text(folder / f"{estimator}.csv", _as_csv(table, planned.space))
    made = provenance(seed=seed)
    write_json(folder / f"{estimator}.json", {**table.to_json(), "provenance": made})
    picture = sensitivity_svg(table, planned.space.names, title=name)
    write_text(folder / f"{estimator}.svg", picture)
    _show(console, table, planned.space, name)
    files = ", ".join(str(folder / f"{estimator}.{e}") for e in ("csv", "json", "svg"))
    console.print(f"saved: {files}", highlight=False, soft_wrap=True)


_LABELS = {"model": Labels(), "drawn": Labels(exact_classes=0), "data": Labels("data")}


def _estimator(name: str, joint: bool, labels: str | None) -> SensitivityEstimator:
    settings: dict[str, Any] = {"joint": True} if joint else {}
    if labels is not None:
        if labels not in _LABELS:
            msg = f"There are no labels '{labels}'. {did_you_mean(labels, _LABELS)}"
            raise SensitivityError(msg)
        settings["labels"] = _LABELS[labels]
    return make_estimator(name, **settings)


def _as_csv(table: SensitivityTable, space: SearchSpace) -> str:
    """Return a row a group and choice: weights, inputs and both together, in nats."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [f"{part}_{what}" for part in _PARTS for what in ("loss_increase", "standard_error")]
    writer.writerow(["group", "scheme", "weight_bits", "input_bits", *parts])
    for group in space.groups:
        for choice in _choices(group):
            head = [group.name, choice.scheme, choice.weight_bits, choice.input_bits]
            found = _estimates(table, group, choice)
            figures = ("" if math.isnan(x) else f"{x:.6g}" for part in found for x in part)
            writer.writerow([*head, *figures])
    return text.getvalue()


#: Where the output is no terminal, lines are as long as the table needs.
_WIDE = 160
_PARTS = ("weights", "inputs", "both")


def _choices(group: Group) -> list[LayerPrecision]:
    """Return the precisions of a group that a prior tells apart."""
    kept = dict.fromkeys(group.with_median_momentum(p) for p in group.choices)
    return [p for p in kept if not p.is_float]


def _estimates(
    table: SensitivityTable, group: Group, choice: LayerPrecision
) -> list[tuple[float, float]]:
    """Return loss increase and standard error of a group's weights, of its inputs, of both."""
    parts = [table.parts(layer, choice) for layer in group.layers]
    return [
        (math.fsum(value for value, _ in part), math.hypot(*(error for _, error in part)))
        for part in zip(*parts, strict=True)
    ]


def _show(console: Console, table: SensitivityTable, space: SearchSpace, title: str) -> None:
    """Print weights and inputs apart: a row a layer and quantizer, a column a number of bits."""
    for part, scores, errors in (
        ("weights alone", table.weights, table.weight_errors),
        ("inputs alone", table.inputs, table.input_errors),
    ):
        bits = sorted({b for _, _, b in scores})
        shown = Table(title=f"{title}: {part}, nats")
        for heading in ("layer", "quantizer"):
            shown.add_column(heading, no_wrap=True)
        for b in bits:
            shown.add_column(f"{b} bits", justify="right", no_wrap=True)
        for layer in space.names:
            for quantizer in dict.fromkeys(q for name, q, _ in scores if name == layer):
                keys = [(layer, quantizer, b) for b in bits]
                cells = (_cell(scores[k], errors.get(k, 0.0)) if k in scores else "" for k in keys)
                shown.add_row(layer, quantizer, *cells)
        console.print(shown)


def _cell(score: float, error: float) -> str:
    share = "" if not score or math.isnan(error) else f" ±{error / score:.0%}"
    return f"{score:.2g}{share}"
