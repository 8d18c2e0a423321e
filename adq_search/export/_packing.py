"""Codes of b bits in a stream of bytes, without gaps.

Code i takes the bits i*b .. i*b + b - 1 of the stream, its least significant bit first; bit j of
the stream is bit j mod 8 of byte j // 8, where bit 0 is the least significant. The last byte is
filled up with zeros.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Codes packed at once; a multiple of 8, so that each part begins with a byte.
_PART = 1 << 20


def packed_bytes(n_codes: int, bits: int) -> int:
    """Return the bytes that the codes take: ceil(n b / 8)."""
    return -(-n_codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes in row-major order.

    Args:
        codes: Integers from 0 to 2^bits - 1, any shape.
        bits: Bits of a code, 1 to 16.

    Returns:
        uint8, # shape: (ceil(n bits / 8),)
    """
    flat = codes.reshape(-1).cpu().numpy().astype(np.uint16)
    places = np.arange(bits, dtype=np.uint16)
    parts = [
        np.packbits(
            ((flat[at : at + _PART, None] >> places) & 1).astype(np.uint8), bitorder="little"
        )
        for at in range(0, len(flat), _PART)
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *parts]))


def unpack(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """Return the codes of a stream; int64, # shape: (n_codes,)."""
    stream = packed.numpy()
    per_part = _PART * bits // 8
    places = np.arange(bits, dtype=np.int64)
    parts = []
    for at in range(0, len(stream), per_part):
        ones = np.unpackbits(stream[at : at + per_part], bitorder="little")
        whole = ones[: len(ones) // bits * bits].reshape(-1, bits)
        parts.append((whole.astype(np.int64) << places).sum(axis=1))
    codes = np.concatenate([np.zeros(0, np.int64), *parts])[:n_codes]
    return torch.from_numpy(codes)
