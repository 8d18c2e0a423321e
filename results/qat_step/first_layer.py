"""Time the first layer of networks: the step's gradient by autograd, and as `first_layer` takes it.

Usage: python results/qat_step/first_layer.py [--threads N] [--rounds N]

Forward and backward of one convolution on images, channels last, all variants in turn in each
round: float (no gradient to the images), LSQ with the gradient to the images as autograd has it,
LSQ as `adq_search.first_layer` has it. Writes first_layer.csv (a row a layer, variant and round),
first_layer.md and first_layer.json into the folder of this processor's instructions.
"""

import argparse
import statistics
import time

import torch
from measured import write_made, write_table
from torch import nn

from adq_search.convolution import convolve
from adq_search.layers import to_quantized_
from adq_search.own_process import keep_freed_memory
from adq_search.provenance import provenance
from adq_search.quantizers import LsqInput, LsqWeight

#: Images, output channels, kernel, stride.
LAYERS = {
    "mnist5k": ((64, 1, 28, 28), 8, 3, 1),
    "ResNet-20": ((128, 3, 32, 32), 16, 3, 1),
    "MobileNet-V2": ((32, 3, 96, 96), 32, 3, 2),
    "ResNet-18": ((16, 3, 224, 224), 64, 7, 2),
}
FLOAT, AUTOGRAD, OURS = "float", "LSQ, autograd", "LSQ, ours"


def by_autograd(layer, images):
    """What `QuantConv2d` does where its input needs a gradient too."""
    values = layer.input_quantizer(images)
    weight = layer.weight_quantizer(layer.weight)
    return convolve(values, weight, None, layer.stride, layer.padding, layer.dilation, 1)


def contestants(name):
    shape, n_out, kernel, stride = LAYERS[name]
    images = torch.rand(shape).to(memory_format=torch.channels_last)

    def made():
        return nn.Conv2d(shape[1], n_out, kernel, stride, kernel // 2, bias=False)

    plain, quantized = made(), made()
    weights, inputs = (
        LsqWeight(8, tuple(plain.weight.shape)),
        LsqInput(8, n_channels=shape[1], channel_dim=-3),
    )
    weights.initialize_(quantized.weight)
    inputs.initialize_(images)
    to_quantized_(quantized, weights, inputs)
    return {
        FLOAT: (plain, lambda: plain(images)),
        AUTOGRAD: (quantized, lambda: by_autograd(quantized, images)),
        OURS: (quantized, lambda: quantized(images)),
    }


def timed(layer, forward):
    """Return the seconds of one pass forward and backward."""
    start = time.perf_counter()
    out = forward()
    forward_s = time.perf_counter() - start
    upstream = torch.ones_like(out)
    start = time.perf_counter()
    torch.autograd.grad(out, list(layer.parameters()), upstream)
    return forward_s + time.perf_counter() - start


def summary(rows):
    lines = [
        f"Milliseconds forward and backward, medians; {torch.get_num_threads()} threads. Ratio of "
        "rounds, median (least to largest).",
        "",
        f"| first layer of | {FLOAT} | {AUTOGRAD} | {OURS} | ours over autograd |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in LAYERS:
        own = {
            variant: [r["s"] for r in rows if (r["layer"], r["variant"]) == (name, variant)]
            for variant in (FLOAT, AUTOGRAD, OURS)
        }
        ratios = [b / a for a, b in zip(own[AUTOGRAD], own[OURS], strict=True)]
        ms = " | ".join(f"{1e3 * statistics.median(seconds):.2f}" for seconds in own.values())
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {ms} | {spread} |")
    return "\n".join(lines) + "\n"


def main(threads, rounds):
    made = provenance(seed=0)  # of the tree before files in it change
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rows = []
    for name in LAYERS:
        variants = contestants(name)
        for number in range(-2, rounds):  # two rounds to warm up
            for variant, (layer, forward) in variants.items():
                seconds = timed(layer, forward)
                if number >= 0:
                    rows.append({"layer": name, "variant": variant, "round": number, "s": seconds})
    rounded = [{**row, "s": f"{row['s']:.4g}"} for row in rows]
    write_table("first_layer", rounded, summary(rows))
    write_made("first_layer", made)
    print(summary(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    main(**vars(parser.parse_args()))
