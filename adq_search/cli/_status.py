"""`adq-search status`: how a running study stands."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adq_search.cli._run import find_host
from adq_search.cli._worker import HostOption, find_sharing_host
from adq_search.errors import AdqSearchError
from adq_search.report.units import amount, short_title_of
from adq_search.status import StudyStatus, WatchedHost


def status(
    folder: Annotated[
        Path | None, typer.Argument(help="A run's folder, in place of --storage and --study.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="The run's --storage: a URL, or a journal file.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    host: HostOption = "optuna",
) -> None:
    """Show a running study: trials, workers, hypervolume, time left, and the front so far."""
    found = _look(host, folder, storage, study)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    for name, text in _lines(found):
        console.print(f"{name:<18}{text}", soft_wrap=True)
    console.print(_front_table(found))


def _look(host: str, folder: Path | None, storage: str | None, study: str | None) -> StudyStatus:
    """Look into a folder, or at a study in a storage.

    Raises:
        AdqSearchError: It was not said where to look, or the host cannot look there.
    """
    if folder is None and storage is not None and study is not None:
        return find_sharing_host(host).status(storage, study)
    if folder is None or storage is not None or study is not None:
        msg = "A study is found by a run's folder, or by --storage and --study. Give one of both."
        raise AdqSearchError(msg)
    watched = find_host(host)
    if not isinstance(watched, WatchedHost):
        msg = f"Searches of the host '{host}' tell nothing of themselves. Take another --host."
        raise AdqSearchError(msg)
    return watched.status_in(folder)


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
