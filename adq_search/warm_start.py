"""Warm start: training that begins from the trained weights of the nearest policy.

Near is counted in layers: the Hamming distance of two policies is the number of layers that they
quantize differently. A layer that stays as it was keeps its quantizers as they were trained; any
other gets new ones, fitted to the donor's weights and to what its layer sees with them.

A warm trial has seen more training than its own epochs tell, by those of its donors: its figures
compare with those of other warm trials, not of cold ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from adq_search.convert import apply_policy_
from adq_search.policy import Policy


@dataclass(frozen=True, eq=False)
class Donor:
    """Trained weights that a trial may begin from.

    Attributes:
        policy: What they were trained under.
        weights: As a trial saves them, by name.
        epochs: That they were trained for in all, their own donors' included.
    """

    policy: Policy
    weights: Mapping[str, Tensor]
    epochs: int


def distance(a: Policy, b: Policy) -> int:
    """Return the number of layers that two policies of one network quantize differently."""
    return len(a) - len(_unchanged(a, b))


def nearest(policy: Policy, others: Iterable[Policy]) -> Policy | None:
    """Return the nearest of some policies, of equally near ones that of the lowest hash."""
    return min(others, key=lambda other: (distance(policy, other), other.hash), default=None)


def begin_from_(network: nn.Module, policy: Policy, donor: Donor, calibration: Tensor) -> nn.Module:
    """Quantize a network as a policy says, in place, with a donor's weights.

    Args:
        network: A float network of the task.
        policy: Precision of every parametric layer.
        donor: Where weights, batch norms, and the quantizers of unchanged layers come from.
        calibration: A batch that the other input quantizers are fitted to.

    Returns:
        The same `network`.

    Raises:
        PolicyError: The policy does not fit the network.
    """
    layer_of = {name: _quantized_layer(name) for name in donor.weights}
    network.load_state_dict({n: w for n, w in donor.weights.items() if layer_of[n] is None})
    apply_policy_(network, policy, calibration)
    kept = _unchanged(policy, donor.policy)
    trained = {n: w for n, w in donor.weights.items() if layer_of[n] in kept}
    network.load_state_dict({**network.state_dict(), **trained})
    return network


def _unchanged(a: Policy, b: Policy) -> set[str]:
    if a.options != b.options:
        return set()
    theirs = dict(b)
    return {layer for layer, precision in a if theirs[layer] == precision}


def _quantized_layer(name: str) -> str | None:
    """Return the layer whose quantizers a state belongs to, None where it is no quantizer's."""
    for quantizer in ("weight_quantizer", "input_quantizer"):
        layer, found, _ = f".{name}".partition(f".{quantizer}.")
        if found:
            return layer.removeprefix(".")
    return None
