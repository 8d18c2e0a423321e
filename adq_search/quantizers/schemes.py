"""Schemes: which weight quantizer goes with which input quantizer, as the papers pair them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from adq_search.errors import AdqSearchError, PolicyError, QuantizerError, did_you_mean
from adq_search.policy import FLOAT_SCHEME, LayerPrecision, OptionValue
from adq_search.quantizers._base import (
    INPUT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    InputQuantizer,
    Quantizer,
    WeightQuantizer,
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A named pair of quantizers.

    Args:
        name: As written in a policy.
        weight: Name of the weight quantizer.
        input: Name of the input quantizer.
    """

    name: str
    weight: str
    input: str


#: `asq` and `asq_post` are Schemes 1 and 2 of [Zhou2025]; `pot` is its ablation.
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("lsq", weight="lsq", input="lsq"),
        Scheme("asq", weight="lsq", input="asq"),
        Scheme("post", weight="post", input="lsq"),
        Scheme("asq_post", weight="post", input="asq"),
        Scheme("pot", weight="pot", input="lsq"),
        Scheme("adq", weight="adq", input="n2uq"),
    )
}


def resolve_scheme(name: str) -> Scheme:
    """Return the scheme of a name such as `asq_post` or `adq+lsq` (weight + input quantizer).

    Raises:
        PolicyError: No scheme or quantizer has that name, or it is `float`, which has none.
    """
    if name == FLOAT_SCHEME:
        msg = f"Scheme '{FLOAT_SCHEME}' has no quantizers. Ask `LayerPrecision.is_float` first."
        raise PolicyError(msg)
    if name in SCHEMES:
        return SCHEMES[name]
    weight, plus, inputs = name.partition("+")
    if not plus:
        msg = f"There is no scheme '{name}'. {did_you_mean(name, SCHEMES)} "
        raise PolicyError(msg + "Or name a pair, such as 'adq+lsq'.")
    for part, registry in ((weight, WEIGHT_QUANTIZERS), (inputs, INPUT_QUANTIZERS)):
        if part not in registry:
            which = "weight" if part is weight else "input"
            msg = f"Scheme '{name}' has no {which} quantizer '{part}'. "
            raise PolicyError(msg + did_you_mean(part, registry))
    return Scheme(name, weight=weight, input=inputs)


def check_precision(layer: str, precision: LayerPrecision) -> None:
    """Check that a layer's scheme exists and that its momentum fits it.

    Raises:
        PolicyError: It does not, with the layer's name.
    """
    if precision.is_float:
        return
    try:
        scheme = resolve_scheme(precision.scheme)
    except AdqSearchError as error:
        msg = f"Layer '{layer}': {error}"
        raise PolicyError(msg) from error
    has_codebook = WEIGHT_QUANTIZERS[scheme.weight].has_codebook
    if has_codebook and precision.ema_momentum is None:
        msg = (
            f"Layer '{layer}': scheme '{scheme.name}' has an adaptive codebook and needs an "
            "ema_momentum, but has none. Give one in [0, 1), such as 0.99."
        )
        raise PolicyError(msg)
    if not has_codebook and precision.ema_momentum is not None:
        msg = (
            f"Layer '{layer}': scheme '{scheme.name}' has no codebook, but ema_momentum is "
            f"{precision.ema_momentum:g}. Leave it out."
        )
        raise PolicyError(msg)


def check_options(quantizer: str, options: Mapping[str, OptionValue]) -> None:
    """Check options that are given to all quantizers of one name.

    Raises:
        QuantizerError: No quantizer has that name or option, or the value is not allowed.
    """
    kinds = [r[quantizer] for r in (WEIGHT_QUANTIZERS, INPUT_QUANTIZERS) if quantizer in r]
    if not kinds:
        names = {*WEIGHT_QUANTIZERS, *INPUT_QUANTIZERS}
        msg = f"There are options for quantizer '{quantizer}', which does not exist. "
        raise QuantizerError(msg + did_you_mean(quantizer, names))
    for kind in kinds:
        kind.resolve_options(_own_options(kind, options))


def make_quantizers(
    precision: LayerPrecision,
    layer: nn.Module,
    options_of: Callable[[str], Mapping[str, OptionValue]],
) -> tuple[WeightQuantizer, InputQuantizer]:
    """Make the two quantizers of a layer, on its device, not yet fitted.

    Args:
        precision: Bits, scheme and momentum; not `float`.
        layer: A `Conv1d`, `Conv2d` or `Linear`.
        options_of: Options of a quantizer by its name, such as `Policy.options_of`.

    Raises:
        PolicyError: The scheme is unknown or `float`, or the layer is of another kind.
        QuantizerError: An option is unknown.
    """
    scheme = resolve_scheme(precision.scheme)
    weight_class, input_class = WEIGHT_QUANTIZERS[scheme.weight], INPUT_QUANTIZERS[scheme.input]
    if isinstance(layer, nn.Linear):
        n_channels = layer.in_features
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        n_channels = layer.in_channels
    else:
        msg = f"A {type(layer).__name__} cannot be quantized. Leave it out of the policy."
        raise PolicyError(msg)
    weight = layer.weight
    bits = (precision.weight_bits or 0, precision.input_bits or 0)
    weight_quantizer = weight_class(
        bits[0],
        tuple(weight.shape),
        ema_momentum=precision.ema_momentum,
        **_own_options(weight_class, options_of(scheme.weight)),
    )
    input_quantizer = input_class(
        bits[1],
        n_channels=n_channels,
        channel_dim=1 - weight.ndim,
        **_own_options(input_class, options_of(scheme.input)),
    )
    # Steps of half-precision networks stay in float32.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (
        weight_quantizer.to(device=weight.device, dtype=dtype),
        input_quantizer.to(device=weight.device, dtype=dtype),
    )


def _own_options(
    kind: type[Quantizer], options: Mapping[str, OptionValue]
) -> dict[str, OptionValue]:
    """Leave out what only the namesake of the other kind knows; keep what neither knows."""
    namesakes = [r[kind.name] for r in (WEIGHT_QUANTIZERS, INPUT_QUANTIZERS) if kind.name in r]
    known = {option for namesake in namesakes for option in namesake.option_values}
    return {k: v for k, v in options.items() if k in kind.option_values or k not in known}
