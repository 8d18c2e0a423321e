"""ONNX in integers: every layer sums integer codes, whatever its scheme, and rescales the sums.

Inputs become codes of 8 bits or fewer; weights are 8-bit words, in one bank, or in r banks with
disjoint weights for powers of the r-th root of two (POST: two). Words that 8 bits do not hold (POT
from 5 bits on) take several banks, one for each 7 bits of their magnitude. Codes and words are held
as unsigned. Each bank is a `ConvInteger` or `MatMulInteger`, whose 32-bit sums are exact; they are
scaled by the bank's constant, added, scaled by the weights' and the inputs' step, and the bias is
added, in float64.
Between layers the graph is the float network's: this is the form that onnxruntime runs, not the
form of a chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from adq_search.errors import StorageError, did_you_mean
from adq_search.export._graph import BASE_OPSET, Piece, export_graph, guest
from adq_search.export.onnx_file import positive
from adq_search.export.qonnx_file import asq_scale
from adq_search.files import write_atomic
from adq_search.integer import weight_words
from adq_search.layers import QuantLayer
from adq_search.quantizers import N2uqInput
from adq_search.quantizers._thresholds import MIN_WIDTH

#: Returns the names of the codes, in floating point, and of the value of code 1.
CodesOf = Callable[[Piece, QuantLayer, int, str], tuple[str, str]]
#: What stands for 0 in signed codes and words, which the graph holds as unsigned: onnxruntime's
#: convolution takes no signed inputs, and on processors with AVX2 alone its products of unsigned
#: and signed words saturate at 16 bits.
ZERO_OF_SIGNED = 128
_LARGEST_SUM = 2**31 - 1
#: Words beyond 8 bits are split into digits of this base, each with the word's sign.
_LIMB = 2**7


class IntegerLayers:
    """Writes each layer as sums of integer codes."""

    domains: ClassVar[Mapping[str, int]] = {}
    writes_layers: ClassVar[bool] = True

    def check(self, name: str, layer: QuantLayer) -> None:
        """Refuse sums that 32 bits do not hold, padding with values, and unknown quantizers."""
        if layer.input_quantizer.name not in _CODES:
            known = did_you_mean(layer.input_quantizer.name, _CODES)
            msg = (
                f"The integer graph knows no input quantizer '{layer.input_quantizer.name}', which "
                f"layer '{name}' has. Use `--format package`. {known}"
            )
            raise StorageError(msg)
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            msg = (
                f"ConvInteger pads with zeros, but layer '{name}' has padding_mode "
                f"'{layer.padding_mode}'. Use `--format qonnx` or `--format package`."
            )
            raise StorageError(msg)
        banks = int8_banks(layer)
        reach = max(int(bank.abs().flatten(1).sum(1).max()) for bank, _ in banks) * 255
        if reach > _LARGEST_SUM:
            msg = (
                f"ConvInteger sums in 32 bits, but sums of layer '{name}' may reach {reach}. Use "
                "`--format qonnx` or `--format package`."
            )
            raise StorageError(msg)

    def write_input(self, piece: Piece, layer: QuantLayer, rank: int, source: str) -> None:
        """Add the whole layer: codes, sums of each bank, scales and bias."""
        codes, step = _CODES[layer.input_quantizer.name](piece, layer, rank, source)
        types = guest("onnx").TensorProto
        zero = ZERO_OF_SIGNED if layer.input_quantizer.is_signed else 0
        if zero:
            codes = piece.node("Add", codes, piece.constant("offset", _float(zero)))
        codes = piece.node("Cast", codes, to=types.UINT8)
        origin = piece.constant("origin", np.array(zero, np.int64), "UINT8")
        nothing = piece.constant("nothing", np.array(ZERO_OF_SIGNED, np.int64), "UINT8")
        unit = weight_words(layer.weight_quantizer, layer.get_parameter("weight")).unit
        is_linear = isinstance(layer, nn.Linear)
        shape = (-1,) if is_linear else (1, -1, *(1 for _ in range(rank - 2)))
        total = ""
        for j, (bank, constant) in enumerate(int8_banks(layer)):
            words = (bank.T if is_linear else bank) + ZERO_OF_SIGNED
            held = piece.constant(f"bank_{j}", words, "UINT8")
            operator = "MatMulInteger" if is_linear else "ConvInteger"
            geometry = {} if is_linear else _geometry(layer)
            sums = piece.node(operator, codes, held, origin, nothing, **geometry)
            worth = piece.constant(f"worth_{j}", (unit * constant).reshape(shape))
            scaled = piece.node("Mul", piece.node("Cast", sums, to=types.DOUBLE), worth)
            total = piece.node("Add", total, scaled) if total else scaled
        total = piece.node("Mul", total, piece.node("Cast", step, to=types.DOUBLE))
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            total = piece.node("Add", total, piece.constant("bias", bias.double().reshape(shape)))
        piece.node("Cast", total, to=types.FLOAT)

    def write_weight(self, piece: Piece, layer: QuantLayer) -> None:
        """Not asked: the layer is written whole."""


def int8_banks(layer: QuantLayer) -> list[tuple[Tensor, float]]:
    """Return a layer's integer weights as banks of 8-bit words.

    Returns:
        Words, int64 from -128 to 127, # shape: (out, in / groups, *kernel), and the constant of
        each bank: the weight words are `sum_j constant_j bank_j`. Powers of a root of two have
        disjoint banks: of all, one at most holds a weight that is not 0.

    Raises:
        IntegerError: The quantizer has no integer form.
    """
    words = weight_words(layer.weight_quantizer, layer.get_parameter("weight"))
    snapped = str(layer.weight_quantizer.options.get("sqrt_half", "exact"))
    return [
        (limb, constant * worth)
        for whole, constant in zip(words.banks, words.constants, strict=True)
        for part, factor in _by_parity(whole, snapped)
        for limb, worth in _limbs(part, factor)
    ]


def _by_parity(words: Tensor, snapped: str) -> Iterator[tuple[Tensor, int]]:
    """Yield words over their factor: those of odd exponents have m of sqrt(1/2) = m / 2^t."""
    if snapped == "exact":
        yield words, 1
        return
    ratio = Fraction(snapped)
    is_odd = words % ratio.denominator != 0
    for mask, factor in ((~is_odd, ratio.denominator), (is_odd, ratio.numerator)):
        part = words.masked_fill(~mask, 0) // factor
        if bool(part.any()) or factor == ratio.denominator:
            yield part, factor


def _limbs(words: Tensor, factor: int) -> Iterator[tuple[Tensor, float]]:
    """Yield 8-bit words and their worth: all of them, or 7 bits of the magnitude at a time."""
    if int(words.min()) >= -128 and int(words.max()) <= 127:
        yield words, float(factor)
        return
    signs, rest, worth = words.sign(), words.abs(), factor
    while bool(rest.any()):
        limb = signs * (rest % _LIMB)
        if bool(limb.any()):
            yield limb, float(worth)
        rest, worth = rest // _LIMB, worth * _LIMB


def write_integer_onnx(file: Path, network: nn.Module, example: Tensor) -> Any:
    """Write a quantized network as ONNX whose layers sum integers.

    Args:
        file: Ends in `.onnx`; replaced whole.
        network: Quantized, in eval mode. ADQ codebooks are taken as 8-bit level words
            (`adq_search.integer.snap_codebooks_` makes the network the same one).
        example: Two or more inputs, # shape: (N, ...)

    Returns:
        The `onnx.ModelProto`; input `input` and output `output`, for any number of samples. The
        sums are the outputs of `ConvInteger` and `MatMulInteger`.

    Raises:
        StorageError: A layer's sums do not fit 32 bits, or torch cannot export it.
        IntegerError: A quantizer has no integer form.
        MissingExtraError: A package of the extra `onnx` is missing.
    """
    model = export_graph(network, example, IntegerLayers(), opset=BASE_OPSET)
    onnx = guest("onnx")
    write_atomic(file, lambda path: onnx.save_model(model, str(path)))
    return model


def _float(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, np.float32)


def _geometry(layer: nn.Module) -> dict[str, Any]:
    convolution = cast("nn.Conv2d", layer)
    reversed_pads = convolution._reversed_padding_repeated_twice
    starts, ends = reversed_pads[::2][::-1], reversed_pads[1::2][::-1]
    return {
        "strides": list(convolution.stride),
        "dilations": list(convolution.dilation),
        "group": convolution.groups,
        "pads": [*starts, *ends],
    }


def _rounded(piece: Piece, layer: QuantLayer, source: str, scale: str) -> str:
    lowest = layer.input_quantizer.lowest_code
    highest = lowest + 2**layer.input_quantizer.bits - 1
    limits = (piece.constant("lowest", _float(lowest)), piece.constant("highest", _float(highest)))
    return piece.node("Round", piece.node("Clip", piece.node("Div", source, scale), *limits))


def _lsq_codes(piece: Piece, layer: QuantLayer, rank: int, source: str) -> tuple[str, str]:
    del rank
    scale = piece.constant("scale", positive(layer.input_quantizer.get_parameter("step")))
    return _rounded(piece, layer, source, scale), scale


def _asq_codes(piece: Piece, layer: QuantLayer, rank: int, source: str) -> tuple[str, str]:
    scale = asq_scale(piece, layer, rank, source)
    return _rounded(piece, layer, source, scale), scale


def _n2uq_codes(piece: Piece, layer: QuantLayer, rank: int, source: str) -> tuple[str, str]:
    """Count the thresholds below a value, along a dimension of their own."""
    quantizer = cast("N2uqInput", layer.input_quantizer)
    widths = quantizer.widths.detach().clamp(min=MIN_WIDTH)
    knots = quantizer.start.detach() + torch.cat([widths.new_zeros(1), widths.cumsum(0)])
    scaled = piece.node("Mul", source, piece.constant("in_scale", positive(quantizer.in_scale)))
    last = piece.constant("last", np.array([rank], np.int64))
    thresholds = piece.constant("thresholds", knots[:-1] + widths / 2)
    below = piece.node("Greater", piece.node("Unsqueeze", scaled, last), thresholds)
    ones = piece.node("Cast", below, to=guest("onnx").TensorProto.FLOAT)
    count = piece.node("ReduceSum", ones, last, keepdims=0)
    codes = piece.node("Add", count, piece.constant("first", _float(quantizer.lowest_code)))
    step = positive(quantizer.out_scale) * (2 / widths.numel())
    return codes, piece.constant("step", step)


_CODES: Mapping[str, CodesOf] = {"lsq": _lsq_codes, "asq": _asq_codes, "n2uq": _n2uq_codes}
