"""The written form of a search space: what may stand under `space:` in a job file.

Checked here: keys, types and ranges. Whether a name exists in the network or among the quantizers
is checked where both are known, by `SearchSpace.from_spec`.

Example:
    >>> rule = {"weight_bits": [2, 4], "input_bits": [4], "schemes": ["lsq"]}
    >>> spec = parse_space({"default": rule})
    >>> print(spec.pinned["first"].precision)
    W8A8 lsq
    >>> spec.default.weight_bits
    [2, 4]
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from adq_search.errors import SpaceError
from adq_search.policy import FLOAT, FLOAT_SCHEME, MAX_BITS, MIN_BITS, LayerPrecision, OptionValue
from adq_search.validation import StrictModel, validated


def _distinct(values: list[Any]) -> list[Any]:
    repeated = sorted({v for v in values if values.count(v) > 1})
    if repeated:
        msg = f"each value stands once, but {', '.join(map(str, repeated))} is repeated"
        raise ValueError(msg)
    return values


def _scalar(value: Any) -> OptionValue:
    if not isinstance(value, bool | int | float | str):
        msg = "an option is a number, a text or true/false"
        raise ValueError(msg)
    return value


Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
BitsList = Annotated[list[Bits], Field(min_length=1), AfterValidator(_distinct)]
NameList = Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
MomentumList = Annotated[list[Momentum], Field(min_length=1), AfterValidator(_distinct)]
Option = Annotated[Any, AfterValidator(_scalar)]


class _Strict(StrictModel):
    # YAML knows its types: a quoted number or a 4.0 is a slip worth naming.
    model_config = ConfigDict(strict=True)


class RuleSpec(_Strict):
    """What the layers of one rule may take; a key left out is decided by a later rule.

    Attributes:
        weight_bits: Bits of a weight code, 2 to 8.
        input_bits: Bits of an input code, 2 to 8.
        schemes: Names of schemes; the two quantizers are chosen together.
        weight_quantizers: Names of weight quantizers, chosen apart from the input quantizers.
        input_quantizers: Names of input quantizers.
        ema_momenta: Momenta of adaptive codebooks, 0 <= m < 1.
        scheme_weight_bits: Weight bits of single schemes, where these may not take all of
            `weight_bits`: `{post: [3, 4]}`. Others take all.
    """

    weight_bits: BitsList | None = None
    input_bits: BitsList | None = None
    schemes: NameList | None = None
    weight_quantizers: NameList | None = None
    input_quantizers: NameList | None = None
    ema_momenta: MomentumList | None = None
    scheme_weight_bits: dict[str, BitsList] | None = None

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.schemes and (self.weight_quantizers or self.input_quantizers):
            msg = (
                "give either `schemes` (pairs of quantizers) or `weight_quantizers` and "
                "`input_quantizers` (two separate choices), not both"
            )
            raise ValueError(msg)
        return self


class PinSpec(_Strict):
    """A precision that the search leaves alone.

    Written out, or in short: 8 for W8A8 lsq, `float` for a layer that is not quantized.
    """

    weight_bits: Bits | None = None
    input_bits: Bits | None = None
    scheme: str = "lsq"
    ema_momentum: Momentum | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_short(cls, value: Any) -> Any:
        if value == FLOAT_SCHEME:
            return {"scheme": FLOAT_SCHEME}
        if isinstance(value, int) and not isinstance(value, bool):
            return {"weight_bits": value, "input_bits": value}
        if isinstance(value, str):
            msg = "a pin is a number of bits, 'float', or a mapping"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = (self.weight_bits, self.input_bits, self.ema_momentum)
        if self.scheme == FLOAT_SCHEME and given != (None, None, None):
            msg = "scheme 'float' takes no bits and no momentum"
            raise ValueError(msg)
        if self.scheme != FLOAT_SCHEME and None in given[:2]:
            msg = "a quantized layer needs `weight_bits` and `input_bits`"
            raise ValueError(msg)
        return self

    @property
    def precision(self) -> LayerPrecision:
        """The pin as a precision."""
        if self.scheme == FLOAT_SCHEME:
            return FLOAT
        return LayerPrecision(self.weight_bits, self.input_bits, self.scheme, self.ema_momentum)


def _first_and_last() -> dict[str, PinSpec]:
    return {end: PinSpec(weight_bits=8, input_bits=8) for end in ("first", "last")}


class SpaceSpec(_Strict):
    """A search space as people write it.

    Attributes:
        default: The rule of every layer that no other rule decides.
        layers: Rules by layer name or pattern. For each key the exact name decides first, then
            the patterns in file order, then `default`.
        pinned: Layers that are not searched: `first`, `last` (in the order the network runs), a
            layer name or a pattern. An exact name decides before `first` and `last`, those before
            patterns in file order.
            First and last at 8 bits is the papers' habit and the default; `{}` pins nothing.
        share: Groups of layers that take one decision, as lists of layer names or patterns.
            Pinned layers stay out of them.
        options: Options of quantizers for the whole network, such as `{post: {levels: eq17}}`.
    """

    default: RuleSpec = Field(default_factory=RuleSpec)
    layers: dict[str, RuleSpec] = Field(default_factory=dict)
    pinned: dict[str, PinSpec] = Field(default_factory=_first_and_last)
    share: dict[str, NameList] = Field(default_factory=dict)
    options: dict[str, dict[str, Option]] = Field(default_factory=dict)


def parse_space(content: Any, *, what: str = "the search space") -> SpaceSpec:
    """Check the mapping that a file gives under `space:`.

    Raises:
        SpaceError: An unknown key, a wrong type or a value out of range, named by its place.
    """
    return validated(SpaceSpec, content, SpaceError, what=what)
