"""The hardware package: packed codes, tables and scales, with a description in words.

Files in a folder. `tensors.safetensors` holds numbers: weight codes packed without gaps, level
tables, scales, input quantizers, and every other tensor of the network as it is (`network.*`:
biases, batch norms, layers left in floating point). `package.json` says of each layer what it is,
which tensors are its own, and how a code becomes a weight and an input becomes a code, so that it
can be read without this package. `vectors.safetensors`, where it is there, holds samples to test a
reader with. How layers are connected is not in the package: that is in the ONNX export and in the
network's own code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adq_search.convert import apply_policy_, check_policy_fits, quantized_layers
from adq_search.errors import PolicyError, StorageError
from adq_search.export._forms import input_form, restore_table_, weight_form, weight_table
from adq_search.export._packing import pack, packed_bytes, unpack
from adq_search.export.agreement import Outcome
from adq_search.export.vectors import VECTORS, vectors_outcome, write_vectors
from adq_search.files import read_json, write_atomic, write_json
from adq_search.layers import QuantLayer
from adq_search.policy import Policy
from adq_search.tracing import ModelSummary

SCHEMA = "adq_search.package/1"
DESCRIPTION = "package.json"
TENSORS = "tensors.safetensors"
_READING = [
    "Weight codes are unsigned integers of `bits` bits, packed without gaps: code i takes the bits "
    "i*bits to i*bits + bits - 1 of the stream, least significant first; bit j of the stream is "
    "bit j mod 8 of byte j // 8.",
    "Codes stand in row-major order of `shape`: (out, in / groups, *kernel). A channel is an index "
    "of the first dimension; a scale of one element holds for all channels.",
    "A layer computes sum(weight * input) + bias with the weights and inputs that the rules give. "
    "An input is padded (`padding_mode`) after it was quantized.",
    "Tensors are little-endian, in the safetensors format; `network.*` are the other parameters "
    "and buffers under their PyTorch names.",
    "Where `vectors` is given, its file holds test vectors of the network that was exported: "
    "`inputs`, `outputs`, and `<layer>.codes.<k>`, the codes of the layer's input in its k-th call "
    "(int16). A value that lies on the boundary of two codes may fall on either side.",
]
#: What each entry of the description means, for a reader who has nothing else.
_FIELDS = {
    "network_fingerprint": "hash of the network's layers and shapes",
    "task": "name and options of the data and network that it was trained on",
    "policy": "precision of every layer, as adq-search writes policy files",
    "total.weight_bits": "sum of `weight.stored_bits`, as the cost model charges them",
    "total.packed_bytes": "sum of `weight.packed_bytes`",
    "layers": "in order of execution; `is_float` layers are left in floating point",
    "layers.input_shape": "without the sample dimension; of the layer's first call",
    "layers.geometry": "stride, padding, dilation and groups, as in PyTorch",
    "layers.bias": "tensor added to the sums, one element a channel; null where there is none",
    "weight.bits": "bits of a stored code",
    "weight.n_levels": "codes run from 0 to n_levels - 1",
    "weight.stored_bits": "number of weights times `bits`",
    "weight.packed_bytes": "stored_bits / 8, rounded up to whole bytes once a layer",
    "weight.rule": "how a code becomes a weight",
    "weight.codes, weight.table, weight.scale": "names of the tensors that the rule means",
    "weight.signs, weight.exponents, weight.root": "the table as sign * 2^(-exponent / root)",
    "weight.sqrt_half": "what stands for the square root of 1/2, as a fraction",
    "input.bits": "bits of an input code",
    "input.lowest, input.highest": "range of an input code, both ends included",
    "input.rule": "how an input becomes a code, and the code a value",
    "input.tensors": "tensors that the rule names",
}
#: State of an input quantizer that the description gives as `bits`, `lowest` and `highest`.
_DESCRIBED = ("calibrated_bits", "qmin", "qmax")


def write_package(
    folder: Path,
    network: nn.Module,
    policy: Policy,
    summary: ModelSummary,
    *,
    samples: Tensor | None = None,
    task: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a trained quantized network as a hardware package.

    Args:
        folder: Made where it is missing; may not hold a package.
        network: Under `policy`, as `load_quantized` returns it.
        policy: Precision of every parametric layer.
        summary: The traced network.
        samples: Inputs of test vectors, # shape: (N, ...); None writes no vectors.
        task: Name and options of the task; goes into the description, as does
        provenance: How this was made.

    Returns:
        The description, as written.

    Raises:
        StorageError: The folder holds a package, or a quantizer has no form.
        PolicyError: The policy is not this network's.
    """
    if (folder / DESCRIPTION).exists():
        msg = f"{folder} holds a package already. Choose another --out; nothing is replaced."
        raise StorageError(msg)
    check_policy_fits(policy, summary.all_names)
    layers = quantized_layers(network)
    if set(layers) != {name for name, p in policy if not p.is_float}:
        msg = "The network is not under this policy: other layers are quantized. Give its own."
        raise PolicyError(msg)
    unseen = [name for name in layers if name not in summary.names]
    if unseen:
        msg = f"Layer '{unseen[0]}' never runs, so it cannot be exported quantized. Leave it float."
        raise PolicyError(msg)
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for info in summary.layers:
        if info.name not in layers:
            rows.append({"name": info.name, "kind": info.kind, "is_float": True})
            continue
        row, own = _describe(info.name, layers[info.name])
        tensors |= own
        shapes = {"input_shape": list(info.input_shape), "output_shape": list(info.output_shape)}
        rows.append({"name": info.name, "kind": info.kind, "is_float": False, **shapes, **row})
    tensors |= {
        f"network.{key}": value
        for key, value in network.state_dict().items()
        if not _is_packed(key, layers)
    }
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    file = folder / TENSORS
    write_atomic(file, lambda path: save_file(tensors, path))
    description = {
        "schema": SCHEMA,
        "reading": _READING,
        "fields": _FIELDS,
        "tensors_sha256": _digest(file),
        "network_fingerprint": summary.fingerprint,
        "task": None if task is None else dict(task),
        "policy": policy.to_json(),
        "total": {
            "weight_bits": sum(r["weight"]["stored_bits"] for r in rows if not r["is_float"]),
            "packed_bytes": sum(r["weight"]["packed_bytes"] for r in rows if not r["is_float"]),
            "file_bytes": file.stat().st_size,
        },
        "layers": rows,
        "vectors": None if samples is None else _write_vectors(folder, network, samples),
        "provenance": dict(provenance or {}),
    }
    write_json(folder / DESCRIPTION, description)
    return description


