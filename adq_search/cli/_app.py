"""Commands, and the one place where errors become a sentence and exit code 2."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from adq_search.cli import _cost, _reuse, _run
from adq_search.errors import AdqSearchError

#: Exit code that Typer gives to Ctrl-C, as shells do.
_INTERRUPTED = 130

app = typer.Typer(
    name="adq-search",
    help="Search mixed-precision quantization policies of a PyTorch network for a chip.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(_run.run)
app.command("report")(_run.report)
app.command("cost")(_cost.cost)
app.command("allocate")(_reuse.allocate)
app.command("train")(_reuse.train)


def main() -> None:
    """Run the command line; the user's mistakes end with exit code 2 and no traceback."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        app()
    except AdqSearchError as error:
        console.print(f"[bold red]error:[/] {_escaped(str(error))}")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            console.print(
                "interrupted; nothing finished is lost. The same command with --resume goes on."
            )
        raise


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
