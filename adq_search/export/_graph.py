"""The network as an ONNX graph, with a place held for every quantizer.

torch exports the float network, in which each quantized layer shows its input to a node `Mark` of
a domain of our own and keeps its weights as an initializer. What comes into these places is the
business of a dialect: Q/DQ (`onnx_file`) or QONNX (`qonnx_file`).
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_search.convert import quantized_layers
from adq_search.errors import MissingExtraError, StorageError
from adq_search.layers import QuantLayer, to_float_

_DOMAIN = "adq_search"
_MARK = "Mark"
#: ONNX's first operator set with 4-bit integers; its file format.
BASE_OPSET, BASE_IR = 21, 10


class Piece:
    """What replaces a mark or a weight: nodes in order, and their constants.

    Args:
        prefix: Stands before every name that the piece makes up.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._helper = guest("onnx.helper")

    def constant(self, name: str, values: Tensor | np.ndarray, kind: str | None = None) -> str:
        """Add a constant and return its name.

        Args:
            name: Unique within the piece.
            values: Any shape.
            kind: Name of an ONNX type, such as `INT4`; None for that of `values`.
        """
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        types = guest("onnx").TensorProto
        element = (
            self._helper.np_dtype_to_tensor_dtype(array.dtype)
            if kind is None
            else types.DataType.Value(kind)
        )
        full = f"{self.prefix}/{name}"
        flat = array.reshape(-1).tolist()
        self.constants.append(self._helper.make_tensor(full, element, array.shape, flat))
        return full

    def node(self, operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Add a node and return the name of its output.

        Args:
            operator: Such as `Mul`.
            *inputs: Names of its inputs.
            out: Name of its output; None makes one up.
            **attributes: Its attributes, `domain` among them.
        """
        name = f"{self.prefix}/{operator}_{len(self.nodes)}"
        made = self._helper.make_node(operator, inputs, [out or name], name=name, **attributes)
        self.nodes.append(made)
        return out or name


class Dialect(Protocol):
    """How quantizers are written in ONNX."""

    #: Operator sets that its nodes need besides ONNX's own, by domain.
    domains: ClassVar[Mapping[str, int]]
    #: Whether `write_input` writes the whole layer, and `write_weight` is not asked.
    writes_layers: ClassVar[bool]

    def check(self, name: str, layer: QuantLayer) -> None:
        """Refuse a layer that cannot be written so."""

    def write_input(self, piece: Piece, layer: QuantLayer, rank: int, source: str) -> None:
        """Add what computes the quantized input from `source`; the last node's output is it.

        Where the dialect writes layers: the layer's output.
        """

    def write_weight(self, piece: Piece, layer: QuantLayer) -> None:
        """Add what computes the quantized weights; the last node's output is they."""


def guest(module: str) -> Any:
    """Return a module of a package of the extra `onnx`.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        msg = (
            f"ONNX export needs the package '{module.partition('.')[0]}'. Install it: "
            "pip install 'adq-search[onnx]'."
        )
        raise MissingExtraError(msg) from error


def export_graph(
    network: nn.Module,
    example: Tensor,
    dialect: Dialect,
    *,
    opset: int = BASE_OPSET,
    ir_version: int = BASE_IR,
    is_batch_free: bool = True,
) -> Any:
    """Return the ONNX model of a quantized network, checked.

    Args:
        network: Quantized and fitted, in eval mode; stays as it is.
        example: Inputs, # shape: (N, ...), two samples at least where the batch is free.
        dialect: Writes the quantizers.
        opset: ONNX operator set of the graph.
        ir_version: Of the ONNX file format.
        is_batch_free: Whether the model takes any number of samples, or N.

    Returns:
        An `onnx.ModelProto`, with one input `input` and one output `output`.

    Raises:
        StorageError: torch cannot export the network, or a layer cannot be written.
        MissingExtraError: A package of the extra `onnx` is missing.
    """
    guest("onnxscript")
    layers = quantized_layers(network)
    for name, layer in layers.items():
        dialect.check(name, layer)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if is_batch_free else None
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _marked(network, whole=dialect.writes_layers),
                (example,),
                dynamo=True,
                opset_version=opset,
                optimize=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        msg = f"torch cannot export this network to ONNX: {first} Use `--format package`."
        raise StorageError(msg) from error
    assert program is not None, "the exporter of torch.export returns its program"
    model = program.model_proto
    model.ir_version = max(model.ir_version, ir_version)
    _write_quantizers(model, layers, dialect)
    guest("onnx").checker.check_model(model)
    return model


def _write_quantizers(model: Any, layers: Mapping[str, QuantLayer], dialect: Dialect) -> None:
    """Put the dialect's pieces into their places, in a model."""
    graph = model.graph
    nodes, constants = [], [c for c in graph.initializer if not _is_weight(c.name, layers)]
    renamed: dict[str, str] = {}
    outputs = [output.name for output in graph.output]
    for name, layer in layers.items():
        if dialect.writes_layers:
            break
        piece = Piece(f"{name}/weight")
        dialect.write_weight(piece, layer)
        nodes += piece.nodes
        constants += piece.constants
        renamed[f"{name}.weight"] = piece.nodes[-1].output[0]
    for node in graph.node:
        for i, source in enumerate(node.input):
            node.input[i] = renamed.get(source, source)
        if node.domain != _DOMAIN:
            nodes.append(node)
            continue
        about = {a.name: a for a in node.attribute}
        name, call = about["layer"].s.decode(), len(renamed)
        piece = Piece(f"{name}/input_{call}")
        dialect.write_input(piece, layers[name], about["rank"].i, node.input[0])
        nodes += piece.nodes
        constants += piece.constants
        if node.output[0] in outputs:  # the network ends with this layer
            piece.nodes[-1].output[0] = node.output[0]
        renamed[node.output[0]] = piece.nodes[-1].output[0]
    nodes = _needed(nodes, outputs)
    used = {source for node in nodes for source in node.input}
    constants = [constant for constant in constants if constant.name in used]
    for field, content in (("node", nodes), ("initializer", constants)):
        graph.ClearField(field)
        getattr(graph, field).extend(content)
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")  # torch's stack traces, with paths of this machine
    known = {v.name for v in (*graph.input, *graph.output)}
    kept = [v for v in graph.value_info if v.name not in renamed and v.name not in known]
    graph.ClearField("value_info")
    graph.value_info.extend(kept)
    opsets = [entry for entry in model.opset_import if entry.domain != _DOMAIN]
    helper = guest("onnx.helper")
    opsets += [helper.make_opsetid(domain, v) for domain, v in dialect.domains.items()]
    model.ClearField("opset_import")
    model.opset_import.extend(opsets)


def _needed(nodes: list[Any], outputs: list[str]) -> list[Any]:
    """Return the nodes that the outputs depend on, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def _is_weight(name: str, layers: Mapping[str, QuantLayer]) -> bool:
    owner, _, last = name.rpartition(".")
    return last == "weight" and owner in layers


class _Marked(nn.Module):
    """A layer that shows its input to a node `Mark`, or is one itself."""

    layer_name: str
    is_whole: bool

    def _mark(self, values: Tensor, shape: torch.Size) -> Tensor:
        about: dict[str, Any] = {"layer": self.layer_name, "rank": values.ndim}
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_MARK}",
            (values,),
            about,
            dtype=values.dtype,
            shape=shape,
            version=1,
        )

    def _computed(self, values: Tensor) -> Tensor:
        raise AssertionError  # each kind of layer has its own

    def forward(self, input: Tensor) -> Tensor:
        if self.is_whole:
            return self._mark(input, self._computed(input).shape)
        return self._computed(self._mark(input, input.shape))


class _MarkedConv1d(_Marked, nn.Conv1d):
    def _computed(self, values: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(values, self.weight, self.bias)
        return out


class _MarkedConv2d(_Marked, nn.Conv2d):
    def _computed(self, values: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(values, self.weight, self.bias)
        return out


class _MarkedLinear(_Marked, nn.Linear):
    def _computed(self, values: Tensor) -> Tensor:
        return F.linear(values, self.weight, self.bias)


_MARKED: Mapping[type[nn.Module], type[_Marked]] = {
    nn.Conv1d: _MarkedConv1d,
    nn.Conv2d: _MarkedConv2d,
    nn.Linear: _MarkedLinear,
}


def _marked(network: nn.Module, *, whole: bool) -> nn.Module:
    """Return a copy of a quantized network with marks in place of its quantizers."""
    copied = copy.deepcopy(network).eval()
    for name, layer in quantized_layers(copied).items():
        to_float_(layer)
        layer.__class__ = _MARKED[type(layer)]  # type: ignore[assignment]
        layer.layer_name = name  # type: ignore[assignment]
        layer.is_whole = whole  # type: ignore[assignment]
    return copied
