"""The search space: which precisions each group of layers may take, and its flat parameters.

A host (Optuna, Ray) sees `parameters`: named integers and choices, always the same ones. The rest
of the package sees policies. `policy_of` and `params_of` translate between the two, and
`policy_of(params_of(policy))` is `policy` for every policy of the space.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Self

from adq_search.errors import AdqSearchError, SpaceError, did_you_mean
from adq_search.policy import (
    FLOAT,
    MAX_BITS,
    MIN_BITS,
    LayerPrecision,
    Options,
    OptionValue,
    Policy,
)
from adq_search.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS, resolve_scheme
from adq_search.space_file import SpaceSpec, parse_space
from adq_search.space_rules import (
    DEFAULT_MOMENTUM,
    Group,
    canonical_scheme,
    has_codebook,
    resolve_groups,
    warn_of_floors,
)
from adq_search.tracing import ModelSummary

__all__ = [
    "DEFAULT_MOMENTUM",
    "Group",
    "Parameter",
    "SearchSpace",
    "SpaceSpec",
    "has_codebook",
    "params_of_group",
    "parse_space",
    "precision_of",
]

Value = int | float | str
Params = dict[str, int | str]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One dimension of the space, in the form that hosts understand.

    An ordinal one is an integer from `low` to `high` in steps of `step`: the value itself where
    the values are evenly spaced integers, as 2, 3, 4 are; else its index, and the name says so.

    Args:
        name: `<group>.<what>`, without a slash (Ray would nest it).
        kind: `ordinal` or `categorical`.
        values: At least two; ascending where ordinal, in file order where categorical.
    """

    name: str
    kind: Literal["ordinal", "categorical"]
    values: tuple[Value, ...]

    @property
    def is_index(self) -> bool:
        """Whether the host's integer is an index into `values`."""
        return self.kind == "ordinal" and not _are_even(self.values)

    @property
    def low(self) -> int:
        """Smallest integer of an ordinal parameter, included."""
        return 0 if self.is_index else int(self.values[0])

    @property
    def high(self) -> int:
        """Largest integer of an ordinal parameter, included."""
        return len(self.values) - 1 if self.is_index else int(self.values[-1])

    @property
    def step(self) -> int:
        """Distance of neighbouring integers of an ordinal parameter."""
        return 1 if self.is_index else int(self.values[1]) - int(self.values[0])

    def encode(self, value: Value) -> int | str:
        """Return what the host is told for one of `values`."""
        if self.kind == "categorical":
            return str(value)
        return self.values.index(value) if self.is_index else int(value)

    def decode(self, raw: Value) -> Value:
        """Return the value that a host's number or choice stands for.

        Raises:
            SpaceError: The host's number or choice is none of this parameter.
        """
        for value in self.values:
            if self.encode(value) == raw:
                return value
        allowed = ", ".join(str(self.encode(v)) for v in self.values)
        msg = f"Parameter '{self.name}' takes one of {allowed}, but was given {raw!r}."
        raise SpaceError(msg)


