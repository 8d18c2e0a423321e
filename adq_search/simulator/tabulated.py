"""Policies that were really trained, from a table, as a stand-in for training them again.

A policy of the table answers with its own measurement. Any other answers with what a forest of
extremely randomised trees, fitted to the table, expects of it ([Geurts2006]_): a learner that
shares no assumption with the samplers it judges. Which of the two it was, the answer says.

.. [Geurts2006] Geurts, Ernst, Wehenkel. Extremely randomized trees. Machine Learning, 2006.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor

from adq_search.errors import SpaceError
from adq_search.policy import Policy
from adq_search.space import SearchSpace

_N_TREES = 100
_MIN_LEAF = 2


@dataclass(frozen=True, slots=True)
class TabulatedTrial:
    """What a training measured, or what it would be expected to.

    Attributes:
        accuracy: Validation accuracy, 0 to 1.
        kl: Validation KL to the teacher, nats.
        scores: Training loss after each epoch; those of the measured trial of nearest KL where the
            policy itself was not measured.
        is_measured: Whether the table holds the policy.
    """

    accuracy: float
    kl: float
    scores: tuple[float, ...]
    is_measured: bool


@dataclass(frozen=True, eq=False)
class TabulatedProblem:
    """A table of trained policies, with answers for those between.

    Args:
        space: Which policies exist.
        trials: What was measured, by policy.
        seed: Of the forest.
    """

    space: SearchSpace
    trials: Mapping[Policy, TabulatedTrial]
    seed: int = 0

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The measured policies, in the order of the table."""
        return tuple(self.trials)

    def measure(self, policy: Policy) -> TabulatedTrial:
        """Return what the table says, or what the forest expects.

        Raises:
            SpaceError: The policy is not in the space.
        """
        known = self.trials.get(policy)
        if known is not None:
            return known
        forest, finals = self._forest
        log_kl, accuracy = map(float, forest.predict([self._encoded(policy)])[0])
        nearest = list(self.trials.values())[int(np.abs(finals - log_kl).argmin())]
        return TabulatedTrial(accuracy, float(np.exp(log_kl)), nearest.scores, is_measured=False)

    @cached_property
    def _forest(self) -> tuple[Any, NDArray[np.float64]]:
        inputs = [self._encoded(policy) for policy in self.trials]
        targets = np.array([[np.log(t.kl), t.accuracy] for t in self.trials.values()])
        forest = ExtraTreesRegressor(
            _N_TREES, min_samples_leaf=_MIN_LEAF, random_state=self.seed, max_features=0.5
        )
        return forest.fit(inputs, targets), targets[:, 0]

    def _encoded(self, policy: Policy) -> list[float]:
        """Return bits, momenta and one indicator for each scheme, layer after layer."""
        self.space.params_of(policy)
        out: list[float] = []
        for group in self.space.groups:
            if group.pinned is None:
                precision = policy[group.layers[0]]
                bits = precision.weight_bits or 0, precision.input_bits or 0
                out += [float(b) for b in bits]
                out += [precision.ema_momentum or 0.0]
                out += [float(precision.scheme == scheme) for scheme in group.schemes]
        return out


def read_table(file: Path, space: SearchSpace) -> TabulatedProblem:
    """Read a table of trained policies.

    Args:
        file: CSV with the policy, `accuracy`, `kl`, and the training loss after each epoch as
            `train_loss_1` and so on. The policy is a column for each parameter of the space, or one
            column `policy`: the index of each group's choice, separated by blanks.
        space: The space that the policies are of.

    Raises:
        SpaceError: A column is missing, or a row is no policy of the space.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = rows[0] if rows else {}
    is_coded = "policy" in columns
    names = ["policy"] if is_coded else [p.name for p in space.parameters]
    missing = [n for n in (*names, "accuracy", "kl") if n not in columns]
    if missing:
        msg = f"The table {file} has no column {', '.join(missing)}. Record it for this space."
        raise SpaceError(msg)
    kinds: dict[str, Callable[[str], Any]] = {
        p.name: str if p.kind == "categorical" else int for p in space.parameters
    }
    trials = {}
    for row in rows:
        if is_coded:
            policy = _decoded(row["policy"], space, file)
        else:
            policy = space.policy_of({name: kinds[name](row[name]) for name in names})
        epochs = sorted(
            int(c.removeprefix("train_loss_")) for c in row if c.startswith("train_loss_")
        )
        scores = tuple(float(row[f"train_loss_{e}"]) for e in epochs)
        trials[policy] = TabulatedTrial(float(row["accuracy"]), float(row["kl"]), scores, True)
    return TabulatedProblem(space, trials)


def _decoded(code: str, space: SearchSpace, file: Path) -> Policy:
    """Return the policy of a code.

    Raises:
        SpaceError: The code is none of the space.
    """
    indices = [int(word) if word.isdecimal() else -1 for word in code.split()]
    sizes = [len(group.choices) for group in space.groups]
    fits = len(indices) == len(sizes) and all(
        0 <= i < n for i, n in zip(indices, sizes, strict=True)
    )
    if not fits:
        msg = (
            f"A policy of this space is {len(sizes)} indices, each below the number of its group's "
            f"choices, but the table {file} has '{code}'. Record it for this space."
        )
        raise SpaceError(msg)
    chosen = zip(space.groups, indices, strict=True)
    return space.policy_from({group.name: group.choices[i] for group, i in chosen})
