"""`adq-search verify`: every form in an export's folder against the fake-quantized network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from adq_search.cli._export import MODEL
from adq_search.cli._spaces import find_job
from adq_search.errors import StorageError
from adq_search.export import (
    ExportAgreement,
    Form,
    compare,
    graph_form,
    load_package_,
    onnxruntime_form,
    qonnx_form,
    read_description,
    read_vectors,
)
from adq_search.integer import verify_layers
from adq_search.tasks import Task, load_task
from adq_search.tracing import trace

#: Samples that run at a time: every layer's codes of them are held.
_BATCH_SIZE = 32
#: Who runs a graph of each format, on how many samples unless told.
_RUNNERS: Mapping[str, tuple[str, Callable[[Path], Form], int]] = {
    "onnx": ("ONNX by onnxruntime", onnxruntime_form, 256),
    "integer": ("integer ONNX by onnxruntime", onnxruntime_form, 256),
    "qonnx": ("QONNX by qonnx", qonnx_form, 32),
}


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `export` wrote.")],
    task: Annotated[str, typer.Option(help="The task it was trained on.")],
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Validation samples to run [256; 32 of QONNX, which is slow]."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="Take the task's options from this search space [those of the export]."),
    ] = None,
) -> None:
    """Run an export against the fake-quantized network; exit code 1 where they do not agree.

    The package is loaded and compared with the test vectors of the network it was written from,
    and each layer's integer codes are summed exactly, on up to 32 samples. A graph runs by
    onnxruntime or qonnx on validation samples. Of every layer, input codes are compared: a tie is a
    value on the boundary of two codes, which float32 rounds to either side; downstream are codes of
    samples with an earlier tie. Unexplained codes, other sums and other classes are errors.
    """
    console = Console()
    description = read_description(folder)
    found = load_task(task, _task_options(folder, description, task, space))
    network = found.make_network()
    summary = trace(network, found.example())
    if summary.fingerprint != description.get("network_fingerprint"):
        msg = (
            f"{folder} holds a network of other layers or shapes than task '{task}' makes: "
            f"fingerprint {description.get('network_fingerprint')}, not {summary.fingerprint}. "
            "Give the task it was trained on."
        )
        raise StorageError(msg)
    network = load_package_(network, folder)
    verdicts = [*_verify_package(console, network, folder, found, samples or _BATCH_SIZE)]
    if (folder / MODEL).exists():
        title, open_form, usual = _RUNNERS[graph_form(folder / MODEL)]
        form = open_form(folder / MODEL)
        agreement = compare(network, form, _inputs(found, samples or usual))
        verdicts.append(_shown(console, title, agreement))
    if not all(verdicts):
        raise typer.Exit(code=1)


def _task_options(
    folder: Path, description: Mapping[str, Any], task: str, space: str | None
) -> dict[str, Any]:
    """Return the options of the task: of a search space, or those that the export holds."""
    if space is not None:
        job, _ = find_job(space)
        if job.task != task:
            msg = f"Space '{space}' is about task '{job.task}', not '{task}'. Give its own task."
            raise StorageError(msg)
        return job.task_options
    about = description.get("task")
    if about is None:
        return {}
    if about.get("name") != task:
        trained_on = about.get("name")
        msg = f"{folder} was exported from task '{trained_on}', not '{task}'. Give its own task."
        raise StorageError(msg)
    return dict(about.get("options", {}))


def _inputs(task: Task, samples: int) -> Iterator[Tensor]:
    """Yield the first validation inputs, a few at a time."""
    for batch in task.validation.batches(min(samples, _BATCH_SIZE)):
        yield batch.inputs[:samples]
        samples -= len(batch.inputs)
        if samples <= 0:
            return


def _verify_package(
    console: Console, network: nn.Module, folder: Path, task: Task, samples: int
) -> Iterator[bool]:
    """Yield whether the package computes the test vectors, and whether its layers' sums agree."""
    vectors = read_vectors(folder)
    if vectors is None:
        console.print("the package holds no test vectors: codes not compared", highlight=False)
    else:
        inputs, outcome = vectors
        agreement = compare(network, lambda _: outcome, [inputs])
        yield _shown(console, "package by our loader, on its test vectors", agreement)
    batch = next(_inputs(task, samples))
    checks = verify_layers(network, batch)
    shown = Table("layer", "sums of codes", "SQNR of the layer against them, dB")
    for name, check in checks.items():
        told = "agree" if check.is_exact else "DIFFER beyond float32 rounding"
        shown.add_row(name, told, f"{check.sqnr_db:.1f}")
    console.print(shown)
    n_exact = sum(check.is_exact for check in checks.values())
    console.print(
        f"package: integer sums of {n_exact} of {len(checks)} layers agree on {len(batch)} samples",
        highlight=False,
        soft_wrap=True,
    )
    yield n_exact == len(checks)


def _shown(console: Console, title: str, agreement: ExportAgreement) -> bool:
    """Print an agreement and return whether it is one."""
    codes, sums = agreement.codes, agreement.sums
    shown = Table("layer", "codes", "ties", "downstream", "unexplained")
    if sums:
        shown.add_column("integer sums")
        shown.add_column("different")
    for name, layer in codes.layers.items():
        figures = [layer.codes, layer.ties, layer.downstream, layer.unexplained]
        figures += [sums[name].sums, sums[name].different] if sums else []
        shown.add_row(name, *(f"{figure:,}" for figure in figures))
    console.print(shown)
    same_sums = f"{agreement.different_sums:,} integer sums differ; " if sums else ""
    verdict = "verified" if agreement.is_verified else "NOT verified"
    console.print(
        f"{title}: {codes.codes:,} codes, {codes.ties:,} ties, {codes.unexplained:,} unexplained; "
        f"{same_sums}{codes.samples - codes.other_classes} of {codes.samples} predictions agree; "
        f"{codes.tied_samples} samples with a tie, outputs of the others differ by "
        f"{codes.largest_logit_error:.3g} at most: {verdict}",
        highlight=False,
        soft_wrap=True,
    )
    return agreement.is_verified
