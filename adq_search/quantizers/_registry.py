"""Quantizers by name: filled by a decorator, or by a third party's entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from adq_search.errors import QuantizerError, did_you_mean

ENTRY_POINT_GROUP = "adq_search.quantizers"

Kind = TypeVar("Kind")


class Registry(Generic[Kind]):
    """Classes by their `name`; a name stands once.

    A name that is not here yet is looked for in the entry points of `adq_search.quantizers`: each
    names a module that registers its quantizers when it is imported.

    Args:
        what: What the registry holds, as it should stand in an error text.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._classes: dict[str, type[Kind]] = {}
        self._has_read_entry_points = False

    def register(self, name: str) -> Callable[[type[Kind]], type[Kind]]:
        """Return a decorator that files a class under `name`.

        Raises:
            QuantizerError: Another class has the name, or the name holds a `+`.
        """
        if "+" in name or not name:
            msg = f"A {self._what} cannot be named {name!r}: `+` parts a scheme. Rename it."
            raise QuantizerError(msg)

        def file(kind: type[Kind]) -> type[Kind]:
            held = self._classes.get(name)
            if held is not None and held is not kind:
                msg = (
                    f"Two {self._what}s are named '{name}': {held.__module__}.{held.__qualname__} "
                    f"and {kind.__module__}.{kind.__qualname__}. Rename one."
                )
                raise QuantizerError(msg)
            self._classes[name] = kind
            return kind

        return file

    def __getitem__(self, name: str) -> type[Kind]:
        if name not in self:
            msg = f"There is no {self._what} '{name}'. {did_you_mean(name, self._classes)}"
            raise QuantizerError(msg)
        return self._classes[name]

    def __contains__(self, name: str) -> bool:
        if name not in self._classes and not self._has_read_entry_points:
            self._has_read_entry_points = True
            for entry in entry_points(group=ENTRY_POINT_GROUP):
                entry.load()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))