def load_package_(network: nn.Module, folder: Path) -> nn.Module:
    """Put a package on the float network it was written from, in place.

    Args:
        network: As its task makes it; its weights are replaced.
        folder: Where `write_package` wrote.

    Returns:
        The same `network`, quantized, in eval mode; it computes what the written one computes, bit
        for bit.

    Raises:
        StorageError: A file is missing, damaged, or of another version, or a tensor is missing.
        PolicyError: The network is another one.
    """
    description = read_description(folder)
    try:
        return _load_(network, description, folder / TENSORS)
    except (KeyError, TypeError) as error:
        msg = f"{folder / DESCRIPTION} was edited: {error} is missing or wrong. Export it again."
        raise StorageError(msg) from error


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description of a package.

    Raises:
        StorageError: There is none, or it is of another version.
    """
    description = read_json(folder / DESCRIPTION, StorageError, what="package")
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        msg = f"{folder / DESCRIPTION} is no package of schema '{SCHEMA}'. Export it again."
        raise StorageError(msg)
    return description


def read_vectors(folder: Path) -> tuple[Tensor, Outcome] | None:
    """Return the inputs of a package's test vectors and what the network made of them.

    Returns:
        None where the package was written without vectors.

    Raises:
        StorageError: A file is missing, damaged, or of another export.
    """
    about = read_description(folder).get("vectors")
    if about is None:
        return None
    tensors = _read_tensors(folder / VECTORS, about.get("sha256"))
    return tensors["inputs"], vectors_outcome(tensors)


def _write_vectors(folder: Path, network: nn.Module, samples: Tensor) -> dict[str, Any]:
    write_vectors(folder / VECTORS, network, samples)
    return {"file": VECTORS, "sha256": _digest(folder / VECTORS), "samples": len(samples)}


def _load_(network: nn.Module, description: Mapping[str, Any], file: Path) -> nn.Module:
    policy = Policy.from_json(description["policy"])
    tensors = _read_tensors(file, description["tensors_sha256"])
    apply_policy_(network, policy)
    layers = quantized_layers(network)
    rest = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    wrong = network.load_state_dict(rest, strict=False)
    missing = [key for key in wrong.missing_keys if not _is_packed(key, layers)]
    if missing or wrong.unexpected_keys:
        strange = ", ".join([*missing, *wrong.unexpected_keys][:3])
        msg = f"The package is of another network: {strange} differ. Give the network's own task."
        raise PolicyError(msg)
    for row in description["layers"]:
        if not row["is_float"]:
            _restore_(layers[row["name"]], row, tensors)
    return network.eval()


def decoded_weight(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a layer's weights from its entry in `layers`, # shape: (out, in / groups, *kernel)."""
    weight = row["weight"]
    shape = weight["shape"]
    codes = unpack(tensors[weight["codes"]], weight["bits"], int(torch.Size(shape).numel()))
    scale = tensors[weight["scale"]].view(-1, *(1 for _ in shape[1:]))
    return tensors[weight["table"]][codes].view(shape) * scale


