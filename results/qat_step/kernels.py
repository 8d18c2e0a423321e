"""How far each quantizer is from the memory: forward and backward of one tensor of 8.4 MB.

The floor is what the arithmetic cannot do without: reading and writing the tensor, as `clone` does
(forward), or reading values and upstream gradient and writing one gradient, as `a + b` does
(backward).
"""

import os
import statistics
import time

import torch

from adq_search.quantizers import (
    AdqWeight,
    AsqInput,
    LsqInput,
    LsqWeight,
    N2uqInput,
    PostWeight,
    PotWeight,
    RootWeight,
)

SHAPE = (128, 16, 32, 32)  # 8.4 MB in float32
BITS = 4


def quantizers():
    inputs = {"n_channels": SHAPE[1], "channel_dim": -3}
    return {
        "lsq input": LsqInput(BITS, **inputs),
        "asq input": AsqInput(BITS, **inputs),
        "n2uq input": N2uqInput(BITS, **inputs),
        "lsq weight": LsqWeight(BITS, SHAPE),
        "pot weight": PotWeight(BITS, SHAPE),
        "post weight": PostWeight(BITS, SHAPE),
        "root weight": RootWeight(BITS, SHAPE),
        "adq weight": AdqWeight(BITS, SHAPE, ema_momentum=0.99),
    }


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def race_kernels(rounds):
    """Return a row a quantizer, mode and round, in seconds."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SHAPE, generator=generator).relu().requires_grad_()
    weights = torch.randn(SHAPE, generator=generator).mul_(0.1).requires_grad_()
    upstream = torch.randn(SHAPE, generator=generator)
    made = quantizers()
    for quantizer in made.values():
        is_input = isinstance(quantizer, LsqInput | AsqInput | N2uqInput)
        quantizer.initialize_(values if is_input else weights)
    rows = []
    for number in range(-2, rounds):  # two rounds to warm up
        clone_s, _ = timed(torch.clone, values.detach())
        sum_s, _ = timed(torch.add, values.detach(), upstream)
        for name, quantizer in made.items():
            for mode in ("auto", "off"):
                os.environ["ADQ_SEARCH_COMPILE"] = mode
                x = values if name.endswith("input") else weights
                forward_s, out = timed(quantizer, x)
                wanted = [x, *quantizer.parameters()]
                backward_s, _ = timed(torch.autograd.grad, out, wanted, upstream)
                rows.append(
                    {
                        "quantizer": name,
                        "compiled": mode == "auto",
                        "round": number,
                        "forward_s": forward_s,
                        "backward_s": backward_s,
                        "clone_s": clone_s,
                        "sum_s": sum_s,
                    }
                )
    return [row for row in rows if row["round"] >= 0]


def kernel_table(rows):
    """Medians in milliseconds, and how many times the floor each takes."""
    lines = [
        "| quantizer | forward ms | of floor | backward ms | of floor "
        "| uncompiled forward ms | backward ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    clone_ms = 1e3 * statistics.median(r["clone_s"] for r in rows)
    sum_ms = 1e3 * statistics.median(r["sum_s"] for r in rows)
    lines.append(f"| floor | {clone_ms:.2f} | 1.0 | {sum_ms:.2f} | 1.0 | | |")
    for name in dict.fromkeys(r["quantizer"] for r in rows):
        cells = [name]
        for is_compiled in (True, False):
            own = [r for r in rows if r["quantizer"] == name and r["compiled"] == is_compiled]
            for key, floor_ms in (("forward_s", clone_ms), ("backward_s", sum_ms)):
                ms = 1e3 * statistics.median(r[key] for r in own)
                cells.append(f"{ms:.2f}")
                if is_compiled:
                    cells.append(f"{ms / floor_ms:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
