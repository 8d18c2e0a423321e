"""Norms, clippings and quantized layers that share their passes over memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adq_search.layers import mark_quantized
from adq_search.norms import _passes
from adq_search.norms._readers import EVERYTHING, RANGES, Reader, find_readers
from adq_search.norms._rectified import rectified
from adq_search.quantizers import InputQuantizer


@contextmanager
def fused_norms(network: nn.Module) -> Iterator[None]:
    """Have batch norms run in C++ in the block, with the ReLU and the quantizer behind them.

    A norm clips what it returns where nothing but one kind of clipping module reads it; that
    module, finding its input clipped, returns it as it is. Likewise a norm quantizes what only one
    layer reads behind them. What reads what is taken from a trace of the network, and must hold for
    every step.

    The classes of the modules are exchanged for the time of the block, as layers are quantized:
    parameters, buffers and hooks stay the same objects. Without a C++ compiler, on GPUs, in
    evaluation and for other layouts than channels last all do what torch does; values and
    gradients are torch's within rounding.

    Args:
        network: In training mode.
    """
    readers = find_readers(network)
    exchanged: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module in network.modules():
            kind = type(module)
            if kind is nn.BatchNorm2d:
                module.__dict__["reader"] = readers.get(module, Reader())
                module.__class__ = FusedNorm
            elif kind in RANGES:
                module.__dict__["reader"] = readers.get(module, Reader(RANGES[kind]))
                module.__class__ = ONCE[kind]
            else:
                continue
            exchanged.append((module, kind))
        yield
    finally:
        for module, kind in exchanged:
            module.__class__ = kind
            module.__dict__.pop("reader", None)


class FusedNorm(nn.BatchNorm2d):
    """A batch norm that also does what its reader would.

    Attributes:
        reader: What comes behind it.
    """

    reader: Reader

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, clip and quantize. # shape: (N, C, height, width)."""
        running_mean, running_variance = self.running_mean, self.running_var
        if (
            not self.training
            or running_mean is None
            or running_variance is None
            or not self.affine
            # torch says what is wrong with other channels.
            or input.ndim != 4
            or input.shape[1] != self.num_features
            or not _takes(input, running_mean, running_variance, self.weight, self.bias)
        ):
            return super().forward(input)
        passes, quantizer = self.reader.passes, self.reader.quantizer
        norm = _passes.Norm(running_mean, running_variance, self._follow(), self.eps, passes)
        if quantizer is None or not _passes.fuses(quantizer, self.num_features):
            out = _passes.normalized(input, self.weight, self.bias, norm)
        else:
            out = _passes.normalized(input, self.weight, self.bias, norm, quantizer)
            mark_quantized(out, quantizer)
        if passes != EVERYTHING:
            # An attribute that torch's annotations do not know; `_Once` looks for it.
            out.clipped_to = passes  # type: ignore[attr-defined]
        return out

    def _follow(self) -> float:
        """Count the batch; return its share in the running statistics, as torch does."""
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if share is None else share
        return share or 0.0


class _Once(nn.Module):
    """A clipping module that leaves alone what is clipped, and quantizes what its reader would.

    Attributes:
        reader: What comes behind it.
    """

    reader: Reader

    def forward(self, input: Tensor) -> Tensor:
        """Clip. # shape: any."""
        passes, quantizer = self.reader.passes, self.reader.quantizer
        if getattr(input, "clipped_to", None) == passes:
            return input
        if quantizer is None or not self.training or not _fuses(input, quantizer):
            clipped: Tensor = super().forward(input)
            if clipped.requires_grad and _is_by_pixels(clipped):
                clipped.register_hook(_by_pixels)
            return clipped
        out, quantized = rectified(input, passes, quantizer)
        mark_quantized(out, quantizer, quantized)
        return out


class _ReluOnce(_Once, nn.ReLU): ...


class _Relu6Once(_Once, nn.ReLU6): ...


#: By clipping module, one that leaves alone what is clipped.
ONCE: Mapping[type[nn.Module], type[nn.Module]] = {nn.ReLU: _ReluOnce, nn.ReLU6: _Relu6Once}


def _is_by_pixels(values: Tensor) -> bool:
    return values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)


def _by_pixels(gradient: Tensor) -> Tensor:
    """Return the gradient channels last: pooling's is not, and torch's ReLU then takes long."""
    return gradient.contiguous(memory_format=torch.channels_last)


def _takes(values: Tensor, *parameters: Tensor) -> bool:
    return (
        _is_by_pixels(values)
        # torch refuses a single value a channel, and says why.
        and values.numel() > values.shape[1]
        and _passes.LIBRARY.takes(values, *parameters)
    )


def _fuses(values: Tensor, quantizer: InputQuantizer) -> bool:
    return _takes(values, *quantizer.parameters()) and _passes.fuses(quantizer, values.shape[1])
