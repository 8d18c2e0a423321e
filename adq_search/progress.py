"""What long work tells of itself, and who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears how far a stage of work has come."""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Take the state of a stage.

        Args:
            stage: What is being done, in a word or two.
            done: Units finished, counted from 0.
            total: Units in all.
            note: Something worth showing beside it.
        """
        ...


class NoProgress:
    """Listens to nothing."""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Do nothing."""
