"""Exported forms, run by somebody else's code: onnxruntime, or the package qonnx.

Their codes are read inside the graph. A node that makes the input codes of call k of a layer is
called `<layer>/input_<k>/<operator>_<i>` by the writers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adq_search.errors import StorageError
from adq_search.export._graph import BASE_IR, guest
from adq_search.export.agreement import Form, Outcome
from adq_search.export.onnx_file import load_model, open_session
from adq_search.export.qonnx_file import QONNX_DOMAIN

_INTEGER_SUMS = ("ConvInteger", "MatMulInteger")
#: Nodes whose output is a code times the scale that is their second input.
_SCALED = ("DequantizeLinear", "Quant")
_COUNTED = "MultiThreshold"
#: Value of a tensor of the graph by its name.
Values = Callable[[str], "NDArray[Any]"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a graph has the input codes of one call of a layer, or one bank's sums of them.

    Args:
        layer: The layer.
        call: Which of its calls, as the writer numbered it.
        codes: Tensor of the codes, or of their multiples.
        unit: Tensor of what code 1 is worth there; None for 1.
        zero: Tensor of what code 0 is there; None for 0.
        sums: Tensor of the integer sums; None where floats are multiplied.
    """

    layer: str
    call: str
    codes: str
    unit: str | None = None
    zero: str | None = None
    sums: str | None = None


def graph_form(file: Path) -> str:
    """Return `onnx`, `qonnx` or `integer`: as which format an ONNX file was exported.

    Raises:
        StorageError: It cannot be read.
    """
    nodes = load_model(file).graph.node
    if any(node.domain == QONNX_DOMAIN for node in nodes):
        return "qonnx"
    return "integer" if any(node.op_type in _INTEGER_SUMS for node in nodes) else "onnx"


def onnxruntime_form(file: Path) -> Form:
    """Return what runs a Q/DQ or integer graph by onnxruntime, as it stands.

    Raises:
        StorageError: The file is missing or holds no codes, or onnxruntime cannot run it.
        MissingExtraError: A package of the extra `onnx` is missing.
    """
    onnx, model = guest("onnx"), load_model(file)
    places = _places(model, file)
    types = onnx.TensorProto
    wanted: dict[str, int] = {}
    for place in places:
        wanted[place.codes] = types.UINT8 if place.sums else types.FLOAT
        if place.sums:
            wanted[place.sums] = types.INT32
    needed = {name for place in places for name in (place.unit, place.zero)}
    held = {
        constant.name: onnx.numpy_helper.to_array(constant)
        for constant in model.graph.initializer
        if constant.name in needed
    }
    for name, element in wanted.items():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    session = open_session(model.SerializeToString(), str(file))

    def run(inputs: Tensor) -> Outcome:
        try:
            output, *found = session.run(["output", *wanted], {"input": inputs.numpy()})
        except Exception as error:  # onnxruntime's errors have no common base
            raise _does_not_take(file, inputs, error) from error
        values = held | dict(zip(wanted, found, strict=True))
        return _outcome(places, values.__getitem__, output)

    return run


def qonnx_form(file: Path) -> Form:
    """Return what runs a QONNX graph node by node, by qonnx's own executor.

    The file is for a fixed number of samples, so a batch runs in parts of that many.

    Raises:
        StorageError: The file is missing or holds no codes.
        MissingExtraError: A package of the extra `onnx` is missing.
    """
    executor, wrapper = guest("qonnx.core.onnx_exec"), guest("qonnx.core.modelwrapper")
    shapes = guest("qonnx.transformation.infer_shapes")
    model = wrapper.ModelWrapper(load_model(file)).transform(shapes.InferShapes())
    places = _places(model.model, file)

    def run_part(inputs: Tensor) -> Outcome:
        try:
            with _readable_nodes(executor):
                values = executor.execute_onnx(model, {"input": inputs.numpy()}, True)
        except Exception as error:  # qonnx raises plain exceptions
            raise _does_not_take(file, inputs, error) from error
        return _outcome(places, values.__getitem__, values["output"])

    def run(inputs: Tensor) -> Outcome:
        n_at_a_time = model.get_tensor_shape("input")[0]
        return _joined([run_part(part) for part in inputs.split(n_at_a_time)])

    return run


@contextmanager
def _readable_nodes(executor: Any) -> Iterator[None]:
    """Let qonnx make its models of single nodes in a file format that onnxruntime reads.

    qonnx takes the newest format of the installed onnx, which onnxruntime may not know yet. It
    also warns of every `Expand`, whose shape it does not infer.
    """
    make = executor.qonnx_make_model

    def make_readable(graph: Any) -> Any:
        model = make(graph)
        model.ir_version = min(model.ir_version, BASE_IR)
        return model

    executor.qonnx_make_model = make_readable
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Output shapes disagree")
            yield
    finally:
        executor.qonnx_make_model = make


def _places(model: Any, file: Path) -> list[_Place]:
    """Return the codes in a graph, in order."""
    found = []
    for node in model.graph.node:
        layer, _, place = node.name.rpartition("/input_")
        call, output = place.partition("/")[0], node.output[0]
        if not layer:
            continue
        if node.op_type in _SCALED:
            found.append(_Place(layer, call, output, unit=node.input[1]))
        elif node.op_type == _COUNTED:
            found.append(_Place(layer, call, output))
        elif node.op_type in _INTEGER_SUMS:
            found.append(_Place(layer, call, node.input[0], zero=node.input[2], sums=output))
    if not found:
        msg = (
            f"{file} holds no codes of quantized layers: it is no graph that `adq-search export` "
            "wrote. Export it again."
        )
        raise StorageError(msg)
    return found


def _outcome(places: list[_Place], value: Values, output: NDArray[Any]) -> Outcome:
    codes: dict[str, dict[str, Tensor]] = {}
    sums: dict[str, dict[str, list[Tensor]]] = {}
    for place in places:
        found = value(place.codes).astype(np.float64)
        if place.unit is not None:
            found = found / value(place.unit)
        if place.zero is not None:
            found = found - value(place.zero)
        of_layer = codes.setdefault(place.layer, {})
        of_layer[place.call] = torch.from_numpy(np.rint(found).astype(np.int64))
        if place.sums is not None:
            banks = sums.setdefault(place.layer, {}).setdefault(place.call, [])
            banks.append(torch.from_numpy(value(place.sums)).long())
    return Outcome(
        codes={layer: list(calls.values()) for layer, calls in codes.items()},
        outputs=torch.from_numpy(output),
        sums={layer: list(calls.values()) for layer, calls in sums.items()},
    )


def _joined(parts: list[Outcome]) -> Outcome:
    def by_layer(read: Callable[[Outcome], Mapping[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
        return {
            layer: [
                torch.cat(calls) for calls in zip(*(read(p)[layer] for p in parts), strict=True)
            ]
            for layer in read(parts[0])
        }

    return Outcome(by_layer(lambda part: part.codes), torch.cat([part.outputs for part in parts]))


def _does_not_take(file: Path, inputs: Tensor, error: Exception) -> StorageError:
    shape, first = tuple(inputs.shape), (str(error).splitlines() or ["no reason given"])[0]
    return StorageError(
        f"{file} does not take inputs of shape {shape}: {first} Verify it with the task it was "
        "exported from, or export it again."
    )
