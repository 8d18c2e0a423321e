"""`adq-search status`: how a running study stands."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adq_search.cli._worker import HostOption, StorageOption, StudyOption, find_sharing_host
from adq_search.report.units import amount, short_title_of
from adq_search.status import StudyStatus


def status(
    storage: StorageOption,
    study: StudyOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    host: HostOption = "optuna",
) -> None:
    """Show a running study: trials, workers, hypervolume, time left, and the front so far."""
    found = find_sharing_host(host).status(storage, study)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    for name, text in _lines(found):
        console.print(f"{name:<18}{text}", soft_wrap=True)
    console.print(_front_table(found))


def _lines(found: StudyStatus) -> list[tuple[str, str]]:
    counts = ", ".join(f"{n} {what}" for what, n in sorted(found.counts.items()))
    share, each, left = found.hypervolume, found.seconds_per_trial, found.eta_s
    return [
        ("study", found.study),
        ("policies measured", f"{found.n_finished} of {found.n_trials}"),
        ("trials", counts or "none"),
        ("workers", f"{len(found.workers)} {' '.join(found.workers)}".rstrip()),
        ("hypervolume", "none yet" if share is None else f"{100.0 * share:.2f} % of the box"),
        ("seconds a trial", "none yet" if each is None else f"{each:.3g}"),
        ("time left", "unknown" if left is None else str(timedelta(seconds=round(left)))),
    ]


def _front_table(found: StudyStatus) -> Table:
    names = list(found.front[0].values) if found.front else []
    table = Table(title="front so far", title_justify="left", box=None, padding=(0, 1))
    table.add_column("policy", no_wrap=True)
    for name in names:
        table.add_column(short_title_of(name), justify="right", no_wrap=True)
    table.add_column("trial", justify="right")
    table.add_column("proposed by")
    for point in found.front:
        figures = (amount(name, value) for name, value in point.values.items())
        table.add_row(point.policy_hash, *figures, str(point.number), point.origin)
    return table
