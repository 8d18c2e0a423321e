"""Which rule decides which layer: from the written space and the traced network to groups.

Precedence, key by key: the layer's exact name, then the patterns that match it in file order, then
`default`. Patterns are `fnmatch` globs on the dotted name, case-sensitive; `*` crosses dots.
"""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from adq_search.errors import AdqSearchError, AdqSearchWarning, SpaceError, did_you_mean
from adq_search.policy import LayerPrecision, OptionValue
from adq_search.quantizers import (
    INPUT_QUANTIZERS,
    SCHEMES,
    WEIGHT_QUANTIZERS,
    check_precision,
    resolve_scheme,
)
from adq_search.space_file import RuleSpec, SpaceSpec

#: Momentum of an adaptive codebook where the space does not say (methods.md 1.2f).
DEFAULT_MOMENTUM = 0.99


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share one decision.

    Args:
        name: The layer's name, or the name under `share`.
        layers: Layer names in the order the network runs.
        weight_bits: Ascending; empty where the group is pinned.
        input_bits: Likewise.
        schemes: Every scheme the group can take, in file order.
        weight_quantizers: Where the two quantizers are separate dimensions; empty otherwise.
        input_quantizers: Likewise.
        ema_momenta: Ascending; empty where no scheme has an adaptive codebook.
        scheme_weight_bits: Weight bits of the schemes that may not take all of `weight_bits`,
            ascending, by scheme.
        pinned: The precision that the search leaves alone; None for a searched group.
    """

    name: str
    layers: tuple[str, ...]
    weight_bits: tuple[int, ...] = ()
    input_bits: tuple[int, ...] = ()
    schemes: tuple[str, ...] = ()
    weight_quantizers: tuple[str, ...] = ()
    input_quantizers: tuple[str, ...] = ()
    ema_momenta: tuple[float, ...] = ()
    scheme_weight_bits: tuple[tuple[str, tuple[int, ...]], ...] = ()
    pinned: LayerPrecision | None = None

    @property
    def choices(self) -> tuple[LayerPrecision, ...]:
        """Every precision the group can take, each once."""
        if self.pinned is not None:
            return (self.pinned,)
        return tuple(
            LayerPrecision(weight_bits, input_bits, scheme, momentum)
            for weight_bits, input_bits, scheme in itertools.product(
                self.weight_bits, self.input_bits, self.schemes
            )
            if weight_bits in self.weight_bits_of(scheme)
            for momentum in (self.ema_momenta if has_codebook(scheme) else (None,))
        )

    def weight_bits_of(self, scheme: str) -> tuple[int, ...]:
        """Return the weight bits that a scheme may take, ascending."""
        return dict(self.scheme_weight_bits).get(scheme, self.weight_bits)

    def nearest_weight_bits(self, weight_bits: int, scheme: str) -> int:
        """Return the bits nearest to `weight_bits` that the scheme may take, the lower of two.

        So every draw of a host is a policy, and its parameters need no conditions.
        """
        return min(self.weight_bits_of(scheme), key=lambda bits: (abs(bits - weight_bits), bits))

    def with_median_momentum(self, precision: LayerPrecision) -> LayerPrecision:
        """Return the precision with the group's middle momentum, where it takes one."""
        if self.pinned is not None or not has_codebook(precision.scheme):
            return precision
        return replace(precision, ema_momentum=self.ema_momenta[(len(self.ema_momenta) - 1) // 2])


def has_codebook(scheme: str) -> bool:
    """Whether the scheme's levels follow the weights, and so take an EMA momentum."""
    return scheme != "float" and WEIGHT_QUANTIZERS[resolve_scheme(scheme).weight].has_codebook


def canonical_scheme(scheme: str) -> str:
    """Return the one name that a pair of quantizers goes by: `lsq` for `lsq+lsq`."""
    pair = resolve_scheme(scheme)
    for name, known in SCHEMES.items():
        if (known.weight, known.input) == (pair.weight, pair.input):
            return name
    return f"{pair.weight}+{pair.input}"


def resolve_groups(spec: SpaceSpec, names: Sequence[str]) -> tuple[Group, ...]:
    """Return the groups of the space, in the order the network runs.

    Args:
        spec: The written space.
        names: Every parametric layer of the network, in the order it runs.

    Raises:
        SpaceError: A rule, pin or shared group that touches no layer, a layer in two groups,
            grouped layers with different rules, a searched layer without bits or schemes, or an
            unknown quantizer.
    """
    pinned = _pins(spec, names)
    searched = [name for name in names if name not in pinned]
    for pattern in spec.layers:
        _matched(f"layers.{pattern}", pattern, names, free=searched)
    rules = {name: _rule_of(spec, name) for name in searched}
    _check_momenta(spec, rules)
    _check_limits(spec, rules)
    groups = [Group(name, (name,), pinned=pinned[name]) for name in pinned]
    members = _members(spec, names, searched)
    for group, layers in members.items():
        first = rules[layers[0]]
        for other in layers[1:]:
            if rules[other] != first:
                msg = (
                    f"Layers that share one decision follow one rule, but in `share.{group}` "
                    f"{layers[0]} may take {_describe(first)}, and {other} "
                    f"{_describe(rules[other])}. "
                    "Give them the same rule, or split the group."
                )
                raise SpaceError(msg)
        groups.append(replace(first, name=group, layers=layers))
    return tuple(sorted(groups, key=lambda g: list(names).index(g.layers[0])))


def warn_of_floors(
    groups: tuple[Group, ...], options: Mapping[str, Mapping[str, OptionValue]]
) -> None:
    """Warn of weight bits at which a searched scheme is dominated: its error has a floor.

    Args:
        groups: What `resolve_groups` returned.
        options: Options by quantizer.
    """
    for scheme in sorted({scheme for group in groups for scheme in group.schemes}):
        quantizer = WEIGHT_QUANTIZERS[resolve_scheme(scheme).weight]
        floor = quantizer.error_floor(**options.get(quantizer.name, {}))
        if floor is None:
            continue
        offered = {b for g in groups if scheme in g.schemes for b in g.weight_bits_of(scheme)}
        useful = sorted(b for b in offered if b <= floor.useful_bits)
        beyond = ", ".join(str(b) for b in sorted(offered) if b > floor.useful_bits)
        if beyond:
            limit = (
                f"limit it by `scheme_weight_bits: {{{scheme}: {useful}}}`, or " if useful else ""
            )
            text = (
                f"Scheme '{scheme}' may take {beyond} weight bits, where uniform levels are "
                f"better: its signal-to-noise ratio stops at {floor.snr_db:g} dB, and hardly "
                f"rises beyond {floor.useful_bits} bits. To save trials, {limit}take it out of "
                "`schemes`."
            )
            warnings.warn(text, AdqSearchWarning, stacklevel=4)


def _pins(spec: SpaceSpec, names: Sequence[str]) -> dict[str, LayerPrecision]:
    """Return the precision of every pinned layer, in the network's order."""
    ends = {"first": names[0], "last": names[-1]}
    for key, pin in spec.pinned.items():
        if key not in ends:
            _matched(f"pinned.{key}", key, names)
        try:
            check_precision(f"pinned.{key}", pin.precision)
        except AdqSearchError as error:
            msg = f"The pin `{key}` is no precision: {error}"
            raise SpaceError(msg) from error
    out = {}
    for name in names:
        keys = [
            *(k for k in spec.pinned if k == name and k not in ends),
            *(k for k in ends if k in spec.pinned and ends[k] == name),
            *(k for k in spec.pinned if k not in ends and fnmatchcase(name, k)),
        ]
        if keys:
            out[name] = spec.pinned[keys[0]].precision
    return out


def _rule_of(spec: SpaceSpec, name: str) -> Group:
    """Return a nameless group with what the rules grant to one layer."""
    chain = [
        *(rule for key, rule in spec.layers.items() if key == name),
        *(rule for key, rule in spec.layers.items() if key != name and fnmatchcase(name, key)),
        spec.default,
    ]
    given_bits = _first_given(chain, "weight_bits", name)
    input_bits = _first_given(chain, "input_bits", name)
    schemes, weights, inputs = _quantizers_of(chain, name)
    weight_bits, limited = _limited_bits(chain, name, schemes, sorted(given_bits))
    momenta = next((r.ema_momenta for r in chain if r.ema_momenta), [DEFAULT_MOMENTUM])
    return Group(
        name="",
        layers=(),
        weight_bits=weight_bits,
        input_bits=tuple(sorted(input_bits)),
        schemes=schemes,
        weight_quantizers=weights,
        input_quantizers=inputs,
        ema_momenta=tuple(sorted(momenta)) if any(map(has_codebook, schemes)) else (),
        scheme_weight_bits=limited,
    )


def _limited_bits(
    chain: Sequence[RuleSpec], name: str, schemes: Sequence[str], given: Sequence[int]
) -> tuple[tuple[int, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    """Return the weight bits that some scheme can take, and the schemes that cannot take all."""
    limits = next((r.scheme_weight_bits for r in chain if r.scheme_weight_bits is not None), {})
    known = {_known_scheme(scheme): bits for scheme, bits in limits.items()}
    allowed = {s: tuple(b for b in given if b in known.get(s, given)) for s in schemes}
    for scheme, bits in allowed.items():
        if not bits:
            msg = (
                f"`scheme_weight_bits` leaves scheme '{scheme}' {known[scheme]}, but {name} may "
                f"take {given}: nothing is left. Give {name} other `schemes`, or its own "
                "`scheme_weight_bits` under `layers`."
            )
            raise SpaceError(msg)
    union = tuple(b for b in given if any(b in bits for bits in allowed.values()))
    return union, tuple(sorted((s, bits) for s, bits in allowed.items() if bits != union))


def _first_given(chain: Iterable[RuleSpec], key: str, name: str) -> list[Any]:
    for rule in chain:
        values: list[Any] | None = getattr(rule, key)
        if values is not None:
            return values
    msg = (
        f"Every searched layer needs `{key}`, but no rule gives them for {name}. "
        f"Add `{key}` under `default`, or pin the layer."
    )
    raise SpaceError(msg)


def _quantizers_of(
    chain: Sequence[RuleSpec], name: str
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return schemes, and the two lists they come from where they are chosen apart."""
    apart = list(itertools.takewhile(lambda rule: rule.schemes is None, chain))
    if not any(rule.weight_quantizers or rule.input_quantizers for rule in apart):
        pairs = tuple(_known_scheme(s) for s in _first_given(chain, "schemes", name))
        if len(set(pairs)) < len(pairs):
            msg = (
                f"Each scheme stands once, but {name} may take {', '.join(pairs)}, where two "
                "names mean the same pair. Keep one."
            )
            raise SpaceError(msg)
        return pairs, (), ()
    weights = _first_given(apart, "weight_quantizers", name)
    inputs = _first_given(apart, "input_quantizers", name)
    for registry, quantizers in ((WEIGHT_QUANTIZERS, weights), (INPUT_QUANTIZERS, inputs)):
        for quantizer in quantizers:
            _known_quantizer(registry, quantizer)
    pairs = tuple(canonical_scheme(f"{w}+{a}") for w, a in itertools.product(weights, inputs))
    return pairs, tuple(weights), tuple(inputs)


def _known_scheme(scheme: str) -> str:
    try:
        return canonical_scheme(scheme)
    except AdqSearchError as error:
        msg = f"The search space names a scheme that cannot be searched: {error}"
        raise SpaceError(msg) from error


def _known_quantizer(registry: Any, quantizer: str) -> None:
    try:
        registry[quantizer]
    except AdqSearchError as error:
        msg = f"The search space names a quantizer that does not exist: {error}"
        raise SpaceError(msg) from error


def _check_momenta(spec: SpaceSpec, rules: Mapping[str, Group]) -> None:
    """Refuse momenta that no searched layer can use."""
    for key, rule in {**spec.layers, "": spec.default}.items():
        if rule.ema_momenta is None:
            continue
        reached = [n for n in rules if not key or n == key or fnmatchcase(n, key)]
        if not any(rules[name].ema_momenta for name in reached):
            place = f"layers.{key}" if key else "default"
            msg = (
                f"`{place}.ema_momenta` touches no layer: none of its layers can take a scheme "
                "with an adaptive codebook. Add a scheme such as adq, or remove the momenta."
            )
            raise SpaceError(msg)


def _check_limits(spec: SpaceSpec, rules: Mapping[str, Group]) -> None:
    """Refuse weight bits of a scheme that no searched layer can take."""
    for key, rule in {**spec.layers, "": spec.default}.items():
        place = f"layers.{key}" if key else "default"
        reached = [n for n in rules if not key or n == key or fnmatchcase(n, key)]
        taken = {scheme for name in reached for scheme in rules[name].schemes}
        for scheme in rule.scheme_weight_bits or {}:
            if _known_scheme(scheme) not in taken:
                msg = (
                    f"`{place}.scheme_weight_bits` limits '{scheme}', but none of its layers can "
                    f"take that scheme. {did_you_mean(scheme, taken)}"
                )
                raise SpaceError(msg)


def _members(
    spec: SpaceSpec, names: Sequence[str], searched: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return the layers of each group, shared ones and singles, by group name."""
    owner: dict[str, str] = {}
    for group, patterns in spec.share.items():
        if "/" in group or not group:
            msg = f"A shared group is named without slashes, but this is {group!r}. Rename it."
            raise SpaceError(msg)
        found = [_matched(f"share.{group}", p, names, free=searched) for p in patterns]
        for layer in dict.fromkeys(itertools.chain(*found)):
            if layer in owner:
                msg = (
                    f"A layer shares its decision with one group, but {layer} is in "
                    f"`share.{owner[layer]}` and `share.{group}`. Take it out of one."
                )
                raise SpaceError(msg)
            owner[layer] = group
    members: dict[str, tuple[str, ...]] = {}
    for name in searched:
        group = owner.get(name, name)
        members[group] = (*members.get(group, ()), name)
    for group in spec.share:
        strangers = [n for n in names if n == group and owner.get(n) != group]
        if strangers:
            msg = f"A shared group may not take the name of another layer, as {group!r}. Rename it."
            raise SpaceError(msg)
    return members


def _matched(
    place: str, pattern: str, names: Sequence[str], *, free: Sequence[str] | None = None
) -> list[str]:
    """Return the layers a pattern touches.

    Args:
        place: Where the pattern stands in the file.
        pattern: Exact name or glob.
        names: Layers of the network.
        free: Layers it may touch; None for all.
    """
    found = [n for n in names if n == pattern or fnmatchcase(n, pattern)]
    touched = found if free is None else [n for n in found if n in free]
    if touched:
        return touched
    if found:
        msg = (
            f"`{place}` touches no layer: {', '.join(found)} is pinned. Remove the entry, or take "
            "the layer out of `pinned` (`pinned: {}` pins nothing; `first` and `last` are pinned "
            "at 8 bits where nothing is said)."
        )
        raise SpaceError(msg)
    below = [n for n in names if n.startswith(f"{pattern}.")]
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
    hint = f"`{pattern}.*`" if below else ", ".join(nearest)
    msg = f"`{place}` touches no layer of this network. Nearest: {hint}."
    raise SpaceError(msg)


def _describe(rule: Group) -> str:
    momenta = f", momenta {list(rule.ema_momenta)}" if rule.ema_momenta else ""
    limits = "".join(f", {s} at {list(bits)}" for s, bits in rule.scheme_weight_bits)
    return (
        f"weight bits {list(rule.weight_bits)}, input bits {list(rule.input_bits)}, "
        f"schemes {list(rule.schemes)}{limits}{momenta}"
    )
