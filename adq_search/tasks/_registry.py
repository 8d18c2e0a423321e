"""Find a task: by the name of an entry point, or as `package.module:factory`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from adq_search.errors import TaskError, did_you_mean
from adq_search.tasks._base import Task

TaskFactory = Callable[..., Task]
ENTRY_POINT_GROUP = "adq_search.tasks"


def task_names() -> list[str]:
    """Return the names of shipped and installed tasks."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def load_task(reference: str, options: Mapping[str, Any] | None = None) -> Task:
    """Make a task.

    Args:
        reference: A name, or `package.module:factory`; the current folder is on the import path.
        options: Keyword arguments of the factory.

    Raises:
        TaskError: Nothing of that name, the factory refuses the options, or returns no `Task`.
    """
    factory = _find_factory(reference)
    try:
        task = factory(**(options or {}))
    except TypeError as error:
        msg = f"Task '{reference}' does not take these options {dict(options or {})}: {error}."
        raise TaskError(msg) from error
    if not isinstance(task, Task):
        msg = (
            f"The factory '{reference}' must return an adq_search.tasks.Task, but returned a "
            f"{type(task).__name__}."
        )
        raise TaskError(msg)
    return task


def _find_factory(reference: str) -> TaskFactory:
    if ":" in reference:
        return import_object(reference, TaskError, what="task")  # type: ignore[no-any-return]
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=reference):
        return entry.load()  # type: ignore[no-any-return]
    msg = f"There is no task '{reference}'. {did_you_mean(reference, task_names())}"
    msg += " Your own is given as 'package.module:factory'."
    raise TaskError(msg)


def import_object(reference: str, error: type[Exception], *, what: str) -> Any:
    """Import `package.module:attribute`, with the current folder on the path."""
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        msg = (
            f"The {what} '{reference}' cannot be imported: {problem}. Give 'package.module:name' "
            f"as seen from {here} or from an installed package."
        )
        raise error(msg) from problem
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, [n for n in vars(module) if not n.startswith("_")])
        msg = f"Module '{module_name}' has no '{attribute}'. {hint}"
        raise error(msg)
    return getattr(module, attribute)
