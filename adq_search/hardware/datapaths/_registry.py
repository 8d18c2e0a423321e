"""Datapaths by name, and which of them a layer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points

from adq_search.errors import CostError, did_you_mean
from adq_search.hardware._table import Hardware
from adq_search.hardware.datapaths._base import Datapath, Mac, MacJob

#: Modules of third parties that register datapaths when they are imported.
ENTRY_POINT_GROUP = "adq_search.hardware"

_UNITS: dict[str, type[Datapath]] = {}
Kind = type[Datapath]


def register_datapath(name: str) -> Callable[[Kind], Kind]:
    """Register a `Datapath` class under a name that hardware files may use.

    Raises:
        CostError: Another class has the name.
    """

    def register(kind: Kind) -> Kind:
        if _UNITS.get(name, kind) is not kind:
            msg = f"Datapath '{name}' is registered already. Register yours by another name."
            raise CostError(msg)
        _UNITS[name] = kind
        return kind

    return register


def datapath_names() -> tuple[str, ...]:
    """Return the names of the registered datapaths, sorted."""
    return tuple(sorted(_UNITS))


def make_datapath(name: str, settings: Mapping[str, int]) -> Datapath:
    """Make a datapath by name.

    Raises:
        CostError: There is no such datapath, or it has no such setting.
    """
    if name not in _UNITS:
        _read_entry_points()
    if name not in _UNITS:
        msg = f"There is no datapath '{name}'. {did_you_mean(name, _UNITS)}"
        raise CostError(msg)
    try:
        return _UNITS[name](**settings)
    except TypeError as error:
        given = ", ".join(settings)
        msg = f"Datapath '{name}' does not take the settings {given}. Leave them out."
        raise CostError(msg) from error


@cache
def _read_entry_points() -> None:
    """Import the modules that third parties name, once: they register their datapaths."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()


def datapaths_of(quantizer: str, hardware: Hardware, *, layer: str = "") -> tuple[Datapath, ...]:
    """Return the units that a weight quantizer may use on some hardware.

    Args:
        quantizer: Name of the weight quantizer.
        hardware: The model.
        layer: Layer that asks, for the error text.

    Raises:
        CostError: There is none.
    """
    named = dict(hardware.datapaths).get(quantizer)
    if named is not None:
        return tuple(make_datapath(name, dict(settings)) for name, settings in named)
    if hardware.takes_unlisted:
        found = tuple(kind() for _, kind in sorted(_UNITS.items()) if quantizer in kind.serves)
        if found:
            return found
    known = {name for name, _ in hardware.datapaths}
    asked = f", which `{layer}` asks for" if layer else ""
    msg = (
        f"Hardware '{hardware.name}' has no datapath for weights of quantizer '{quantizer}'{asked}."
        " Take its schemes out of the space, choose other hardware, or register a unit with "
        f"`register_datapath`. {did_you_mean(quantizer, known)}"
    )
    raise CostError(msg)


def cheapest_mac(job: MacJob, hardware: Hardware) -> Mac:
    """Return the MAC of the legal datapath that takes least energy; the first named of equals.

    Args:
        job: The layer.
        hardware: Its file names the datapaths that are there.

    Raises:
        CostError: No datapath can compute the layer, with the layer, the reasons and the remedy.
    """
    found = datapaths_of(job.quantizer, hardware, layer=job.layer)
    reasons = [unit.why_not(job, hardware) for unit in found]
    legal = [u.mac(job, hardware) for u, r in zip(found, reasons, strict=True) if r is None]
    if not legal:
        told = "; ".join(f"{u.name}: {r}" for u, r in zip(found, reasons, strict=True))
        msg = (
            f"No datapath of hardware '{hardware.name}' can compute layer '{job.layer}' with "
            f"{job.weight_bits}-bit weights of quantizer '{job.quantizer}' and "
            f"{job.input_bits}-bit inputs: {told}"
        )
        raise CostError(msg)
    uses = max(job.uses_per_input or job.n_sharing, 1)

    def energy_pj(mac: Mac) -> float:
        """Of one MAC with its share of inputs and outputs."""
        rescale_pj = hardware.rescale_fj(mac.widths.accumulator) * hardware.pj_per_fj
        return mac.mac_pj + (mac.output_pj + rescale_pj) / job.fan_in + mac.input_pj / uses

    return min(legal, key=energy_pj)
