"""A policy: the precision of every parametric layer of one network, as a frozen value.

A policy is what the search looks for, what the report lists, and what a user takes home. It names
*every* parametric layer, also the ones left in floating point, so that nothing is quantized (or
left unquantized) by omission.

Example:
    >>> w4a4 = LayerPrecision(weight_bits=4, input_bits=4, scheme="lsq")
    >>> policy = Policy.of({"conv": w4a4, "fc": FLOAT})
    >>> policy["conv"].weight_bits
    4
    >>> Policy.from_json(policy.to_json()) == policy
    True
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adq_search.errors import PolicyError
from adq_search.files import read_json, write_json

MIN_BITS = 2
MAX_BITS = 8
FLOAT_SCHEME = "float"
SCHEMA = "adq_search.policy/1"

OptionValue = bool | int | float | str
#: Options of one quantizer by name, in sorted order: `(("levels", "eq17"),)`.
Options = tuple[tuple[str, OptionValue], ...]


@dataclass(frozen=True, order=True, slots=True)
class LayerPrecision:
    """How one layer is quantized.

    Args:
        weight_bits: Bits of a weight code, 2 to 8; None leaves the layer in floating point.
        input_bits: Bits of an input (activation) code, 2 to 8; None likewise.
        scheme: Name of a pair of quantizers (`lsq`, `asq`, `pot`, `post`, `asq_post`, `adq`), or
            `weight+input`, such as `adq+lsq`; `float` for an unquantized layer.
        ema_momentum: Share of the old codebook kept at each update, 0 <= m < 1, for a scheme with
            an adaptive codebook; None otherwise.

    Raises:
        PolicyError: Bits or momentum out of range, or half of a layer left in floating point.
    """

    weight_bits: int | None
    input_bits: int | None
    scheme: str
    ema_momentum: float | None = None

    def __post_init__(self) -> None:
        if self.is_float:
            if (self.weight_bits, self.input_bits, self.ema_momentum) != (None, None, None):
                msg = (
                    f"Scheme 'float' takes no bits and no momentum, but {self} gives some. "
                    "Remove them, or name a quantizing scheme."
                )
                raise PolicyError(msg)
            return
        for what, bits in (("weight_bits", self.weight_bits), ("input_bits", self.input_bits)):
            if not isinstance(bits, int) or isinstance(bits, bool):
                msg = f"{what} must be an integer, but is {bits!r}. Give 2 to 8, or scheme 'float'."
                raise PolicyError(msg)
            if not MIN_BITS <= bits <= MAX_BITS:
                msg = f"{what} must lie between {MIN_BITS} and {MAX_BITS}, but is {bits}."
                raise PolicyError(msg)
        if self.ema_momentum is not None and not 0.0 <= self.ema_momentum < 1.0:
            msg = f"ema_momentum must lie in [0, 1), but is {self.ema_momentum}."
            raise PolicyError(msg)

    @property
    def is_float(self) -> bool:
        """Whether the layer stays in floating point."""
        return self.scheme == FLOAT_SCHEME

    def __str__(self) -> str:
        if self.is_float:
            return FLOAT_SCHEME
        momentum = "" if self.ema_momentum is None else f" m={self.ema_momentum:g}"
        return f"W{self.weight_bits}A{self.input_bits} {self.scheme}{momentum}"


FLOAT = LayerPrecision(weight_bits=None, input_bits=None, scheme=FLOAT_SCHEME)


@dataclass(frozen=True, slots=True)
class Policy:
    """The precision of every parametric layer of a network; hashable, ordered as the network runs.

    Args:
        layers: `(layer name, precision)` pairs, each name once.
        options: Options of quantizers that hold for the whole network, sorted by quantizer name,
            such as `(("post", (("levels", "eq17"),)),)`. Use `Policy.of` to build from mappings.
    """

    layers: tuple[tuple[str, LayerPrecision], ...]
    options: tuple[tuple[str, Options], ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            msg = "A policy needs at least one layer, but has none."
            raise PolicyError(msg)
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            msg = f"A policy names each layer once, but {', '.join(repeated)} stand twice."
            raise PolicyError(msg)

    @classmethod
    def of(
        cls,
        layers: Mapping[str, LayerPrecision],
        options: Mapping[str, Mapping[str, OptionValue]] | None = None,
    ) -> Self:
        """Build a policy from mappings of layer name -> precision and quantizer -> options."""
        frozen = tuple(
            (name, tuple(sorted(values.items())))
            for name, values in sorted((options or {}).items())
            if values
        )
        return cls(layers=tuple(layers.items()), options=frozen)

    @classmethod
    def uniform(
        cls,
        names: Sequence[str],
        precision: LayerPrecision,
        *,
        ends: LayerPrecision | None = None,
        options: Mapping[str, Mapping[str, OptionValue]] | None = None,
    ) -> Self:
        """Give every layer `precision`, the first and the last one `ends` where it is given."""
        layers = dict.fromkeys(names, precision)
        if ends is not None and names:
            layers[names[0]] = ends
            layers[names[-1]] = ends
        return cls.of(layers, options)

    @property
    def names(self) -> tuple[str, ...]:
        """The layer names, in the network's order."""
        return tuple(name for name, _ in self.layers)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that two policies share when they say the same."""
        content = {"layers": self._layers_json(), "options": self._options_json()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def options_of(self, quantizer: str) -> dict[str, OptionValue]:
        """Return the options of one quantizer, empty where there are none."""
        return dict(dict(self.options).get(quantizer, ()))

    def __getitem__(self, name: str) -> LayerPrecision:
        for layer, precision in self.layers:
            if layer == name:
                return precision
        raise KeyError(name)

    def __iter__(self) -> Iterator[tuple[str, LayerPrecision]]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def difference(self, names: Sequence[str]) -> str:
        """Say how this policy's layers differ from `names`; empty where they are the same set."""
        missing = [n for n in names if n not in self.names]
        unknown = [n for n in self.names if n not in names]
        parts = []
        if missing:
            parts.append(f"layers of the network without a precision: {', '.join(missing)}")
        if unknown:
            parts.append(f"layers of the policy that the network lacks: {', '.join(unknown)}")
        return "; ".join(parts)

    def to_json(self, **extra: Any) -> dict[str, Any]:
        """Return the versioned JSON form.

        Args:
            **extra: What else the file should carry: `metrics`, `provenance`, `network`. It does
                not take part in equality or hash.
        """
        return {
            "schema": SCHEMA,
            "policy_hash": self.hash,
            "layers": self._layers_json(),
            "options": self._options_json(),
            **extra,
        }

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Build a policy from its JSON form.

        Raises:
            PolicyError: The content is not a policy of this schema, with the field at fault.
        """
        try:
            form = _PolicyFile.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            msg = (
                f"This is no policy of schema '{SCHEMA}': {place}: {first['msg']}. "
                "Write policies with `save_policy`, or mend the field."
            )
            raise PolicyError(msg) from error
        layers = {
            name: LayerPrecision(p.weight_bits, p.input_bits, p.scheme, p.ema_momentum)
            for name, p in form.layers.items()
        }
        policy = cls.of(layers, form.options)
        if form.policy_hash is not None and form.policy_hash != policy.hash:
            msg = (
                f"The policy's hash is {policy.hash}, but its file says {form.policy_hash}: it was "
                "edited by hand. Remove `policy_hash` from the file if the edit is meant."
            )
            raise PolicyError(msg)
        return policy

    def _layers_json(self) -> dict[str, dict[str, Any]]:
        out: dict[str, dict[str, Any]] = {}
        for name, p in self.layers:
            entry: dict[str, Any] = {"scheme": p.scheme}
            if not p.is_float:
                entry |= {"weight_bits": p.weight_bits, "input_bits": p.input_bits}
            if p.ema_momentum is not None:
                entry["ema_momentum"] = p.ema_momentum
            out[name] = entry
        return out

    def _options_json(self) -> dict[str, dict[str, OptionValue]]:
        return {name: dict(options) for name, options in self.options}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _PrecisionFile(_Strict):
    scheme: str
    weight_bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | None = None
    input_bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | None = None
    ema_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None


class _PolicyFile(_Strict):
    schema_: Literal["adq_search.policy/1"] = Field(alias="schema")
    policy_hash: str | None = None
    layers: dict[str, _PrecisionFile] = Field(min_length=1)
    options: dict[str, dict[str, OptionValue]] = Field(default_factory=dict)
    network: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None


def save_policy(policy: Policy, path: Path | str, **extra: Any) -> None:
    """Write a policy file; `extra` may give `network`, `metrics` and `provenance`."""
    write_json(Path(path), policy.to_json(**extra))


def load_policy(path: Path | str) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: The file is missing, damaged, or no policy.
    """
    return Policy.from_json(read_json(Path(path), PolicyError, what="policy"))


def parse_uniform(text: str) -> tuple[int, int]:
    """Return `(weight_bits, input_bits)` of a name such as `W4A8`.

    Raises:
        PolicyError: The text is not of that form.
    """
    match = re.fullmatch(r"[Ww](\d+)[Aa](\d+)", text)
    if match is None:
        msg = f"A uniform precision is written like W4A4, but this is {text!r}."
        raise PolicyError(msg)
    return int(match[1]), int(match[2])
