"""What every file of a results folder shares: strict reading, and the order of objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from adq_search.errors import CostError, StorageError, did_you_mean
from adq_search.pareto import Objective

#: Objectives that a trial measures; every other objective is a cost figure.
MEASURED = ("accuracy", "loss", "kl")


class StrictFile(BaseModel):
    """A file that programs exchange: no unknown keys, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def figure_of(
    name: str, measured: Mapping[str, float | None], cost: Mapping[str, float], *, who: str
) -> float:
    """Return a measured figure or a cost figure by name.

    Raises:
        CostError: Nothing has this name.
        StorageError: It was not measured, or is not finite; there are no defaults.
    """
    if name not in measured and name not in cost:
        msg = f"{who} has no figure '{name}'. {did_you_mean(name, [*measured, *cost])}"
        raise CostError(msg)
    value = measured[name] if name in measured else cost[name]
    if value is None or not math.isfinite(value):
        msg = (
            f"{who} counts as complete, but its {name} is {value}. A missing figure has no "
            "default: call the trial diverged, or measure it again."
        )
        raise StorageError(msg)
    return value


def axes_of(objectives: Sequence[Objective]) -> tuple[str, str]:
    """Return the cost to draw on the x axis and the quality to draw on the y axis.

    The first cost figure and the first measured figure among the objectives; `energy_pj` and
    `accuracy` where there is none of the kind.
    """
    names = [objective.name for objective in objectives]
    cost = next((n for n in names if n not in MEASURED), "energy_pj")
    return cost, next((n for n in names if n in MEASURED), "accuracy")
