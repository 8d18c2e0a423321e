r"""N2UQ for inputs of several networks at once.

Notation:
    x       values; x' = \\beta_1 x
    s, a_i  start and widths of the M intervals; S_0 = s, S_i = S_(i-1) + a_i their knots
    T_i     thresholds S_(i-1) + a_i / 2
    D       output step 2 / M; output \\beta_2 D (i + n) for i thresholds below x'
    r       gradient of the loss at the output

Tables have room for 8 bits; places past M hold no threshold and slope 0. A threshold is found by
the cell of an even grid that x' lies in: no cell holds two thresholds, so one comparison decides.

References:
    [Liu2022] Nonuniform-to-Uniform Quantization (N2UQ), CVPR 2022, Eqs. 8-10, and its public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adq_search.quantizers import N2uqInput
from adq_search.quantizers._thresholds import MIN_WIDTH
from adq_search.quantizers._through import positive_step

_ROOM = 255
_CELLS = 2048


class ThresholdInputs(nn.Module):
    """N2UQ for inputs of some slots.

    Args:
        quantizers: Of these slots.
    """

    learning_rate_factor: ClassVar[float] = N2uqInput.learning_rate_factor

    qmin: Tensor
    n_intervals: Tensor
    unscaled: Tensor

    @torch.no_grad()
    def __init__(self, quantizers: Sequence[N2uqInput]) -> None:
        super().__init__()
        self._quantizers = list(quantizers)
        one = quantizers[0].start
        widths = one.new_ones(len(quantizers), _ROOM)
        for own, quantizer in zip(widths, quantizers, strict=True):
            own[: quantizer.widths.numel()] = quantizer.widths
        self.widths = nn.Parameter(widths)
        self.start = nn.Parameter(torch.stack([q.start for q in quantizers]))
        self.in_scale = nn.Parameter(torch.stack([q.in_scale for q in quantizers]))
        self.out_scale = nn.Parameter(torch.stack([q.out_scale for q in quantizers]))
        self.register_buffer("qmin", torch.stack([q.qmin for q in quantizers]))
        counts = [q.widths.numel() for q in quantizers]
        self.register_buffer("n_intervals", one.new_tensor(counts))
        self.register_buffer("unscaled", one.new_ones(()))

    def forward(self, rows: Tensor) -> Tensor:
        """Quantize. # shape: (N, slots, F)."""
        return _Thresholds.apply(  # type: ignore[no-any-return]
            rows,
            self.start,
            self.widths.clamp(min=MIN_WIDTH),
            positive_step(self.in_scale, self.unscaled),
            positive_step(self.out_scale, self.unscaled),
            self.qmin,
            self.n_intervals,
        )

    @torch.no_grad()
    def unstack_(self) -> None:
        """Write what was trained back."""
        for i, quantizer in enumerate(self._quantizers):
            quantizer.widths.copy_(self.widths[i, : quantizer.widths.numel()])
            quantizer.start.copy_(self.start[i])
            quantizer.in_scale.copy_(self.in_scale[i])
            quantizer.out_scale.copy_(self.out_scale[i])


