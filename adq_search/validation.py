"""The first thing wrong with a file that people edit, as one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from adq_search.errors import AdqSearchError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def validated(model: type[Model], content: Any, error: type[AdqSearchError], *, what: str) -> Model:
    """Validate `content` as `model`.

    Args:
        model: The pydantic model.
        content: Parsed YAML or JSON.
        error: Raised with the field at fault, what is wrong with it, and the nearest known key.
        what: What the content is, for the sentence: `the job file digits.yaml`.
    """
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        raise error(first_problem(problem, model, what=what)) from problem


def first_problem(problem: ValidationError, model: type[BaseModel], *, what: str) -> str:
    """Return one sentence on the first error: place, rule, evidence, remedy.

    An unknown key comes first: it often explains a missing one.
    """
    errors = problem.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place = ".".join(str(part) for part in first["loc"]) or "top level"
    if first["type"] == "extra_forbidden":
        *parents, key = first["loc"]
        hint = did_you_mean(str(key), _keys_at(model, parents))
        return f"{what[0].upper()}{what[1:]} has an unknown key '{place}'. {hint}"
    shown = "" if isinstance(first["input"], dict | list) else f" (it is {first['input']!r})"
    message = first["msg"].removeprefix("Value error, ")
    return f"{what[0].upper()}{what[1:]}: '{place}': {message}{shown}."


def _keys_at(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """Return the keys that are known at a place of the content, through lists and mappings too."""
    at: Any = model
    for part in path:
        is_model = isinstance(at, type) and issubclass(at, BaseModel)
        at = at.model_fields[str(part)].annotation if is_model else _values_of(at)
        while not isinstance(at, type) and type(None) in get_args(at):
            at = next(a for a in get_args(at) if a is not type(None))
    if not (isinstance(at, type) and issubclass(at, BaseModel)):
        return []
    return [field.alias or name for name, field in at.model_fields.items()]


def _values_of(annotation: Any) -> Any:
    """Return the annotation of a mapping's or a list's values."""
    arguments = get_args(annotation)
    return arguments[-1] if arguments else annotation
