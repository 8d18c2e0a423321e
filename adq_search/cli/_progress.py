"""Progress on a terminal as bars, elsewhere as plain lines."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_EVERY_S = 5.0


class ShownProgress:
    """Shows each stage of long work: a bar on a terminal, a line every five seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
        self._stages: dict[str, TaskID] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show how far a stage has come."""
        if self._bars is not None:
            if stage not in self._stages:
                self._stages[stage] = self._bars.add_task(stage, total=total, note=note)
            self._bars.update(self._stages[stage], completed=done, total=total, note=note)
            return
        when, before = self._last.get(stage, (0.0, -1))
        now = time.monotonic()
        if done != before and (done == total or now - when >= _EVERY_S):
            self._last[stage] = (now, done)
            self._console.print(f"{stage}: {done}/{total} {note}".rstrip())
