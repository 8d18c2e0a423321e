"""Which labels a Fisher information is taken over.

Notation:
    z_n: logits of example n; p_nc: its softmax; q_nc: weight of class c as its label.

A gradient for label c is (dz_n/dv)^T (p_n - e_c); a Fisher information is sum_c q_nc of its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Labels:
    """Where labels come from.

    Args:
        source: `model` takes labels by the network's softmax; `data` takes the targets.
        exact_classes: Up to this many classes, the sum over all of them replaces draws.
        draws: Labels drawn for each example beyond that.
    """

    source: Literal["model", "data"] = "model"
    exact_classes: int = 16
    draws: int = 4

    def pulls(self, logits: Tensor, targets: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Return sqrt(q_c) (p - e_c) for each label c in turn, # shape: (n, classes) each."""
        p = logits.softmax(dim=1)
        n_classes = p.shape[1]
        if self.source == "data":
            return [p - F.one_hot(targets, n_classes)]
        if n_classes > self.exact_classes:
            drawn = torch.multinomial(p, self.draws, replacement=True, generator=generator)
            share = self.draws**-0.5
            return [share * (p - F.one_hot(c, n_classes)) for c in drawn.T]
        corners = torch.eye(n_classes, dtype=p.dtype, device=p.device)
        return [p[:, c : c + 1].sqrt() * (p - corners[c]) for c in range(n_classes)]


MODEL_LABELS = Labels()