@dataclass(frozen=True)
class SearchSpace:
    """Every policy that a search may try, for one network.

    Args:
        names: Layer names in the order the network runs.
        groups: Each layer in one group; pinned layers too.
        options: Options of quantizers for the whole network, by quantizer.
        idle: Layers that never run; every policy leaves them in floating point.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    options: tuple[tuple[str, Options], ...] = ()
    idle: tuple[str, ...] = ()

    @classmethod
    def from_spec(cls, spec: SpaceSpec | Mapping[str, Any], summary: ModelSummary) -> Self:
        """Resolve a written space against a network.

        Args:
            spec: The space as checked by `parse_space`, or the mapping of a file.
            summary: The traced network.

        Raises:
            SpaceError: Something in the space touches no layer, does not exist or contradicts
                itself, or nothing is left to search.
        """
        if not isinstance(spec, SpaceSpec):
            spec = parse_space(spec)
        groups = resolve_groups(spec, summary.names)
        _check_options(spec, groups)
        warn_of_floors(groups, spec.options)
        options = Policy.of({summary.names[0]: groups[0].choices[0]}, spec.options).options
        space = cls(summary.names, groups, options, summary.idle)
        if not space.parameters:
            msg = (
                "The search space holds one policy only: nothing is left to search. Allow more "
                "bits or schemes, or pin fewer layers."
            )
            raise SpaceError(msg)
        return space

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The dimensions a host samples: those with more than one value."""
        return tuple(p for g in self.groups for p in _dimensions(g).values() if len(p.values) > 1)

    def options_of(self, quantizer: str) -> dict[str, OptionValue]:
        """Return the options of one quantizer, empty where there are none."""
        return dict(dict(self.options).get(quantizer, ()))

    @cached_property
    def n_policies(self) -> int:
        """Number of different policies; a momentum counts only where a codebook uses it."""
        return math.prod(len(group.choices) for group in self.groups)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two spaces share when they hold the same policies."""
        groups = [asdict(group) for group in self.groups]
        for group in groups:
            if not group["scheme_weight_bits"]:
                del group["scheme_weight_bits"]
        # What is absent leaves no trace: spaces keep the fingerprint of earlier versions.
        content = [self.names, groups, self.options, *([self.idle] if self.idle else [])]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def policy_from(self, precisions: Mapping[str, LayerPrecision]) -> Policy:
        """Build a policy from the precision of each free group, by group name."""
        by_layer = {
            layer: group.pinned or precisions[group.name]
            for group in self.groups
            for layer in group.layers
        }
        options = {name: dict(values) for name, values in self.options}
        layers = {name: by_layer[name] for name in self.names} | dict.fromkeys(self.idle, FLOAT)
        return Policy.of(layers, options)

    def policy_of(self, params: Mapping[str, Value]) -> Policy:
        """Return the policy that a host's parameters stand for.

        Args:
            params: A value for every one of `parameters`. The momentum of a group whose scheme
                has no codebook is ignored; weight bits that the scheme may not take
                (`scheme_weight_bits`) become the nearest it may take, the lower of two.

        Raises:
            SpaceError: A parameter is missing, unknown or out of range.
        """
        known = {p.name for p in self.parameters}
        if known != set(params):
            wrong = {"missing": known - set(params), "unknown": set(params) - known}
            parts = [f"{what}: {', '.join(sorted(n))}" for what, n in wrong.items() if n]
            msg = (
                f"These parameters belong to another search space ({'; '.join(parts)}). Start a "
                "new study for this space."
            )
            raise SpaceError(msg)
        searched = [g for g in self.groups if g.pinned is None]
        return self.policy_from({g.name: precision_of(g, params) for g in searched})

    def params_of(self, policy: Policy) -> Params:
        """Return the parameters of a policy of this space.

        Raises:
            SpaceError: The policy is not in the space; the text names the layer and the reason.
        """
        difference = policy.difference((*self.names, *self.idle))
        if difference:
            msg = f"The policy belongs to another network: {difference}."
            raise SpaceError(msg)
        if policy.options != self.options:
            msg = (
                f"The policy's quantizer options are {dict(policy.options)}, but the space's are "
                f"{dict(self.options)}. Make them the same under `options`."
            )
            raise SpaceError(msg)
        params: Params = {}
        for group in self.groups:
            for layer in group.layers:
                _check_inside(group, layer, policy[layer], policy[group.layers[0]])
            params |= params_of_group(group, policy[group.layers[0]])
        return params

    def uniform_policies(self) -> dict[str, Policy]:
        """Return the baselines: one number of bits for weights and inputs everywhere.

        Only those that every searched group can take, with the first scheme of each group and the
        middle momentum. Pinned layers stay pinned.
        """
        searched = [group for group in self.groups if group.pinned is None]
        return {
            f"uniform W{bits}A{bits}": self.policy_from(
                {
                    g.name: g.with_median_momentum(
                        LayerPrecision(bits, bits, g.schemes[0], _first_momentum(g))
                    )
                    for g in searched
                }
            )
            for bits in range(MIN_BITS, MAX_BITS + 1)
            if all(
                bits in g.weight_bits_of(g.schemes[0]) and bits in g.input_bits for g in searched
            )
        }


_READ: dict[str, Callable[[LayerPrecision], Any]] = {
    "weight_bits": lambda p: p.weight_bits,
    "input_bits": lambda p: p.input_bits,
    "scheme": lambda p: p.scheme,
    "weight_quantizer": lambda p: resolve_scheme(p.scheme).weight,
    "input_quantizer": lambda p: resolve_scheme(p.scheme).input,
    "ema_momentum": lambda p: p.ema_momentum,
}


def _dimensions(group: Group) -> dict[str, Parameter]:
    """Return what is decided in a group, also where only one value is left."""
    if group.pinned is not None:
        return {}
    values: dict[str, tuple[Value, ...]] = {
        "weight_bits": group.weight_bits,
        "input_bits": group.input_bits,
    }
    if group.weight_quantizers:
        values["weight_quantizer"] = group.weight_quantizers
        values["input_quantizer"] = group.input_quantizers
    else:
        values["scheme"] = group.schemes
    if group.ema_momenta:
        values["ema_momentum"] = group.ema_momenta
    out = {}
    for what, allowed in values.items():
        is_text = isinstance(allowed[0], str)
        suffix = "" if is_text or _are_even(allowed) else "_index"
        kind: Literal["ordinal", "categorical"] = "categorical" if is_text else "ordinal"
        out[what] = Parameter(f"{group.name}.{what}{suffix}", kind, allowed)
    return out


def _are_even(values: tuple[Value, ...]) -> bool:
    if not all(isinstance(v, int) for v in values):
        return False
    steps = {int(b) - int(a) for a, b in pairwise(values)}
    return len(steps) <= 1


def params_of_group(group: Group, precision: LayerPrecision) -> Params:
    """Return the parameters of one group's precision; none where the group is pinned."""
    params: Params = {}
    for what, parameter in _dimensions(group).items():
        if len(parameter.values) > 1:
            value = _READ[what](precision)
            is_idle = what == "ema_momentum" and value is None
            params[parameter.name] = parameter.encode(parameter.values[0] if is_idle else value)
    return params


