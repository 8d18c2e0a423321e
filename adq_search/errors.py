"""What can be wrong with the user's input, said as rule, evidence and remedy.

Every error raised on purpose by this package is an `AdqSearchError`. The command line turns it
into one sentence and exit code 2; Python callers can catch the kind they expect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdqSearchError(Exception):
    """Anything the user can mend; the text carries the rule, the evidence and the remedy."""


class PolicyError(AdqSearchError):
    """A policy is malformed or does not fit the network."""


class SpaceError(AdqSearchError):
    """A search space names something that does not exist, or is empty."""


class TaskError(AdqSearchError):
    """A task (network and data) cannot be found or made."""


class QuantizerError(AdqSearchError):
    """A quantizer was asked for something outside its definition, or used before calibration."""


class CostError(AdqSearchError):
    """The cost of a layer cannot be computed, or an unknown cost figure was named."""


class IntegerError(AdqSearchError):
    """A network or layer has no exact integer form, or an integer network was misused."""


class SensitivityError(AdqSearchError):
    """A sensitivity estimate is not a finite, non-negative number."""


class StorageError(AdqSearchError):
    """A storage or results folder is damaged, or belongs to another network, data set or space."""


class ParallelError(AdqSearchError):
    """Processes that train one network together disagree, or lost each other."""


class MissingExtraError(AdqSearchError):
    """An optional package is needed; the text names the extra to install."""


class AdqSearchWarning(UserWarning):
    """Something allowed that the user will hardly want; the text carries the remedy."""


class BudgetError(AdqSearchError):
    """No policy of the space can meet a budget.

    Attributes:
        reachable: Smallest and largest value of the cost over the whole space.
    """

    def __init__(self, message: str, reachable: tuple[float, float]) -> None:
        super().__init__(message)
        self.reachable = reachable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error sentence that names the nearest known names.

    Example:
        >>> did_you_mean("asp", ["asq", "lsq", "adq"])
        "Did you mean 'asq'? Known: adq, asq, lsq."
    """
    options = sorted(known)
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'? " if nearest else ""
    return f"{hint}Known: {', '.join(options) or 'none'}."
