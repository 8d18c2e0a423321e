"""`adq-search export`: a policy of a run, as a hardware package, ONNX or QONNX."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adq_search.errors import PolicyError, StorageError, did_you_mean
from adq_search.export import (
    DESCRIPTION,
    write_integer_onnx,
    write_onnx,
    write_package,
    write_qonnx,
)
from adq_search.files import read_json
from adq_search.integer import snap_codebooks_
from adq_search.job import Job
from adq_search.policy import load_policy
from adq_search.provenance import provenance
from adq_search.store import load_quantized
from adq_search.tasks import load_task
from adq_search.tracing import trace
from adq_search.validation import validated

MODEL = "model.onnx"
#: Samples whose codes and outputs go into the package as test vectors.
N_VECTORS = 8


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

    Every export holds the hardware package: codes, tables, scales, what they mean, and a few test
    vectors. onnx (uniform schemes at 2, 4 and 8 bits), qonnx (all schemes) and integer (all
    schemes, as 8-bit integers in one or more banks) add the graph.
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
    inputs = next(task.validation.batches(N_VECTORS)).inputs
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
        out,
        network,
        chosen,
        summary,
        samples=inputs,
        task={"name": job.task, "options": job.to_plain()["task_options"]},
        provenance=provenance(seed=job.search.seed),
    )["total"]
    console.print(
        f"weight codes: {total['weight_bits']} bits, {total['packed_bytes']} bytes packed\n"
        f"written: {out}",
        highlight=False,
        soft_wrap=True,
    )


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
