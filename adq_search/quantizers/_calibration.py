"""Numbers that quantizers start from: steps, quantiles, integer grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Smallest step in use: forward takes max(|s|, EPS), as the code of [Zhou2025] does.
EPS = 1e-8


def initial_step(rows: Tensor, qmax: Tensor) -> Tensor:
    """Return LSQ's data-driven step 2 mean|v| / sqrt(Q_P) of each row [Esser2020, section 2.1].

    A row of zeros takes the mean step of the others (1 where there are none), so that it can
    still learn.

    Args:
        rows: Values, # shape: (groups, values)
        qmax: Largest code Q_P, # shape: ()

    Returns:
        Steps, # shape: (groups,)
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    steps = 2 * rows.abs().mean(dim=1) * torch.rsqrt(qmax)
    alive = steps > EPS
    spare = steps[alive].mean() if bool(alive.any()) else torch.ones_like(steps[0])
    return torch.where(alive, steps, spare)


def quantile(rows: Tensor, shares: Tensor) -> Tensor:
    """Return quantiles of every row by linear interpolation; any number of values.

    `torch.quantile` stops at 2^24 values.

    Args:
        rows: Values, # shape: (rows, n)
        shares: Probabilities, 0 to 1, # shape: (p,)

    Returns:
        Quantiles, # shape: (rows, p)
    """
    ordered = rows.sort(dim=-1).values
    place = shares.to(torch.float64) * (rows.shape[-1] - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=rows.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], (place - below).to(rows.dtype))


def n_features(values: Tensor, sample_shape: tuple[int, ...]) -> int:
    """Return how many values one sample has."""
    return values.numel() // max(1, math.prod(sample_shape))


def integer_grid(bits: int, qmin: Tensor, step: Tensor) -> Tensor:
    """Return the codes qmin .. qmin + 2^bits - 1 in the dtype of `step`, # shape: (2^bits,)."""
    return torch.arange(2**bits, dtype=step.dtype, device=step.device) + qmin.to(step.dtype)


def computing_dtype(values: Tensor, step: Tensor) -> torch.dtype:
    """Return the dtype to compute in: the wider of the two, float32 at least."""
    return torch.promote_types(torch.promote_types(values.dtype, step.dtype), torch.float32)