class _Thresholds(Function):
    """[Liu2022] Eqs. 8-10 (the generalized straight-through estimator), summed by interval."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        a: Tensor,
        beta_1: Tensor,
        beta_2: Tensor,
        n: Tensor,
        m: Tensor,
    ) -> Tensor:
        index = n_below(x * beta_1.unsqueeze(1), _thresholds(s, a, m))
        ctx.save_for_backward(x, s, a, beta_1, beta_2, n, m, index)
        out = (index + n.unsqueeze(1)).mul_((beta_2 * 2 / m).unsqueeze(1))
        return torch.where(x.isnan(), x, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, beta_1, beta_2, n, m, index = ctx.saved_tensors
        r = gradients[0].contiguous()
        slots = torch.arange(len(s), device=x.device).unsqueeze(1)
        within = torch.arange(_ROOM, device=x.device) < m.unsqueeze(1)
        d = 2 / m
        knots = _knots(s, a)
        slope = torch.where(within, (beta_2 * d).unsqueeze(1) / a, 0.0)

        # S_i lies between T_i and T_(i+1): half 2i is the upper half of interval i, half 2i + 1
        # the lower half of interval i + 1.
        n_halves = 2 * (_ROOM + 1)
        from_knot = (x * beta_1.unsqueeze(1)).sub_(_entry(knots, index + slots * (_ROOM + 1)))
        half = (index * 2 + slots * n_halves).add_(from_knot > 0)
        outside = slope.new_zeros(len(s), 1)
        half_slope = torch.cat([outside, slope.repeat_interleave(2, dim=1), outside], dim=1)
        grad_x = _entry(half_slope * beta_1.unsqueeze(1), half).mul_(r)

        r_sum = _sum_by(half, r, len(s) * n_halves).view(len(s), -1, 2)
        moment = _sum_by(half, from_knot.mul_(r), len(s) * n_halves).view(len(s), -1, 2)
        # Sums over whole intervals 1..M of r, and of r times the distance from the left end.
        r_interval = r_sum[:, :-1, 1] + r_sum[:, 1:, 0]
        r_distance = moment[:, :-1, 1] + moment[:, 1:, 0] + a * r_sum[:, 1:, 0]
        # Every interval pushes those after it: dg/ds = -D/a_i, and the same for a_j with j < i.
        push = slope * r_interval
        grad_s = -push.sum(dim=1)
        grad_a = push.cumsum(dim=1) + grad_s.unsqueeze(1) - slope * r_distance / a
        grad_a = torch.where(within, grad_a, 0.0)
        grad_beta_1 = (slope * (r_distance + knots[:, :-1] * r_interval)).sum(dim=1) / beta_1
        codes = torch.arange(_ROOM + 1, device=x.device) + n.unsqueeze(1)
        grad_beta_2 = d * (codes * r_sum.sum(dim=2)).sum(dim=1)
        return grad_x, grad_s, grad_a, grad_beta_1, grad_beta_2, None, None


def _knots(s: Tensor, a: Tensor) -> Tensor:
    """S_0 to S_M, # shape: (slots, room + 1)."""
    return s.unsqueeze(1) + torch.cat([a.new_zeros(len(a), 1), a.cumsum(dim=1)], dim=1)


def _thresholds(s: Tensor, a: Tensor, m: Tensor) -> Tensor:
    """T_1 to T_M, then infinity, # shape: (slots, room)."""
    within = torch.arange(_ROOM, device=a.device) < m.unsqueeze(1)
    return (_knots(s, a)[:, :-1] + a / 2).masked_fill(~within, torch.inf)


def n_below(values: Tensor, thresholds: Tensor) -> Tensor:
    """Count the thresholds below each value; NaN counts none.

    Args:
        values: # shape: (N, slots, F)
        thresholds: Ascending, then infinity, # shape: (slots, room)

    Returns:
        int64, # shape: (N, slots, F)
    """
    n_slots = len(thresholds)
    slots = torch.arange(n_slots, device=values.device).unsqueeze(1)
    lowest = thresholds[:, :1]
    highest = thresholds.masked_fill(thresholds.isinf(), -torch.inf).amax(dim=1, keepdim=True)
    density = (_CELLS - 2) / (highest - lowest)

    def cell_of(x: Tensor) -> Tensor:  # ascends with x, whatever the rounding
        return ((x - lowest) * density).fmax(x.new_zeros(())).fmin(x.new_tensor(_CELLS - 1)).long()

    cells = cell_of(thresholds)
    is_real = thresholds.isfinite()
    flat = (cells + slots * _CELLS)[is_real]
    counts = torch.zeros(n_slots * _CELLS, dtype=torch.int64, device=values.device)
    counts.index_add_(0, flat, torch.ones_like(flat))
    if int(counts.max()) > 1:  # intervals of very different widths: search instead
        found = zip(values.nan_to_num(-torch.inf).unbind(dim=1), thresholds, strict=True)
        return torch.stack([torch.bucketize(v.contiguous(), t) for v, t in found], dim=1)
    below = (counts.view(n_slots, -1).cumsum(dim=1) - counts.view(n_slots, -1)).flatten()
    inside = thresholds.new_full((n_slots * _CELLS,), torch.inf).index_put(
        (flat,), thresholds[is_real]
    )
    at = cell_of(values).add_(slots * _CELLS)
    return _entry(below, at).add_(values > _entry(inside, at))


def _entry(table: Tensor, indices: Tensor) -> Tensor:
    return table.flatten().index_select(0, indices.view(-1)).view(indices.shape)


def _sum_by(groups: Tensor, values: Tensor, n_groups: int) -> Tensor:
    return values.new_zeros(n_groups).scatter_add_(0, groups.view(-1), values.view(-1))