def precision_of(group: Group, params: Mapping[str, Value]) -> LayerPrecision:
    """Return the precision of a searched group that a host's parameters stand for."""
    chosen: dict[str, Any] = {
        what: p.decode(params[p.name]) if len(p.values) > 1 else p.values[0]
        for what, p in _dimensions(group).items()
    }
    scheme = chosen.get("scheme") or canonical_scheme(
        f"{chosen['weight_quantizer']}+{chosen['input_quantizer']}"
    )
    momentum = chosen["ema_momentum"] if has_codebook(scheme) else None
    weight_bits = group.nearest_weight_bits(chosen["weight_bits"], scheme)
    return LayerPrecision(weight_bits, chosen["input_bits"], scheme, momentum)


def _first_momentum(group: Group) -> float | None:
    return group.ema_momenta[0] if has_codebook(group.schemes[0]) else None


def _check_inside(
    group: Group, layer: str, precision: LayerPrecision, shared: LayerPrecision
) -> None:
    """Refuse a precision that the layer's group cannot take."""
    if group.pinned is not None:
        if precision != group.pinned:
            msg = f"{layer} is pinned at {group.pinned}, but the policy gives it {precision}."
            raise SpaceError(msg)
        return
    if precision != shared:
        msg = (
            f"{layer} shares its decision with {group.layers[0]} (group {group.name}), but the "
            f"policy gives them {precision} and {shared}."
        )
        raise SpaceError(msg)
    if precision in group.choices:
        return
    scheme = precision.scheme
    granted = group.weight_bits_of(scheme)
    if scheme in group.schemes and precision.weight_bits not in granted:
        msg = (
            f"The policy is outside the search space: {layer} has weight_bits "
            f"{precision.weight_bits}, but the space allows {', '.join(map(str, granted))} with "
            f"scheme {scheme}."
        )
        raise SpaceError(msg)
    for what, allowed in (
        ("weight_bits", group.weight_bits),
        ("input_bits", group.input_bits),
        ("scheme", group.schemes),
        ("ema_momentum", group.ema_momenta),
    ):
        value = getattr(precision, what)
        if value not in allowed:
            msg = (
                f"The policy is outside the search space: {layer} has {what} {value}, but the "
                f"space allows {', '.join(map(str, allowed))}."
            )
            raise SpaceError(msg)
    msg = (
        f"The policy is outside the search space: {layer} has an ema_momentum, but scheme {scheme} "
        "has no codebook. Leave it out."
    )
    raise SpaceError(msg)


def _check_options(spec: SpaceSpec, groups: tuple[Group, ...]) -> None:
    """Refuse options of quantizers that no layer can take, or that the quantizer does not know."""
    schemes = {p.scheme for group in groups for p in group.choices if not p.is_float}
    pairs = [resolve_scheme(scheme) for scheme in schemes]
    # A name such as lsq stands for a weight and an input quantizer; options go to both.
    used = [WEIGHT_QUANTIZERS[pair.weight] for pair in pairs]
    used_by_inputs = [INPUT_QUANTIZERS[pair.input] for pair in pairs]
    for name, options in spec.options.items():
        named = [quantizer for quantizer in (*used, *used_by_inputs) if quantizer.name == name]
        if not named:
            known = {quantizer.name for quantizer in (*used, *used_by_inputs)}
            msg = f"`options.{name}` touches no layer of this space. {did_you_mean(name, known)}"
            raise SpaceError(msg)
        for quantizer in named:
            try:
                quantizer.resolve_options(options)
            except AdqSearchError as error:
                msg = f"`options.{name}` is refused by the quantizer: {error}"
                raise SpaceError(msg) from error