def _describe(name: str, layer: QuantLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a layer's entry in the description, and its tensors."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    place, weight = f"layers.{name}", layer.get_parameter("weight")
    bits = weights.storage_bits(weights.bits, **weights.options)
    codes = weights.codes(weight) - weights.lowest_code
    table, scale = weight_table(weights)
    form, rule = weight_form(weights.name), input_form(inputs.name)
    own = {
        f"{place}.weight.codes": pack(codes, bits),
        f"{place}.weight.table": table,
        f"{place}.weight.scale": scale,
    }
    state = {k: v for k, v in inputs.state_dict().items() if k not in _DESCRIBED}
    state |= rule.derived(inputs) if rule.derived else {}
    own |= {f"{place}.input.{key}": value for key, value in state.items()}
    geometry = ("stride", "padding", "dilation", "groups", "padding_mode")
    row = {
        "geometry": {key: getattr(layer, key) for key in geometry if hasattr(layer, key)},
        "bias": f"network.{name}.bias" if getattr(layer, "bias", None) is not None else None,
        "weight": {
            "quantizer": weights.name,
            "options": dict(weights.options),
            "bits": bits,
            "shape": list(weight.shape),
            "n_levels": weights.n_levels(weights.bits, **weights.options),
            "stored_bits": weight.numel() * bits,
            "packed_bytes": packed_bytes(weight.numel(), bits),
            "rule": form.rule,
            **{part: f"{place}.weight.{part}" for part in ("codes", "table", "scale")},
            **(form.fields(weights) if form.fields else {}),
        },
        "input": {
            "quantizer": inputs.name,
            "bits": inputs.bits,
            "lowest": int(inputs.qmin),
            "highest": int(inputs.qmax),
            "rule": rule.rule,
            "tensors": {key: f"{place}.input.{key}" for key in state},
        },
    }
    return row, own


@torch.no_grad()
def _restore_(layer: QuantLayer, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    weights, inputs = row["weight"], row["input"]
    layer.get_parameter("weight").copy_(decoded_weight(row, tensors))
    restore_table_(layer.weight_quantizer, tensors[weights["table"]], tensors[weights["scale"]])
    quantizer = layer.input_quantizer
    state = {
        "calibrated_bits": torch.tensor(inputs["bits"]),
        "qmin": torch.tensor(float(inputs["lowest"])),
        "qmax": torch.tensor(float(inputs["highest"])),
    }
    given = {key: tensors[name] for key, name in inputs["tensors"].items()}
    quantizer.load_state_dict({key: {**given, **state}[key] for key in quantizer.state_dict()})


def _is_packed(key: str, layers: Mapping[str, QuantLayer]) -> bool:
    """Whether a state dict's entry is in the package as codes, table, scale or input quantizer."""
    owner, _, last = key.rpartition(".")
    if last == "weight" and owner in layers:
        return True
    parts = ("weight_quantizer", "input_quantizer")
    return any(f".{part}." in f".{key}" for part in parts)


def _read_tensors(file: Path, expected: str | None) -> dict[str, Tensor]:
    try:
        if _digest(file) != expected:
            msg = f"{file} is not the file that its description was written for. Export it again."
            raise StorageError(msg)
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        msg = f"The package's tensors cannot be read from {file}: {error}. Export it again."
        raise StorageError(msg) from error
    return tensors


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
