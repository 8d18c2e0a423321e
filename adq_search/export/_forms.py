"""How each quantizer is written down for a reader who does not have this package.

Weights of every kind: level of code c in channel o = table[c] * scale[o]. Inputs: a rule in words
over named tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from adq_search.errors import StorageError, did_you_mean
from adq_search.quantizers import InputQuantizer, N2uqInput, WeightQuantizer
from adq_search.quantizers._calibration import EPS
from adq_search.quantizers._thresholds import MIN_WIDTH

Fields = dict[str, Any]
Form = TypeVar("Form")


@dataclass(frozen=True, slots=True)
class WeightForm:
    """What of a weight quantizer is scale and what is table.

    Args:
        rule: How a code becomes a weight, in words.
        scale: Name of the trained scale, by whose magnitude all levels grow; None for 1.
        table: Name of the buffer that holds the levels; None where the bits decide them.
        fields: What hardware wants to know besides, as JSON.
    """

    rule: str
    scale: str | None = None
    table: str | None = None
    fields: Callable[[WeightQuantizer], Fields] | None = None


@dataclass(frozen=True, slots=True)
class InputForm:
    """What an input quantizer computes.

    Args:
        rule: In words, over the tensors named in its state.
        derived: Tensors that spare the reader a computation, by name.
    """

    rule: str
    derived: Callable[[InputQuantizer], dict[str, Tensor]] | None = None


def weight_table(quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Return what the levels consist of.

    Returns:
        Table, ascending, # shape: (n_levels,); scale, # shape: (out,) or (1,). Their products are
        the levels, bit for bit.

    Raises:
        StorageError: Nobody registered a form for this quantizer.
    """
    form = weight_form(quantizer.name)
    if form.scale is None:
        return quantizer.levels().float(), torch.ones(1)
    unscaled = copy.deepcopy(quantizer)
    scale = unscaled.get_parameter(form.scale)
    magnitude = scale.detach().abs().clamp(min=EPS).reshape(-1).clone()
    with torch.no_grad():
        scale.fill_(1)
    levels = unscaled.levels()
    return levels.reshape(-1, levels.shape[-1])[0].float(), magnitude


@torch.no_grad()
def restore_table_(quantizer: WeightQuantizer, table: Tensor, scale: Tensor) -> None:
    """Give a quantizer the levels `table * scale`, in place."""
    form = weight_form(quantizer.name)
    if form.scale is not None:
        held: Tensor = quantizer.get_parameter(form.scale)
        held.copy_(scale.view(held.shape))
    if form.table is not None:
        quantizer.get_buffer(form.table).copy_(table)
    quantizer.calibrated_bits.fill_(quantizer.bits)
    quantizer.is_initialized = True


def weight_form(quantizer: str) -> WeightForm:
    """Return the form of a weight quantizer."""
    return _found(WEIGHT_FORMS, quantizer, "weight quantizer", "WEIGHT_FORMS")


def input_form(quantizer: str) -> InputForm:
    """Return the form of an input quantizer."""
    return _found(INPUT_FORMS, quantizer, "input quantizer", "INPUT_FORMS")


def _found(forms: Mapping[str, Form], quantizer: str, what: str, registry: str) -> Form:
    if quantizer not in forms:
        msg = (
            f"An export must say what a quantizer computes, but {what} '{quantizer}' has no form. "
            f"Add one to `adq_search.export.{registry}`. {did_you_mean(quantizer, forms)}"
        )
        raise StorageError(msg)
    return forms[quantizer]


def _powers(quantizer: WeightQuantizer) -> Fields:
    signs, exponents = quantizer.get_buffer("signs"), quantizer.get_buffer("exponents")
    root = {"pot": 1, "post": 2}.get(quantizer.name) or quantizer.options["root"]
    fields = {"root": root, "signs": signs.int().tolist(), "exponents": exponents.int().tolist()}
    snapped = quantizer.options.get("sqrt_half", "exact")
    return fields if snapped == "exact" else {**fields, "sqrt_half": snapped}


def _thresholds(quantizer: InputQuantizer) -> dict[str, Tensor]:
    found = cast("N2uqInput", quantizer)
    widths = found.widths.detach().clamp(min=MIN_WIDTH)
    starts = found.start.detach() + torch.cat([widths.new_zeros(1), widths.cumsum(0)])
    levels = found.levels()
    return {"thresholds": starts[:-1] + widths / 2, "levels": levels.detach()}


_POWER_RULE = (
    "weight = table[code] * scale[channel]; "
    "table[code] = signs[code] * 2^-floor(exponents[code] / root) * f^(exponents[code] mod root) "
    "with f = 2^(-1 / root), or `sqrt_half` where that is given"
)
#: Forms by the name of the weight quantizer; third parties add theirs.
WEIGHT_FORMS: dict[str, WeightForm] = {
    "lsq": WeightForm("weight = table[code] * scale[channel]; table is integer", scale="step"),
    "pot": WeightForm(_POWER_RULE, scale="threshold", fields=_powers),
    "post": WeightForm(_POWER_RULE, scale="threshold", fields=_powers),
    "root": WeightForm(_POWER_RULE, scale="threshold", fields=_powers),
    "adq": WeightForm("weight = table[code] (the codebook); scale is 1", table="codebook"),
}
_ROUND = "code = clamp(round_half_to_even(x / s), lowest, highest); input = code * s"
#: Forms by the name of the input quantizer.
INPUT_FORMS: dict[str, InputForm] = {
    "lsq": InputForm(f"s = max(|step|, 1e-8); {_ROUND}"),
    "asq": InputForm(
        "m = mean of x over all positions of a sample, one a channel; "
        "h = max(0, adapter.hidden.weight m + adapter.hidden.bias), or h = m where there is no "
        "hidden layer; beta = max(adapter.output.weight h + adapter.output.bias, 1e-8); "
        f"s = max(|step|, 1e-8) * beta; {_ROUND}"
    ),
    "n2uq": InputForm(
        "i = number of thresholds below x * max(|in_scale|, 1e-8); code = i + lowest; "
        "input = levels[i]",
        derived=_thresholds,
    ),
}
