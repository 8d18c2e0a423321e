"""A job: task, space, training and search settings, as one YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from adq_search.errors import SpaceError, did_you_mean
from adq_search.hardware import COST_NAMES
from adq_search.pareto import Objective
from adq_search.sensitivity import estimator_names
from adq_search.space import SpaceSpec
from adq_search.training import TrainingSettings
from adq_search.validation import StrictModel, validated

#: Objectives that training measures; every other objective is a cost figure, minimised.
MEASURED: dict[str, Objective] = {
    "accuracy": Objective("accuracy", "maximize"),
    "loss": Objective("loss", "minimize"),
    "kl": Objective("kl", "minimize"),
}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 1024.0, "Mi": 1024.0**2, "Gi": 1024.0**3}
#: What a unit is worth in the unit that ends a cost figure's name.
_UNITS: dict[str, dict[str, float]] = {
    "bytes": {"": 1.0, "B": 1.0},
    "pj": {"": 1.0, "pJ": 1.0, "nJ": 1e3, "uJ": 1e6, "mJ": 1e9},
    "": {"": 1.0},
}


class StopSettings(StrictModel):
    """When a search ends before its last trial; see `adq_search.stopping.settled`.

    Attributes:
        patience: Trials over which the hypervolume must have grown.
        errors: By how many standard errors of the hypervolume it must have grown in them.
        noise: Standard deviation of the measured objective between equal trainings, in its own
            unit; null learns it from the trials.
    """

    patience: Annotated[int, Field(ge=5)] = 20
    errors: Annotated[float, Field(gt=0.0)] = 1.0
    noise: Annotated[float, Field(gt=0.0)] | None = None


class SearchSettings(StrictModel):
    """How the front is searched for.

    Attributes:
        trials: Policies to train, seeds and baselines included.
        objectives: `accuracy`, `loss` or `kl`, and cost figures; one of each kind at least.
        budgets: Upper limits on cost figures, in the unit of the figure's name, or as text with a
            unit: `20KiB`, `1.5uJ`, `300M`.
        prior: Sensitivity estimator that seeds the search; null for none.
        seeds: Policies the prior proposes.
        prior_samples: Training samples the prior looks at.
        prior_budget_s: Seconds after which the prior takes no new sample; null for no limit. How
            many it takes by then depends on the machine.
        hardware: Cost model.
        sampler: Who proposes policies after the seeds: `guide`, or one of Optuna's `tpe`, `nsga2`,
            `gp` and `random`.
        pruner: Who stops hopeless trials: `front` (`FrontPruner` and `FrontScheduler`), or `none`.
        stop: When to end before the last trial; null for never.
        replicates: New seeds that each policy of the front is trained again with after the search,
            0 or at least 2: one would tell nothing of the spread.
        seed: Of everything random.
    """

    trials: Annotated[int, Field(ge=1)] = 30
    objectives: tuple[str, ...] = ("accuracy", "energy_pj")
    budgets: dict[str, float] = Field(default_factory=dict)
    prior: str | None = "fisher"
    seeds: Annotated[int, Field(ge=0)] = 8
    prior_samples: Annotated[int, Field(ge=1)] = 256
    prior_budget_s: Annotated[float, Field(gt=0.0)] | None = None
    hardware: str = "post_asic_45nm"
    sampler: Literal["guide", "tpe", "nsga2", "gp", "random"] = "guide"
    pruner: Literal["front", "none"] = "none"
    stop: StopSettings | None = None
    replicates: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("budgets", mode="before")
    @classmethod
    def _read_budgets(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: parse_amount(name, amount) for name, amount in value.items()}

    @field_validator("replicates")
    @classmethod
    def _check_replicates(cls, value: int) -> int:
        if value == 1:
            msg = "replicates are 0 or at least 2: one tells nothing of the spread. Give 3"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _check_one_is_measured(self) -> Self:
        several = [name for name in self.objectives if name in MEASURED]
        for setting in ("pruner", "stop"):
            if len(several) > 1 and getattr(self, setting) not in (None, "none"):
                msg = (
                    f"'{setting}' forecasts one measured objective, but there are "
                    f"{', '.join(several)}. Keep one of them, or leave '{setting}' out"
                )
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        known = {*MEASURED, *COST_NAMES}
        for name in self.objectives:
            if name not in known:
                msg = f"there is no objective '{name}'. {did_you_mean(name, known)}"
                raise ValueError(msg)
        if len(set(self.objectives)) != len(self.objectives):
            msg = f"each objective stands once, but they are {', '.join(self.objectives)}"
            raise ValueError(msg)
        if not (set(self.objectives) & set(MEASURED) and set(self.objectives) & set(COST_NAMES)):
            msg = "a search needs one measured objective (accuracy, loss, kl) and one cost figure"
            raise ValueError(msg)
        if self.prior is not None and self.prior not in estimator_names():
            msg = f"there is no prior '{self.prior}'. {did_you_mean(self.prior, estimator_names())}"
            raise ValueError(msg)
        return self

    @property
    def axes(self) -> tuple[Objective, ...]:
        """The objectives with their directions."""
        return tuple(MEASURED.get(name, Objective(name, "minimize")) for name in self.objectives)

    @property
    def replicate_seeds(self) -> tuple[int, ...]:
        """The seeds that policies of the front are trained again with."""
        return tuple(range(self.seed + 1, self.seed + 1 + self.replicates))

    @property
    def cost_axis(self) -> str:
        """The first cost figure among the objectives: the one seeds are spread over."""
        return next(name for name in self.objectives if name in COST_NAMES)


class Job(StrictModel):
    """Everything a search needs to be repeated.

    Attributes:
        task: A task's name, or `package.module:factory`.
        task_options: Keyword arguments of the task's factory.
        space: Which policies may be tried.
        training: How a trial trains.
        search: How the front is searched for.
    """

    task: str
    task_options: dict[str, Any] = Field(default_factory=dict)
    space: SpaceSpec = Field(default_factory=SpaceSpec)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)

    @model_validator(mode="after")
    def _check_passes(self) -> Self:
        n = self.training.networks_per_pass
        if n > 1 and self.search.pruner != "none":
            msg = (
                f"the pruner stops trials one by one, but {n} networks are trained as one. Set "
                "'training.networks_per_pass' to 1, or 'search.pruner' to none"
            )
            raise ValueError(msg)
        return self

    def with_search(self, **changes: Any) -> Self:
        """Return the job with some search settings replaced, and checked again."""
        return self._with("search", changes)

    def with_training(self, **changes: Any) -> Self:
        """Return the job with some training settings replaced, and checked again."""
        return self._with("training", changes)

    def _with(self, section: str, changes: dict[str, Any]) -> Self:
        content = self.to_plain()
        content[section] = {**content[section], **changes}
        return validated(type(self), content, SpaceError, what="the job")

    def to_plain(self) -> dict[str, Any]:
        """Return plain JSON-like content that `Job` validates back to an equal job."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=False)


