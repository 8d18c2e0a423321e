"""`adq-search cost`: what a policy costs, before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from adq_search.convert import check_policy_fits
from adq_search.errors import PolicyError, TaskError, did_you_mean
from adq_search.hardware import CostReport, load_hardware
from adq_search.hardware import cost as cost_of
from adq_search.policy import FLOAT, LayerPrecision, Policy, load_policy, parse_uniform
from adq_search.report.units import amount
from adq_search.space import DEFAULT_MOMENTUM, has_codebook
from adq_search.tasks import import_object, load_task, task_names
from adq_search.tracing import ModelSummary, trace


def cost(
    model: Annotated[
        str, typer.Option(help="torchvision:NAME, a task's name, or package.module:factory.")
    ],
    input_: Annotated[
        str | None, typer.Option("--input", help="Shape of one input, like 3x224x224.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy file.")] = None,
    uniform: Annotated[
        str | None, typer.Option(help="W4A4 (first and last layer stay at 8 bit) or float.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="Scheme of --uniform.")] = "lsq",
    hardware: Annotated[
        str, typer.Option(help="Hardware model, or the path of a YAML file.")
    ] = "post_asic_45nm",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print energy, area, memory, traffic and cycles of a network under a policy."""
    table = load_hardware(hardware)
    network, example = _network(model, input_)
    summary = trace(network, example)
    chosen = _policy(policy, uniform, scheme, summary)
    check_policy_fits(chosen, summary.all_names)
    result = cost_of(summary, chosen, table)
    if json_:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    _show(result, chosen)


def _policy(file: Path | None, uniform: str | None, scheme: str, summary: ModelSummary) -> Policy:
    if (file is None) == (uniform is None):
        msg = "A cost needs one policy: give either --policy FILE or --uniform W4A4."
        raise PolicyError(msg)
    if file is not None:
        return load_policy(file)
    if uniform == "float":
        return Policy.uniform(summary.all_names, FLOAT)
    weight_bits, input_bits = parse_uniform(uniform or "")
    momentum = DEFAULT_MOMENTUM if has_codebook(scheme) else None  # costs nothing, must be said
    inner = LayerPrecision(weight_bits, input_bits, scheme, momentum)
    running = Policy.uniform(summary.names, inner, ends=LayerPrecision(8, 8, "lsq"))
    return Policy.of(dict(running) | dict.fromkeys(summary.idle, FLOAT))


def _network(reference: str, shape: str | None) -> tuple[nn.Module, torch.Tensor]:
    """Make the network, and one input for it."""
    if reference in task_names():
        task = load_task(reference)
        return task.make_network(), task.example() if shape is None else _example(shape)
    if shape is None:
        msg = f"The input shape of '{reference}' is not known. Give --input, like 3x224x224."
        raise TaskError(msg)
    example = _example(shape)
    library, _, name = reference.partition(":")
    if library == "torchvision":
        from torchvision import models  # noqa: PLC0415  # a second to import: only when asked for

        if name not in models.list_models():
            msg = f"torchvision has no model '{name}'. {did_you_mean(name, models.list_models())}"
            raise TaskError(msg)
        return models.get_model(name, weights=None), example
    if not name:
        msg = f"There is no model '{reference}'. {did_you_mean(reference, task_names())}"
        msg += " Others are given as torchvision:NAME or package.module:factory."
        raise TaskError(msg)
    network = import_object(reference, TaskError, what="model")()
    if not isinstance(network, nn.Module):
        msg = f"'{reference}' must return a torch.nn.Module, but returned {type(network).__name__}."
        raise TaskError(msg)
    return network, example


def _example(shape: str) -> torch.Tensor:
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) is None:
        msg = f"An input shape is written like 3x224x224, but this is '{shape}'."
        raise TaskError(msg)
    return torch.zeros(1, *(int(size) for size in shape.split("x")))


#: What a row of the table shows, with its heading: the four figures kept apart come first.
_COLUMNS = {
    "compute_pj": "compute",
    "area_ge": "area, GE",
    "stored_bits": "weights",
    "activation_bits": "moved",
    "bops": "bit ops",
    "energy_pj": "energy",
    "cycles": "cycles",
    "utilisation": "in use",
}
#: Where the output is no terminal, lines are as long as the table needs.
_WIDE = 160


def _show(result: CostReport, policy: Policy) -> None:
    content = result.to_json()
    total = content["total"]
    columns = [name for name in _COLUMNS if name in content["layers"][0]]
    table = Table(title=f"cost on {content['hardware']}")
    for heading in ("layer", "precision", "datapath"):
        table.add_column(heading)
    for column in columns:
        table.add_column(_COLUMNS[column], justify="right", no_wrap=True)
    for layer in content["layers"]:
        figures = (_figure(column, layer[column]) for column in columns)
        table.add_row(layer["name"], str(policy[layer["name"]]), layer["datapath"], *figures)
    table.add_section()
    sums = {**total, "area_ge": total["largest_area_ge"]}
    table.add_row("total", "", "", *(_figure(column, sums[column]) for column in columns))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    console.print(table)
    for name, value in total.items():
        console.print(f"{name}: {value:,.6g}", highlight=False)
    for name in content["coverage"]["unknown"]:
        console.print(f"warning: not counted: {name}", style="yellow", highlight=False)
    if content["extrapolated"]:
        names = ", ".join(content["extrapolated"])
        console.print(f"note: outside the measured range of the table: {names}", highlight=False)
    if result.inexact:
        names = ", ".join(result.inexact)
        console.print(
            f"warning: on a datapath whose sums are not the quantized network's: {names}",
            style="yellow",
            highlight=False,
        )


def _figure(column: str, value: float) -> str:
    """Return a figure in few characters; bits are shown as bytes."""
    if column == "utilisation":
        return f"{value:.1%}"
    if column.endswith("_bits"):
        return amount("memory_bytes", value / 8)
    return amount(column, value) if column != "cycles" else f"{value:,.0f}"
