"""Batch norms that clip and quantize in the same passes over memory, for training on CPUs.

Torch passes over memory thirteen times for a norm and its ReLU, forward and backward (each tensor
read or written counts once); the C++ here does so eight times, with an LSQ quantizer behind them
included. `results/qat_step` measures what that brings.

- `_readers`: what reads a norm's output, in a trace of the network.
- `_modules`: the classes that norms, ReLUs and layers have for the time of a block.
- `_passes`: forward values and gradients of norms; `norms.cpp` does the work.
- `_rectified`: the same for ReLUs without a norm, behind a residual addition.
"""

from adq_search.norms._modules import FusedNorm, fused_norms
from adq_search.norms._readers import EVERYTHING, RANGES, Range, Reader, find_readers

__all__ = [
    "EVERYTHING",
    "RANGES",
    "FusedNorm",
    "Range",
    "Reader",
    "find_readers",
    "fused_norms",
]
