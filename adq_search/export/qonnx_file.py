"""QONNX: quantizers of any bits, as FINN and hls4ml read them.

Uniform weights and inputs are `Quant` nodes (scale, zero point, bits); ASQ computes its scale from
each sample in front of them. N2UQ is a `MultiThreshold` node. Weights on other levels have no node
of QONNX: their codes look up a table (`Gather`) and are scaled, in plain ONNX.

References:
    Pappalardo et al.: QONNX, arXiv 2206.07527; the package qonnx executes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from adq_search.errors import StorageError, did_you_mean
from adq_search.export._forms import weight_form, weight_table
from adq_search.export._graph import BASE_OPSET, Piece, export_graph, guest
from adq_search.export.onnx_file import positive
from adq_search.files import write_atomic
from adq_search.layers import QuantLayer
from adq_search.quantizers import AsqInput, N2uqInput
from adq_search.quantizers._thresholds import MIN_WIDTH
from adq_search.quantizers.asq import SMALLEST_FACTOR

QONNX_DOMAIN = "qonnx.custom_op.general"
InputWriter = Callable[[Piece, QuantLayer, int, str], None]


class Qonnx:
    """Writes every shipped quantizer."""

    domains: ClassVar[Mapping[str, int]] = {QONNX_DOMAIN: 1}
    writes_layers: ClassVar[bool] = False

    def check(self, name: str, layer: QuantLayer) -> None:
        """Refuse quantizers that nobody taught this dialect."""
        weight_form(layer.weight_quantizer.name)
        if layer.input_quantizer.name not in _INPUTS:
            known = did_you_mean(layer.input_quantizer.name, _INPUTS)
            msg = (
                f"QONNX export knows no input quantizer '{layer.input_quantizer.name}', which "
                f"layer '{name}' has. Use `--format package`. {known}"
            )
            raise StorageError(msg)

    def write_input(self, piece: Piece, layer: QuantLayer, rank: int, source: str) -> None:
        """Add what the layer's input quantizer computes."""
        _INPUTS[layer.input_quantizer.name](piece, layer, rank, source)

    def write_weight(self, piece: Piece, layer: QuantLayer) -> None:
        """Add a `Quant` of the quantized weights, or codes that look up a table."""
        quantizer = layer.weight_quantizer
        weight = layer.get_parameter("weight")
        table, scale = weight_table(quantizer)
        scales = piece.constant("scale", scale.reshape(-1, *(1 for _ in weight.shape[1:])))
        if quantizer.name == "lsq":
            values = piece.constant("values", quantizer(weight))
            _quant(piece, values, scales, quantizer.bits, is_signed=True)
            return
        codes = piece.constant("codes", quantizer.codes(weight), "UINT16")
        index = piece.node("Cast", codes, to=guest("onnx").TensorProto.INT32)
        found = piece.node("Gather", piece.constant("table", table), index)
        piece.node("Mul", found, scales)


def write_qonnx(file: Path, network: nn.Module, example: Tensor) -> Any:
    """Write a quantized network as QONNX.

    Args:
        file: Ends in `.onnx`; replaced whole.
        network: Quantized, in eval mode.
        example: Inputs of the shape that the model is for, batch included, as dataflow compilers
            want it, # shape: (N, ...)

    Returns:
        The `onnx.ModelProto`; input `input` and output `output`.

    Raises:
        StorageError: torch cannot export the network, or a quantizer has no form.
        MissingExtraError: A package of the extra `onnx` is missing.
    """
    model = export_graph(network, example, Qonnx(), opset=BASE_OPSET, is_batch_free=False)
    onnx = guest("onnx")
    write_atomic(file, lambda path: onnx.save_model(model, str(path)))
    return model


def _quant(piece: Piece, source: str, scale: str, bits: int, *, is_signed: bool) -> None:
    zero = piece.constant("zero", np.zeros((), np.float32))
    width = piece.constant("bits", np.array(bits, np.float32))
    piece.node(
        "Quant",
        source,
        scale,
        zero,
        width,
        domain=QONNX_DOMAIN,
        signed=int(is_signed),
        narrow=0,
        rounding_mode="ROUND",
    )


def _write_lsq(piece: Piece, layer: QuantLayer, rank: int, source: str) -> None:
    del rank
    quantizer = layer.input_quantizer
    scale = piece.constant("scale", positive(quantizer.get_parameter("step")))
    _quant(piece, source, scale, quantizer.bits, is_signed=quantizer.is_signed)


def _write_asq(piece: Piece, layer: QuantLayer, rank: int, source: str) -> None:
    quantizer = layer.input_quantizer
    scale = asq_scale(piece, layer, rank, source)
    _quant(piece, source, scale, quantizer.bits, is_signed=quantizer.is_signed)


def asq_scale(piece: Piece, layer: QuantLayer, rank: int, source: str) -> str:
    """Add channel means and the adapter's one or two linear maps; return each sample's scale."""
    quantizer = cast("AsqInput", layer.input_quantizer)
    channel = rank + quantizer.channel_dim
    pooled = [dim for dim in range(1, rank) if dim != channel]
    values = source
    if pooled:
        axes = piece.constant("axes", np.array(pooled, np.int64))
        values = piece.node("ReduceMean", source, axes, keepdims=0)
    for name in ("hidden", "output"):
        linear = getattr(quantizer.adapter, name)
        if linear is None:
            continue
        weight = piece.constant(f"{name}_weight", linear.weight)
        bias = piece.constant(f"{name}_bias", linear.bias)
        values = piece.node("Relu", piece.node("Gemm", values, weight, bias, transB=1))
    smallest = piece.constant("smallest", np.array(SMALLEST_FACTOR, np.float32))
    factor = piece.node("Max", values, smallest)
    shape = piece.constant("shape", np.array([-1, *(1 for _ in range(rank - 1))], np.int64))
    step = piece.constant("step", positive(quantizer.step))
    return piece.node("Mul", piece.node("Reshape", factor, shape), step)


def _write_n2uq(piece: Piece, layer: QuantLayer, rank: int, source: str) -> None:
    """Thresholds; `MultiThreshold` counts those at or below a value, N2UQ those below it."""
    quantizer = cast("N2uqInput", layer.input_quantizer)
    widths = quantizer.widths.detach().clamp(min=MIN_WIDTH)
    knots = quantizer.start.detach() + torch.cat([widths.new_zeros(1), widths.cumsum(0)])
    thresholds = (knots[:-1] + widths / 2).numpy()
    above = np.nextafter(thresholds, np.float32(np.inf)).reshape(1, -1)
    scaled = piece.node("Mul", source, piece.constant("in_scale", positive(quantizer.in_scale)))
    kind = f"{'INT' if quantizer.is_signed else 'UINT'}{quantizer.bits}"
    layout = {3: "NCW", 4: "NCHW"}.get(rank, "NC") if quantizer.channel_dim < -1 else "NC"
    count = piece.node(
        "MultiThreshold",
        scaled,
        piece.constant("thresholds", above),
        domain=QONNX_DOMAIN,
        out_dtype=kind,
        out_bias=float(quantizer.lowest_code),
        data_layout=layout,
    )
    unit = positive(quantizer.out_scale) * (2 / widths.numel())
    piece.node("Mul", count, piece.constant("out_scale", unit))


_INPUTS: Mapping[str, InputWriter] = {"lsq": _write_lsq, "asq": _write_asq, "n2uq": _write_n2uq}
