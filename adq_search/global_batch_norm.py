r"""Batch norm over the samples of all processes that train a network together.

`torch.nn.SyncBatchNorm` does this on GPUs alone. Here the class of each batch norm is exchanged for
the time of a block, as layers are quantized: parameters, buffers and hooks stay the same objects.

Notation:
    n_i, m_i, v_i  samples, mean and (biased) variance of a channel in process i
    n = \\sum n_i;  m = \\sum n_i m_i / n;  v = \\sum n_i (v_i + (m_i - m)^2) / n   [Chan1983]
    y = (x - m) / sqrt(v + eps) w + b
    dx = a (dy - mean dy - (x - m) / (v + eps) mean((x - m) dy)),  a = w / sqrt(v + eps)

where the means of the backward pass [Ioffe2015] are over all processes too.

References:
    [Chan1983] Chan, Golub, LeVeque: Algorithms for computing the sample variance, 1983, Eq. 2.1.
    [Ioffe2015] Ioffe, Szegedy: Batch normalization, ICML 2015, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from adq_search.errors import ParallelError
from adq_search.parallel import Ranks

# torch leaves Function.apply without annotations.
# mypy: disable-error-code="no-untyped-call"


@contextmanager
def global_batch_norms(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Have the batch norms of a network take their statistics over all processes in the block.

    Args:
        network: Its batch norms are torch's own, or know of processes themselves.
        ranks: The processes; nothing changes for one alone.

    Raises:
        ParallelError: A batch norm is of another class, whose statistics would be of a share.
    """
    exchanged: list[tuple[_BatchNorm, type[_BatchNorm]]] = []
    try:
        if ranks.size > 1:
            for name, norm in network.named_modules():
                if not isinstance(norm, _BatchNorm) or isinstance(norm, _Ready):
                    continue
                kind = type(norm)
                if kind not in GLOBAL_CLASSES:
                    msg = (
                        f"Batch statistics of '{name}' would be those of each process's share: "
                        f"{kind.__name__} cannot take them over several. Use one of "
                        f"{', '.join(k.__name__ for k in GLOBAL_CLASSES)}, or train in one process."
                    )
                    raise ParallelError(msg)
                norm.__class__ = GLOBAL_CLASSES[kind]
                norm.__dict__["ranks"] = ranks
                exchanged.append((norm, kind))
        yield
    finally:
        for norm, kind in exchanged:
            norm.__class__ = kind
            del norm.__dict__["ranks"]


class GlobalBatchNorm(_BatchNorm):
    """A batch norm over the samples of all processes.

    Attributes:
        ranks: The processes.
    """

    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:
        """Normalize. # shape: (N, C, ...)."""
        has_running = self.running_mean is not None and self.running_var is not None
        if not self.training and has_running:
            return super().forward(input)
        self._check_input_dim(input)
        weight = input.new_ones(self.num_features) if self.weight is None else self.weight
        bias = input.new_zeros(self.num_features) if self.bias is None else self.bias
        out, mean, variance, n = _Normalize.apply(input, weight, bias, self.eps, self.ranks)
        if self.training and has_running:
            self._follow_(mean, variance * (n / (n - 1)))
        return out  # type: ignore[no-any-return]

    @torch.no_grad()
    def _follow_(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics as torch does: by momentum, or to the plain average."""
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if share is None else share
        share = share or 0.0
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.mul_(1 - share).add_(new.to(running.dtype), alpha=share)


class _GlobalBatchNorm1d(GlobalBatchNorm, nn.BatchNorm1d): ...


class _GlobalBatchNorm2d(GlobalBatchNorm, nn.BatchNorm2d): ...


class _GlobalBatchNorm3d(GlobalBatchNorm, nn.BatchNorm3d): ...


GLOBAL_CLASSES: Mapping[type[nn.Module], type[GlobalBatchNorm]] = {
    nn.BatchNorm1d: _GlobalBatchNorm1d,
    nn.BatchNorm2d: _GlobalBatchNorm2d,
    nn.BatchNorm3d: _GlobalBatchNorm3d,
}
_Ready = GlobalBatchNorm | nn.SyncBatchNorm


class _Normalize(Function):
    """Normalized values, mean, biased variance and number of values a channel (no gradients)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [dim for dim in range(x.ndim) if dim != 1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        own = x.new_zeros(3, x.shape[1], dtype=dtype)
        if x.numel():
            own[0] = x.numel() // x.shape[1]
            own[2], own[1] = torch.var_mean(x.to(dtype), dim=dims, correction=0)
        n_i, m_i, v_i = ranks.gathered(own).unbind(1)  # each # shape: (size, C)
        n = n_i.sum(0)
        m = (n_i * m_i).sum(0) / n
        v = (n_i * (v_i + (m_i - m).square())).sum(0) / n
        ctx.save_for_backward(x, w, m, v, n)
        ctx.eps, ctx.ranks, ctx.dims = eps, ranks, dims
        ctx.mark_non_differentiable(m, v, n)
        shown = F.batch_norm(x.to(dtype), m, v, w.to(dtype), b.to(dtype), training=False, eps=eps)
        return shown.to(x.dtype), m, v, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w, m, v, n = ctx.saved_tensors
        per_channel = (1, -1, *(1 for _ in ctx.dims[1:]))
        dy = gradients[0].to(m.dtype)
        distance = x.to(m.dtype) - m.view(per_channel)
        own = torch.stack([dy.sum(ctx.dims), (dy * distance).sum(ctx.dims)])
        mean_dy, mean_product = ctx.ranks.total(own) / n
        scale = torch.rsqrt(v + ctx.eps)
        inner = dy - mean_dy.view(per_channel)
        inner.sub_(distance.mul_((scale.square() * mean_product).view(per_channel)))
        dx = inner.mul_((w.to(m.dtype) * scale).view(per_channel))
        return dx.to(x.dtype), (own[1] * scale).to(w.dtype), own[0].to(w.dtype), None, None
