"""ONNX with QuantizeLinear and DequantizeLinear, for uniform codes of 2, 4 and 8 bits.

Weights are stored as integers of their own bits and dequantized; inputs are quantized and
dequantized in front of their layer. This is the form that compilers for integer hardware read, and
that onnxruntime runs. 4-bit integers need ONNX operator set 21, 2-bit ones 25.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from adq_search.convert import quantized_layers
from adq_search.errors import StorageError
from adq_search.export._forms import weight_table
from adq_search.export._graph import BASE_IR, BASE_OPSET, Piece, export_graph, guest
from adq_search.files import write_atomic
from adq_search.layers import QuantLayer
from adq_search.quantizers._calibration import EPS

_BITS = (2, 4, 8)
#: ONNX's first operator set and file format with 2-bit integers.
_OPSET_2BIT, _IR_2BIT = 25, 13


class QuantizeDequantize:
    """Writes LSQ weights and inputs as QuantizeLinear and DequantizeLinear."""

    domains: ClassVar[Mapping[str, int]] = {}
    writes_layers: ClassVar[bool] = False

    def check(self, name: str, layer: QuantLayer) -> None:
        """Refuse quantizers that are not uniform, and bits that ONNX has no integers of."""
        for what, quantizer in (
            ("weights", layer.weight_quantizer),
            ("inputs", layer.input_quantizer),
        ):
            if quantizer.name != "lsq":
                msg = (
                    f"ONNX's QuantizeLinear is uniform with a fixed scale, but the {what} of layer "
                    f"'{name}' are quantized by '{quantizer.name}'. Use `--format qonnx` or "
                    "`--format package`."
                )
                raise StorageError(msg)
            if quantizer.bits not in _BITS:
                msg = (
                    f"ONNX has integers of 2, 4 and 8 bits, but the {what} of layer '{name}' have "
                    f"{quantizer.bits}. Use `--format qonnx` or `--format package`."
                )
                raise StorageError(msg)

    def write_input(self, piece: Piece, layer: QuantLayer, rank: int, source: str) -> None:
        """Add QuantizeLinear and DequantizeLinear."""
        quantizer = layer.input_quantizer
        sign = "" if quantizer.is_signed else "U"
        scale = piece.constant("scale", positive(quantizer.get_parameter("step")))
        zero = piece.constant("zero", np.zeros((), np.int64), f"{sign}INT{quantizer.bits}")
        code = piece.node("QuantizeLinear", source, scale, zero)
        piece.node("DequantizeLinear", code, scale, zero)

    def write_weight(self, piece: Piece, layer: QuantLayer) -> None:
        """Add DequantizeLinear of integer codes."""
        quantizer = layer.weight_quantizer
        codes = quantizer.codes(layer.get_parameter("weight"))
        _, scales = weight_table(quantizer)
        code = piece.constant("codes", codes, f"INT{quantizer.bits}")
        if scales.numel() == 1:
            piece.node("DequantizeLinear", code, piece.constant("scale", scales.reshape(())))
        else:
            piece.node("DequantizeLinear", code, piece.constant("scale", scales), axis=0)


def write_onnx(file: Path, network: nn.Module, example: Tensor) -> Any:
    """Write a quantized network as ONNX with QuantizeLinear and DequantizeLinear.

    Args:
        file: Ends in `.onnx`; replaced whole.
        network: Quantized by LSQ at 2, 4 or 8 bits (layers in floating point are fine), in eval
            mode.
        example: Two or more inputs, # shape: (N, ...)

    Returns:
        The `onnx.ModelProto`; input `input` and output `output`, for any number of samples.

    Raises:
        StorageError: A layer has other bits or another quantizer, or torch cannot export it.
        MissingExtraError: A package of the extra `onnx` is missing.
    """
    quantizers = [
        q
        for layer in quantized_layers(network).values()
        for q in (layer.weight_quantizer, layer.input_quantizer)
    ]
    is_2bit = any(q.bits == 2 for q in quantizers)
    opset, ir_version = (_OPSET_2BIT, _IR_2BIT) if is_2bit else (BASE_OPSET, BASE_IR)
    model = export_graph(network, example, QuantizeDequantize(), opset=opset, ir_version=ir_version)
    onnx = guest("onnx")
    write_atomic(file, lambda path: onnx.save_model(model, str(path)))
    return model


def load_model(file: Path) -> Any:
    """Read an ONNX file as an `onnx.ModelProto`.

    Raises:
        StorageError: It is missing or damaged.
        MissingExtraError: onnx is missing.
    """
    onnx, problems = guest("onnx"), guest("google.protobuf.message")
    try:
        return onnx.load(str(file))
    except (OSError, problems.DecodeError) as error:
        msg = f"The ONNX file {file} cannot be read: {error}. Export it again."
        raise StorageError(msg) from error


def open_session(model: bytes | str, shown: str) -> Any:
    """Open an ONNX model in onnxruntime, as it stands: fused kernels round at other places.

    Args:
        model: Its bytes, or the path of its file.
        shown: Its name, for the error text.

    Raises:
        MissingExtraError: onnxruntime is missing.
        StorageError: The installed onnxruntime cannot run it.
    """
    runtime = guest("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        msg = (
            f"onnxruntime {runtime.__version__} cannot run {shown}: {str(error).splitlines()[0]} "
            "Install a newer one: 2-bit integers are tried with 1.31."
        )
        raise StorageError(msg) from error


def run_onnx(file: Path, inputs: Tensor) -> Tensor:
    """Return what onnxruntime computes of a file that `write_onnx` wrote.

    Raises:
        MissingExtraError: onnxruntime is missing.
        StorageError: The installed onnxruntime cannot run the file.
    """
    session = open_session(str(file), str(file))
    return torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def positive(step: Tensor) -> Tensor:
    """Return the step that a quantizer uses."""
    return step.detach().abs().clamp(min=EPS)