def load_job(text: str, *, what: str) -> Job:
    """Read a job from YAML text.

    Args:
        text: YAML.
        what: What the text is, for errors: `the job file my.yaml`.

    Raises:
        SpaceError: The text is no YAML mapping, or a key or value is wrong.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        msg = f"{what[0].upper()}{what[1:]} is no YAML: {detail}."
        raise SpaceError(msg) from error
    if not isinstance(content, dict):
        msg = f"{what[0].upper()}{what[1:]} must hold a mapping with the key 'task', but does not."
        raise SpaceError(msg)
    return validated(Job, content, SpaceError, what=what)


def read_job(path: Path) -> Job:
    """Read a job file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        msg = f"The job file {path} cannot be read: {error.strerror}. Check the path."
        raise SpaceError(msg) from error
    return load_job(text, what=f"the job file {path}")


def parse_amount(name: str, amount: float | str) -> float:
    """Return an amount in the unit that ends the cost figure's name.

    Example:
        >>> parse_amount("weight_bytes", "20KiB"), parse_amount("energy_pj", "1.5uJ")
        (20480.0, 1500000.0)

    Raises:
        ValueError: Unknown figure, or no such unit for it.
    """
    if name not in COST_NAMES:
        msg = f"there is no cost figure '{name}'. {did_you_mean(name, COST_NAMES)}"
        raise ValueError(msg)
    ending = next(e for e in _UNITS if name.endswith(e))
    if isinstance(amount, int | float):
        value = float(amount)
    else:
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*", amount)
        factors = {
            p + u: pf * uf for p, pf in _PREFIXES.items() for u, uf in _UNITS[ending].items()
        }
        factors |= _UNITS[ending]
        if match is None or match[2] not in factors:
            units = ", ".join(k for k in factors if k)
            msg = f"'{name}: {amount}' is no amount. Write a number, with one of the units {units}"
            raise ValueError(msg)
        value = float(match[1]) * factors[match[2]]
    if not value > 0.0:
        msg = f"budget '{name}' must be positive, but is {amount}"
        raise ValueError(msg)
    return value
