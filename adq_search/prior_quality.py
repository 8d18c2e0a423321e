"""How well a prior ranked what was measured, overall and for each group.

Notation:
    K_t: measured KL from the teacher of policy t, nats.
    S_gt: predicted loss increase of its group g, nats.
    x, y, z: ranks over policies of S_g, of K, and of the sum of S over the other groups.
    r_xy: their correlation, Spearman's.

The measured loss belongs to all groups at once, and a search moves them together. So a group is
judged by the partial rank correlation, which takes out what the other groups predict:
    r_xy.z = (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adq_search.policy import Policy
from adq_search.prior import rank_correlation
from adq_search.sensitivity import SensitivityTable
from adq_search.space import Group, SearchSpace

#: A partial correlation of fewer policies says nothing: three ranks leave it no freedom.
_LEAST = 5


@dataclass(frozen=True, slots=True)
class PriorQuality:
    """How well predictions rank measurements.

    Attributes:
        estimator: Who predicted.
        n_measured: Policies compared.
        rank_correlation: Spearman's, of predicted loss increase and measured KL; None where fewer
            than three policies, or one side constant, leave it undefined.
        by_group: Partial rank correlation of each searched group, likewise.
    """

    estimator: str
    n_measured: int
    rank_correlation: float | None
    by_group: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def prior_quality(
    space: SearchSpace, table: SensitivityTable, measured: Sequence[tuple[Policy, float]]
) -> PriorQuality:
    """Compare predictions with measurements.

    Args:
        space: Gives the groups.
        table: The predictions.
        measured: Policies of the space and their KL from the teacher, nats.
    """
    kls = [kl for _, kl in measured]
    predicted = [table.predict(policy) for policy, _ in measured]
    groups = {}
    for group in space.groups:
        if group.pinned is None:
            own = [_score(group, table, policy) for policy, _ in measured]
            others = [total - part for total, part in zip(predicted, own, strict=True)]
            groups[group.name] = _number(partial_rank_correlation(own, kls, others))
    return PriorQuality(
        table.estimator, len(kls), _number(rank_correlation(predicted, kls)), groups
    )


def partial_rank_correlation(x: Sequence[float], y: Sequence[float], z: Sequence[float]) -> float:
    """Return the rank correlation of x and y that z does not account for.

    NaN below five triples, or where z accounts for one of them wholly. Where z is constant it is
    the plain rank correlation.
    """
    if len(x) < _LEAST:
        return math.nan
    between = rank_correlation(x, y)
    if len(set(z)) == 1:
        return between
    of_x, of_y = rank_correlation(x, z), rank_correlation(y, z)
    left = (1.0 - of_x**2) * (1.0 - of_y**2)
    return (between - of_x * of_y) / math.sqrt(left) if left > 1e-12 else math.nan


def _score(group: Group, table: SensitivityTable, policy: Policy) -> float:
    return math.fsum(table.score(layer, policy[layer]) for layer in group.layers)


def _number(correlation: float) -> float | None:
    return None if math.isnan(correlation) else correlation
