"""Commands, and the one place where errors become a sentence and exit code 2."""

from __future__ import annotations

import errno
import sys
import warnings
from typing import TextIO

import typer
from rich.console import Console

from adq_search.cli import _cost, _export, _reuse, _run, _sensitivity, _status, _verify, _worker
from adq_search.errors import AdqSearchError, AdqSearchWarning

#: Exit code that Typer gives to Ctrl-C, as shells do.
_INTERRUPTED = 130
#: What a disk says that takes no more, and a folder that is not ours to write.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

app = typer.Typer(
    name="adq-search",
    help="Search mixed-precision quantization policies of a PyTorch network for a chip.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(_run.run)
app.command("worker")(_worker.worker)
app.command("status")(_status.status)
app.command("report")(_run.report)
app.command("cost")(_cost.cost)
app.command("sensitivity")(_sensitivity.sensitivity)
app.command("allocate")(_reuse.allocate)
app.command("train")(_reuse.train)
app.command("export")(_export.export)
app.command("verify")(_verify.verify)


def main() -> None:
    """Run the command line; the user's mistakes end with exit code 2 and no traceback."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    show_others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, AdqSearchWarning):
            console.print(f"[bold yellow]warning:[/] {_escaped(str(message))}")
        else:
            show_others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        app()
    except AdqSearchError as error:
        console.print(f"[bold red]error:[/] {_escaped(str(error))}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        told = (
            f"Results must be written, but the system refuses: {error}. Make room, or choose "
            "another folder, then start again. A search goes on with --resume; nothing finished is "
            "lost."
        )
        console.print(f"[bold red]error:[/] {_escaped(told)}")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            console.print(
                "interrupted; nothing finished is lost. The same command with --resume goes on."
            )
        raise


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
