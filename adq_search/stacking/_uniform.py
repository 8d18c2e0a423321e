r"""Uniform quantization of rows that have a step and a code range each.

Notation:
    v       values, # shape: (rows, n)
    s       steps, # shape: (rows, 1)
    n, p    smallest and largest codes, # shape: (rows, 1)
    r       gradient of the loss at the output

The mathematics is that of `quantizers`: [Esser2020] Eqs. 1-3 and 5, [Zhou2025] Eqs. 5-7.

References:
    [Esser2020] Learned Step Size Quantization, ICLR 2020.
    [Zhou2025] ASQ and POST, arXiv 2504.17263.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def uniform_rows(values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Return `clip(round(values / step), qmin, qmax) * step`, with LSQ's gradients.

    Args:
        values: # shape: (rows, n)
        step: Positive, # shape: (rows, 1)
        qmin: Smallest codes, # shape: (rows, 1)
        qmax: Largest codes, # shape: (rows, 1)
    """
    return _UniformRows.apply(values, step, qmin, qmax)  # type: ignore[no-any-return]


class _UniformRows(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, s: Tensor, n: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(v, s, n, p)
        return _clip_(v / s, n, p).round_().mul_(s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, s, n, p = ctx.saved_tensors
        r = gradients[0]
        z = _clip_(v / s, n, p)
        # Comparisons into floating point are vectorized; boolean masks cost ten times as much.
        inside, below = torch.empty_like(z), torch.empty_like(z)
        torch.gt(z, n, out=inside)
        inside.mul_(torch.lt(z, p, out=below))
        grad_v = torch.mul(r, inside, out=below)
        # d v_hat / d s: round(z) - z inside, n below, p above.
        inside.mul_(z)
        grad_s = z.round_().sub_(inside).mul_(r).sum(dim=1, keepdim=True)
        return grad_v, grad_s, None, None


def _clip_(scaled: Tensor, n: Tensor, p: Tensor) -> Tensor:
    """Clip in place; `clamp` with tensor bounds is three times as slow on CPU."""
    torch.maximum(scaled, n, out=scaled)
    return torch.minimum(scaled, p, out=scaled)
