"""Estimators by name."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from adq_search.errors import SensitivityError, did_you_mean
from adq_search.sensitivity._base import SensitivityEstimator

E = TypeVar("E", bound=type[SensitivityEstimator])

_ESTIMATORS: dict[str, type[SensitivityEstimator]] = {}


def register_estimator(estimator: E) -> E:
    """Make an estimator known by its `name`; a class decorator.

    Raises:
        SensitivityError: Another estimator has that name.
    """
    name = estimator.name
    if name in _ESTIMATORS and _ESTIMATORS[name] is not estimator:
        msg = (
            f"An estimator's name is its own, but '{name}' is taken by "
            f"{_ESTIMATORS[name].__qualname__}. Rename {estimator.__qualname__}."
        )
        raise SensitivityError(msg)
    _ESTIMATORS[name] = estimator
    return estimator


def make_estimator(name: str, **settings: Any) -> SensitivityEstimator:
    """Make an estimator; settings that are not given stay at their defaults.

    Raises:
        SensitivityError: There is no estimator of that name, or it has no such setting.
    """
    if name not in _ESTIMATORS:
        msg = f"There is no sensitivity estimator '{name}'. {did_you_mean(name, _ESTIMATORS)}"
        raise SensitivityError(msg)
    known = inspect.signature(_ESTIMATORS[name]).parameters
    for setting in settings:
        if setting not in known:
            msg = f"Estimator '{name}' has no setting '{setting}'. {did_you_mean(setting, known)}"
            raise SensitivityError(msg)
    return _ESTIMATORS[name](**settings)


def estimator_names() -> tuple[str, ...]:
    """Return the names of all estimators, sorted."""
    return tuple(sorted(_ESTIMATORS))
