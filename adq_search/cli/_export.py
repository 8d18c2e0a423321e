"""`adq-search export` and `verify`: a policy of a run, as a hardware package, ONNX or QONNX."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from adq_search.errors import PolicyError, StorageError, did_you_mean
from adq_search.export import (
    DESCRIPTION,
    compare_onnx,
    holds_qonnx,
    load_package_,
    write_integer_onnx,
    write_onnx,
    write_package,
    write_qonnx,
)
from adq_search.files import read_json
from adq_search.integer import snap_codebooks_, verify_layers
from adq_search.job import Job
from adq_search.policy import load_policy
from adq_search.provenance import provenance
from adq_search.store import load_quantized
from adq_search.tasks import load_task
from adq_search.tracing import trace
from adq_search.validation import validated

MODEL = "model.onnx"


class Format(StrEnum):
    """What to write."""

    ONNX = "onnx"
    QONNX = "qonnx"
    INTEGER = "integer"
    PACKAGE = "package"


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run's results.")],
    policy: Annotated[str, typer.Option(help="Hash of one of its policies, or its beginning.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format_: Annotated[
        Format, typer.Option("--format", help="All but package add model.onnx to the package.")
    ] = Format.PACKAGE,
) -> None:
    """Write a trained policy of a run for other tools.

    Every export holds the hardware package: codes, tables, scales and what they mean. onnx (uniform
    schemes at 2, 4 and 8 bits), qonnx (all schemes) and integer (all schemes whose weights are
    8-bit integers, in one or more banks) add the graph.
    """
    console = Console()
    job = validated(
        Job,
        read_json(run / "job.json", StorageError, what="job"),
        StorageError,
        what=f"the job of {run}",
    )
    chosen = load_policy(_policy_file(run, policy))
    if any((out / name).exists() for name in (DESCRIPTION, MODEL)):
        msg = f"{out} holds an export already. Choose another --out; nothing is replaced."
        raise StorageError(msg)
    task = load_task(job.task, job.task_options)
    network = load_quantized(task, chosen, run / "weights" / f"{chosen.hash}.safetensors")
    summary = trace(task.make_network(), task.example())
    inputs = next(task.validation.batches(2)).inputs
    if format_ is Format.ONNX:
        write_onnx(out / MODEL, network, inputs)
    elif format_ is Format.QONNX:
        write_qonnx(out / MODEL, network, inputs[:1])
    elif format_ is Format.INTEGER:
        moves = snap_codebooks_(network)
        if moves:
            console.print(
                f"codebooks rounded to 8-bit words: levels moved by {max(moves.values()):.2%} of "
                "the largest at most"
            )
        write_integer_onnx(out / MODEL, network, inputs)
    total = write_package(
        out, network, chosen, summary, provenance=provenance(seed=job.search.seed)
    )["total"]
    console.print(
        f"weight codes: {total['weight_bits']} bits, {total['packed_bytes']} bytes packed\n"
        f"written: {out}",
        highlight=False,
        soft_wrap=True,
    )


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `export` wrote.")],
    task: Annotated[str, typer.Option(help="The task it was trained on.")],
    samples: Annotated[int, typer.Option(min=1, help="Validation samples to run.")] = 256,
) -> None:
    """Run an export against the fake-quantized network, layer by layer; exit code 1 if they differ.

    Of a package, each layer's integer codes are summed exactly and compared with the layer's own
    output. Of an ONNX graph, onnxruntime's input codes of each layer are compared with the
    network's, and its predictions; a code on a boundary may fall on either side.
    """
    console = Console()
    found = load_task(task)
    network = load_package_(found.make_network(), folder)
    inputs = next(found.validation.batches(samples)).inputs
    has_graph = (folder / MODEL).exists()
    if has_graph and not holds_qonnx(folder / MODEL):
        agrees = _verify_graph(console, folder / MODEL, network, inputs)
    else:
        if has_graph:
            console.print("model.onnx is QONNX, which onnxruntime does not run: not compared")
        agrees = _verify_codes(console, network, inputs)
    if not agrees:
        raise typer.Exit(code=1)


def _verify_graph(console: Console, file: Path, network: nn.Module, inputs: Tensor) -> bool:
    result = compare_onnx(file, network, inputs)
    shown = Table("layer", "input codes", "different", "largest")
    for name, layer in result.layers.items():
        figures = (layer.n_codes, layer.n_different, layer.largest)
        shown.add_row(name, *(f"{figure:,}" for figure in figures))
    console.print(shown)
    console.print(
        f"{result.n_same_class} of {result.n_samples} predictions agree; outputs differ by "
        f"{result.largest_error:.3g} at most",
        highlight=False,
        soft_wrap=True,
    )
    return result.n_same_class == result.n_samples


def _verify_codes(console: Console, network: nn.Module, inputs: Tensor) -> bool:
    checks = verify_layers(network, inputs)
    shown = Table("layer", "sums of codes", "SQNR of the layer against them, dB")
    for name, check in checks.items():
        told = "agree" if check.is_exact else "DIFFER beyond float32 rounding"
        shown.add_row(name, told, f"{check.sqnr_db:.1f}")
    console.print(shown)
    n_exact = sum(check.is_exact for check in checks.values())
    console.print(f"{n_exact} of {len(checks)} layers agree on {len(inputs)} samples")
    return n_exact == len(checks)


def _policy_file(run: Path, beginning: str) -> Path:
    files = sorted((run / "policies").glob("*.json"))
    found = [file for file in files if file.stem.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.stem for file in found)
        msg = f"Several policies of {run} begin with '{beginning}': {names}. Give more digits."
        raise PolicyError(msg)
    hint = did_you_mean(beginning, [file.stem for file in files])
    msg = f"{run} has no policy '{beginning}'. {hint}"
    raise PolicyError(msg)
