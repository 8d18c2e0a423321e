"""Count the shapes for which oneDNN's int8 convolution differs from int64 sums.

Usage: python results/integer_speed/shapes.py [--tries N]

Each kind of shape runs in a process of its own, for some end it. `common` is what
`adq_search.integer` takes. Prints a Markdown table.
"""

import argparse
import random
import subprocess
import sys

import torch
from torch.nn import functional as F

KINDS = ("common", "one output column", "unequal strides", "dilated, padded, signed")


def draw(kind, rng):
    """Return size, stride, padding and dilation by dimension, the input's sides, the zero point."""
    size = rng.choice((1, 2, 3, 5, 7))
    stride, dilation, padding = rng.choice((1, 2, 3)), 1, rng.randint(0, size // 2)
    zero = rng.choice((0, 128))
    reach = size
    if kind == "one output column":
        stride, padding = rng.choice((2, 3)), 0
    if kind == "dilated, padded, signed":
        dilation, zero = 2, 128
        reach = (size - 1) * dilation + 1
        padding = rng.randint(0, reach - 1)
    sides = [max(1, reach - 2 * padding + stride * rng.randint(1, 12)) for _ in range(2)]
    if kind == "one output column":
        sides[1] = size + rng.randint(0, stride - 1)
    strides = [stride, stride]
    if kind == "unequal strides":
        strides[1] = rng.choice([s for s in (1, 2, 3) if s != stride])
    return size, strides, [padding] * 2, [dilation] * 2, sides, zero


def differs(kind, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size, strides, padding, dilation, sides, zero = draw(kind, rng)
    groups, n_in, n_out = (
        rng.choice((1, 1, 2, 8)),
        rng.choice((1, 3, 8, 33)),
        rng.choice((1, 4, 16)),
    )
    codes = torch.randint(0, 64, (rng.choice((1, 2, 5)), groups * n_in, *sides))
    words = torch.randint(-16, 16, (groups * n_out, n_in, size, size))
    place = (strides, padding, dilation, groups)
    ones, zeros = torch.ones(len(words)), torch.zeros(len(words), dtype=torch.int32)
    onednn = torch.ops.onednn
    packed = onednn.qconv_prepack(words.to(torch.int8), ones, 1.0, zero, *place, None)
    given = codes.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    weights, result = (packed, ones, zeros, None), (1.0, 0, torch.float32, "none", [], "")
    sums = onednn.qconv_pointwise(given, 1.0, zero, *weights, *place, *result)
    wanted = F.conv2d((codes - zero).double(), words.double(), None, *place)
    return not torch.equal(sums.double(), wanted)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--kind", choices=KINDS, help="count here, and print the number alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.kind:
        print(sum(differs(asked.kind, seed) for seed in range(asked.tries)))
        return
    print(f"| shapes | of {asked.tries} differ |\n| --- | ---: |")
    for kind in KINDS:
        command = [sys.executable, "-W", "ignore", __file__, "--kind", kind]
        told = subprocess.run(
            [*command, "--tries", str(asked.tries)], capture_output=True, text=True, check=False
        )
        died = told.returncode != 0
        print(f"| {kind} | {'the process died' if died else told.stdout.strip()} |", flush=True)


if __name__ == "__main__":
    main()
