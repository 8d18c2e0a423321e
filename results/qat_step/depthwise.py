"""Time MobileNet-V2's depthwise convolutions in float32 and in bfloat16, torch's and ours.

Usage: python results/qat_step/depthwise.py [--threads N] [--rounds N]

Forward and backward of each shape at batch 32, 96x96, channels last, all variants in turn in each
round. Writes depthwise.csv (a row a shape, variant and round), depthwise.md and depthwise.json into
the folder of this processor's instructions.
"""

import argparse
import statistics
import time

import torch
import torchvision
from measured import write_made, write_table
from torch import nn
from torch.nn import functional as F

from adq_search.convolution import convolve
from adq_search.provenance import provenance

SHAPE = (32, 3, 96, 96)
#: Function and whether under autocast.
VARIANTS = {
    "float32": (F.conv2d, False),
    "torch, bf16": (F.conv2d, True),
    "ours, bf16": (convolve, True),
}


def depthwise_shapes():
    """Return each shape once: input, kernel, stride, padding; and how many layers have it."""
    found = {}

    def note(layer, inputs, _):
        key = (tuple(inputs[0].shape), layer.kernel_size[0], layer.stride[0], layer.padding[0])
        found[key] = found.get(key, 0) + 1

    network = torchvision.models.mobilenet_v2(num_classes=10).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(SHAPE))
    return found


def timed(variant, shape, kernel, stride, padding):
    """Return the seconds of one pass forward and backward."""
    function, is_half = VARIANTS[variant]
    dtype = torch.bfloat16 if is_half else torch.float32
    values = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(shape[1], 1, kernel, kernel, requires_grad=True)
    geometry = ((stride, stride), (padding, padding), (1, 1), shape[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        start = time.perf_counter()
        out = function(values, weight, None, *geometry)
    forward_s = time.perf_counter() - start
    upstream = torch.ones_like(out)
    start = time.perf_counter()
    torch.autograd.grad(out, [values, weight], upstream)
    return forward_s + time.perf_counter() - start


def summary(rows):
    lines = [
        f"Milliseconds forward and backward, medians; {torch.get_num_threads()} threads.",
        "",
        f"| input | stride | layers | {' | '.join(VARIANTS)} |",
        f"| --- | ---: | ---: | {' | '.join('---:' for _ in VARIANTS)} |",
    ]
    total = dict.fromkeys(VARIANTS, 0.0)
    for key in dict.fromkeys((r["input"], r["stride"], r["layers"]) for r in rows):
        own = [r for r in rows if (r["input"], r["stride"], r["layers"]) == key]
        medians = {
            name: 1e3 * statistics.median(r["s"] for r in own if r["variant"] == name)
            for name in VARIANTS
        }
        for name, value in medians.items():
            total[name] += key[2] * value
        lines.append(f"| {' | '.join(map(str, key))} | {_cells(medians)} |")
    lines.append(f"| all layers | | | {_cells(total)} |")
    return "\n".join(lines) + "\n"


def _cells(values):
    return " | ".join(f"{value:.1f}" for value in values.values())


def main(threads, rounds):
    made = provenance(seed=0)  # of the tree before files in it change
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rows = []
    for (shape, *geometry), layers in depthwise_shapes().items():
        for variant in VARIANTS:
            timed(variant, shape, *geometry)
        for number in range(rounds):
            for variant in VARIANTS:
                rows.append(
                    {
                        "input": "x".join(map(str, shape)),
                        "stride": geometry[1],
                        "layers": layers,
                        "variant": variant,
                        "round": number,
                        "s": timed(variant, shape, *geometry),
                    }
                )
    rounded = [{**row, "s": f"{row['s']:.4g}"} for row in rows]
    write_table("depthwise", rounded, summary(rows))
    write_made("depthwise", made)
    print(summary(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    main(**vars(parser.parse_args()))
