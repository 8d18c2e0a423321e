"""`adq-search worker`: join a running study from any machine that reaches its storage."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from adq_search.cli._progress import ShownProgress
from adq_search.cli._ranks import follow_to_the_end, launched, threads_each
from adq_search.cli._run import find_host
from adq_search.errors import AdqSearchError, StorageError
from adq_search.own_process import set_up_process
from adq_search.status import SharingHost

StorageOption = Annotated[
    str, typer.Option(help="The run's --storage: a database URL, grpc://HOST:PORT, a journal file.")
]
StudyOption = Annotated[str, typer.Option(help="Name of the study.")]
HostOption = Annotated[str, typer.Option(help="What runs the search.")]
_RETRY_S = 2.0
#: Exit code after a request to stop, as shells give it for SIGTERM.
_STOPPED = 143


def worker(
    storage: StorageOption,
    study: StudyOption,
    folder: Annotated[
        Path | None, typer.Option(help="Where this worker keeps its files [a temporary one].")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads to train with [1; under torchrun all, shared out]."),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for the study to begin.")
    ] = 0.0,
    host: HostOption = "optuna",
) -> None:
    """Run trials of a study that `adq-search run` began, until it has all that it asked for.

    Started by torchrun, the processes train each trial together.
    """
    console = Console()
    signal.signal(signal.SIGTERM, _interrupt)  # how a batch system says stop
    ranks = launched()
    set_up_process(threads or (1 if ranks.size == 1 else threads_each()))
    if not ranks.is_first:
        follow_to_the_end(ranks)
        return
    joined = find_sharing_host(host)
    _wait_for(joined, storage, study, wait)
    with (
        tempfile.TemporaryDirectory(prefix="adq-search-") as scratch,
        ShownProgress(console) as bar,
    ):
        try:
            n = joined.work(storage, study, folder or Path(scratch), bar, ranks=ranks)
        except KeyboardInterrupt:
            console.print("stopped; the policy it was at is back in the queue")
            raise typer.Exit(_STOPPED) from None
    console.print(f"study '{study}' has its {n} trials", highlight=False)


def _interrupt(_: int, __: FrameType | None) -> None:
    """Take a request to end for Ctrl-C, which waits where an interruption would do harm."""
    signal.raise_signal(signal.SIGINT)


def find_sharing_host(name: str) -> SharingHost:
    """Return the host of a name whose studies can be joined and looked at.

    Raises:
        AdqSearchError: No such host, or its studies cannot.
    """
    host = find_host(name)
    if not isinstance(host, SharingHost):
        msg = f"Studies of the host '{name}' cannot be joined or looked at. Take --host optuna."
        raise AdqSearchError(msg)
    return host


def _wait_for(host: SharingHost, storage: str, study: str, seconds: float) -> None:
    """Wait until a study can be looked at, at most some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            host.status(storage, study)
        except StorageError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return
