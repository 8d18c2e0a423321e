"""Whether an exported ONNX graph computes the quantized network: layer by layer, code by code."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq_search.convert import quantized_layers
from adq_search.errors import StorageError
from adq_search.export._graph import guest
from adq_search.export.integer_file import ZERO_OF_SIGNED
from adq_search.export.onnx_file import load_model, open_session
from adq_search.layers import QuantLayer

_DEQUANTIZE = "DequantizeLinear"
_INTEGER_SUMS = ("ConvInteger", "MatMulInteger")


@dataclass(frozen=True, slots=True)
class CodeAgreement:
    """How the input codes of one layer agree.

    Args:
        n_codes: Codes compared.
        n_different: How many differ.
        largest: Largest difference of a code.
    """

    n_codes: int
    n_different: int
    largest: int


@dataclass(frozen=True, slots=True)
class GraphAgreement:
    """How a graph agrees with the network it was written from.

    Args:
        layers: By layer name, in the network's order.
        n_samples: Samples compared.
        n_same_class: Samples with the same predicted class.
        largest_error: Largest difference of an output.
    """

    layers: dict[str, CodeAgreement]
    n_samples: int
    n_same_class: int
    largest_error: float


@torch.no_grad()
def compare_onnx(file: Path, network: nn.Module, inputs: Tensor) -> GraphAgreement:
    """Run an ONNX file and compare every input code of every layer, and every class.

    Float sums are added in another order than torch's, so a value on the boundary between two
    codes may fall on either side, and later layers see it.

    Args:
        file: What `write_onnx` or `write_integer_onnx` wrote.
        network: The quantized network, in eval mode.
        inputs: # shape: (N, ...)

    Raises:
        StorageError: The file is missing or is not of this network, or onnxruntime cannot run it.
        MissingExtraError: A package of the extra `onnx` is missing.
    """
    onnx, model = guest("onnx"), load_model(file)
    layers = quantized_layers(network)
    places = _inputs_in(model, layers)
    for outputs in places.values():
        for name, element in outputs.items():
            info = onnx.helper.make_tensor_value_info(name, element, None)
            model.graph.output.append(info)
    expected: dict[str, list[Tensor]] = defaultdict(list)

    def look(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, QuantLayer)
        expected[name].append(layer.input_quantizer.codes(args[0]))

    handles = [q.register_forward_pre_hook(partial(look, n)) for n, q in layers.items()]
    try:
        reference = network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for outputs in places.values() for name in outputs]
    session = open_session(model.SerializeToString(), str(file))
    found, *values = session.run(["output", *names], {"input": inputs.numpy()})
    by_name = {name: torch.from_numpy(v) for name, v in zip(names, values, strict=True)}
    logits = torch.from_numpy(found)
    return GraphAgreement(
        layers={
            name: _agreement(expected[name], [by_name[o] for o in outputs], layers[name])
            for name, outputs in places.items()
        },
        n_samples=len(inputs),
        n_same_class=int((logits.argmax(-1) == reference.argmax(-1)).sum()),
        largest_error=float((logits - reference).abs().max()),
    )


def _inputs_in(model: Any, layers: dict[str, QuantLayer]) -> dict[str, dict[str, int]]:
    """Return the quantized inputs in the graph by layer, one a call, in order, with their type."""
    types = guest("onnx").TensorProto
    places: dict[str, dict[str, int]] = {name: {} for name in layers}
    for node in model.graph.node:
        owner, _, place = node.name.partition("/input_")
        if owner not in places or not place:
            continue
        if node.op_type == _DEQUANTIZE:
            places[owner][node.output[0]] = types.FLOAT
        elif node.op_type in _INTEGER_SUMS:
            places[owner][node.input[0]] = types.UINT8  # each bank reads it
    missing = [name for name, outputs in places.items() if not outputs]
    if missing:
        msg = (
            f"The ONNX file has no codes of layer '{missing[0]}': it is of another network, or "
            "QONNX, which onnxruntime does not run. Export it with `--format onnx` or `integer`."
        )
        raise StorageError(msg)
    return places


def _agreement(expected: list[Tensor], values: list[Tensor], layer: QuantLayer) -> CodeAgreement:
    quantizer = layer.input_quantizer
    levels = quantizer.levels()
    step, zero = float(levels[1] - levels[0]), ZERO_OF_SIGNED if quantizer.is_signed else 0
    found = [
        (value / step).round().long() if value.is_floating_point() else value.long() - zero
        for value in values
    ]
    differences = torch.cat(
        [(own - codes).flatten() for codes, own in zip(expected, found, strict=True)]
    ).abs()
    return CodeAgreement(
        n_codes=differences.numel(),
        n_different=int((differences > 0).sum()),
        largest=int(differences.max()),
    )
