"""The circuits that are measured: parameters, ports, accumulator widths, and their Verilog top."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from reference import CONSTANTS, accumulator_width, literal, root_half

#: Fan-ins: one channel of a depthwise 3x3, a 3x3 of 64 channels, a 3x3 of 1024.
FAN_INS = (9, 576, 9216)
#: Smallest measured fan-in: a 1x1 of 4 channels.
SMALLEST = 4


@dataclass(frozen=True)
class Design:
    """One circuit: `module` of rtl/ with `parameters`.

    Args:
        kind: Row label of the table.
        module: Verilog module.
        parameters: Its parameters, as integers.
        inputs: Data ports and their bits, clock and clear apart.
        outputs: Output ports of the top and their bits, lowest first where one port is split.
        width: Bits of one accumulator; 0 for circuits without.
        levels: Level words of a codebook, by code.
        rom: Words wired into the circuit: (Verilog parameter, bits of a word, words).
    """

    kind: str
    module: str
    parameters: dict
    inputs: dict
    outputs: dict
    width: int = 0
    levels: tuple = field(default=())
    rom: tuple = field(default=())

    @property
    def is_mac(self):
        return self.width > 0

    @property
    def is_clocked(self):
        return self.is_mac or self.kind == "threshold_search"

    @property
    def label(self):
        return self.kind + "".join(f" {k}={v}" for k, v in self.parameters.items())


@cache
def lloyd_levels(b_w, level_bits, seed=0):
    """Lloyd's levels of a Gaussian as two's-complement words, zero among them, lowest first."""
    weights = np.random.default_rng(seed).standard_normal(20_000)
    n = 2**b_w - 1
    levels = np.quantile(weights, (np.arange(n) + 0.5) / n)
    for _ in range(50):
        levels[n // 2] = 0.0
        nearest = np.abs(weights[:, None] - levels).argmin(axis=1)
        levels = np.bincount(nearest, weights, minlength=n) / np.bincount(nearest, minlength=n)
    levels[n // 2] = 0.0
    words = np.rint(levels / np.abs(levels).max() * (2 ** (level_bits - 1) - 1)).astype(int)
    return (*(int(v) for v in words), 0)  # the last code is spare


def mac(kind, *, b_a, b_w, n, f=0, root=2, level_bits=8):
    """Return a multiply-accumulate circuit."""
    modules = {"pot": "root_mac", "post_dual": "root_mac", "root3": "root_mac"}
    modules |= {"root4": "root_mac", "codebook": "codebook_mac", "uniform": "uniform_mac"}
    root = {"pot": 1, "root3": 3, "root4": 4}.get(kind, root)
    width = accumulator_width(kind, b_a=b_a, b_w=b_w, n=n, f=f, root=root, level_bits=level_bits)
    parameters = {"B_A": b_a, "B_W": b_w, "N": n}
    inputs = {"a": b_a, "code": b_w}
    levels = rom = ()
    banks = 1
    if modules.get(kind) == "root_mac":
        parameters["ROOT"] = banks = root
    if kind in ("post_broadcast", "post_table"):
        parameters["F"] = f
    if kind == "post_broadcast":
        inputs["a_root"] = b_a + f
    if kind in ("codebook", "codebook_loaded"):
        parameters["L"] = level_bits
        levels = lloyd_levels(b_w, level_bits)
    if kind == "codebook":
        rom = ("LEVELS", level_bits, levels)
    if kind == "codebook_loaded":
        inputs["words"] = level_bits * 2**b_w
    if kind == "post_table":
        rom = ("TABLE", b_a + f, tuple(root_half(range(2**b_a), f).tolist()))
    if kind == "post_literal":
        a = np.arange(2**b_a)
        columns = [literal(a, np.full_like(a, k)).tolist() for k in range(1, 2 ** (b_w - 1), 2)]
        rom = ("TABLE", b_a, tuple(word for column in columns for word in column))
    if kind == "codebook_bins":
        banks = 2**b_w
        levels = lloyd_levels(b_w, level_bits)
    outputs = {f"acc{j}": width for j in range(banks)}
    return Design(kind, modules.get(kind, kind), parameters, inputs, outputs, width, levels, rom)


def unit(kind, **p):
    """Return a circuit beside the multiply-accumulate: once an output, an activation, a weight."""
    if kind == "constant_multiply":
        t = CONSTANTS[p["C"]]
        return Design(kind, kind, p, {"x": p["WIDTH"]}, {"product": p["WIDTH"] + t})
    if kind == "post_prepare":
        return Design(kind, kind, p, {"a": p["B_A"]}, {"a_root": p["B_A"] + p["F"]})
    if kind == "codebook_decode":
        inputs = {"words": p["L"] * 2 ** p["B_W"], "code": p["B_W"]}
        return Design(kind, kind, p, inputs, {"word": p["L"]})
    if kind == "requantize":
        inputs = {"x": p["W"], "m": p["M"], "s": p["SB"]}
        return Design(kind, kind, p, inputs, {"y": p["B"]})
    inputs = {"x": p["W"], "threshold": p["W"]}
    return Design(kind, kind, p, inputs, {"code": p["B"], "address": p["B"]})


def all_designs():
    """Every circuit of the table, in the order of its rows."""
    found = []
    for n in FAN_INS:
        for b_a in (2, 3, 4, 6, 8):
            for b_w in (2, 3, 4, 5, 6, 8):
                if n < 9216 or b_a == b_w:
                    found.append(mac("uniform", b_a=b_a, b_w=b_w, n=n))
    for kind, widths in (("pot", (2, 3, 4, 5)), ("post_dual", (3, 4, 5))):
        for n in FAN_INS:
            for b_a in (2, 3, 4, 6, 8):
                for b_w in widths:
                    if n < 9216 or (b_a in (4, 8) and b_w == 4):
                        found.append(mac(kind, b_a=b_a, b_w=b_w, n=n))
    for n in FAN_INS:
        for f in (0, 2, 4):
            for b_a in (2, 3, 4, 6, 8):
                for b_w in (3, 4, 5):
                    if n == 576 or (f == 2 and n == 9) or (f == 2 and b_a == 8 and b_w == 4):
                        found.append(mac("post_broadcast", b_a=b_a, b_w=b_w, n=n, f=f))
    for n in (9, 576):
        for b_a in (2, 3, 4, 6, 8):
            for b_w in (3, 4):
                found.append(mac("post_literal", b_a=b_a, b_w=b_w, n=n))
                places = (0, 2, 4) if n == 576 else (2,)
                found += [mac("post_table", b_a=b_a, b_w=b_w, n=n, f=f) for f in places]
    for b_a in (2, 4, 8):
        found += [mac("post_table", b_a=b_a, b_w=5, n=576, f=f) for f in (0, 4)]
    for kind in ("root3", "root4"):
        for n in (9, 576):
            for b_a in (4, 8):
                found += [mac(kind, b_a=b_a, b_w=b_w, n=n) for b_w in (4, 5, 6)]
    for level_bits in (6, 8):
        for n in FAN_INS:
            for b_a in (2, 4, 6, 8):
                for b_w in (2, 3, 4, 5):
                    if n < 9216 or b_a == 8:
                        codebook = mac("codebook", b_a=b_a, b_w=b_w, n=n, level_bits=level_bits)
                        found.append(codebook)
    for b_w in (6, 8):
        for n in (9, 576):
            found += [mac("codebook", b_a=b_a, b_w=b_w, n=n) for b_a in (4, 8)]
    for level_bits in (6, 8):
        for n in (9, 576):
            for b_a in (2, 4, 8):
                sizes = {"b_a": b_a, "b_w": 2, "n": n, "level_bits": level_bits}
                found.append(mac("codebook_loaded", **sizes))
    for n in (SMALLEST, 9, 576, 9216):
        for b_a in (2, 4, 8):
            for b_w in (2, 3, 4, 5):
                if n < 9216 or b_w < 5:
                    found.append(mac("codebook_bins", b_a=b_a, b_w=b_w, n=n))
    found += _smallest_fan_in()
    for width in (12, 16, 20, 24):
        found += [unit("constant_multiply", WIDTH=width, C=c) for c in (45, 181)]
        found += [unit("threshold_search", W=width, B=b) for b in (2, 3, 4, 8)]
    for width in (8, 12, 16, 20, 24, 30):
        found += [unit("requantize", W=width, M=m, SB=6, B=8) for m in (16, 24, 32)]
    for b_a in (2, 3, 4, 6, 8):
        found += [unit("post_prepare", B_A=b_a, F=f, C=c) for f in (0, 2, 4) for c in (45, 181)]
    found += [unit("codebook_decode", B_W=b, L=level) for b in (2, 3, 4, 5) for level in (6, 8)]
    return found


def _smallest_fan_in():
    """Four terms a sum, a 1x1 convolution of four channels."""
    found, n = [], SMALLEST
    kinds = {"uniform": (2, 3, 4, 5, 8), "pot": (2, 3, 4, 5), "post_dual": (3, 4, 5)}
    for b_a in (2, 4, 8):
        for kind, widths in kinds.items():
            found += [mac(kind, b_a=b_a, b_w=b_w, n=n) for b_w in widths]
        found += [mac("post_broadcast", b_a=b_a, b_w=b_w, n=n, f=2) for b_w in (3, 4, 5)]
        found += [mac("post_table", b_a=b_a, b_w=b_w, n=n, f=2) for b_w in (3, 4)]
        found += [mac("post_literal", b_a=b_a, b_w=b_w, n=n) for b_w in (3, 4)]
        found += [mac("codebook", b_a=b_a, b_w=b_w, n=n) for b_w in (3, 4, 5)]
        found.append(mac("codebook_loaded", b_a=b_a, b_w=2, n=n))
    for kind in ("root3", "root4"):
        found += [mac(kind, b_a=b_a, b_w=b_w, n=n) for b_a in (4, 8) for b_w in (4, 5, 6)]
    return found


def quick_designs():
    """One small circuit of each kind."""
    small = {"b_a": 3, "b_w": 3, "n": 9}
    found = [mac(kind, **small) for kind in ("uniform", "pot", "post_dual", "post_literal")]
    found += [mac(kind, **small, f=2) for kind in ("post_table", "post_broadcast")]
    found += [mac(kind, b_a=3, b_w=4, n=9) for kind in ("root3", "root4")]
    found += [mac("codebook", **small, level_bits=6), mac("codebook_bins", **small)]
    found.append(mac("codebook_loaded", b_a=3, b_w=2, n=9, level_bits=6))
    found += [unit("constant_multiply", WIDTH=12, C=181), unit("post_prepare", B_A=4, F=2, C=45)]
    found += [unit("threshold_search", W=12, B=3), unit("codebook_decode", B_W=3, L=6)]
    found.append(unit("requantize", W=12, M=16, SB=6, B=4))
    return found


def top_of(design):
    """Verilog of module `top`: the circuit with its parameters set and its outputs split."""
    values = dict(design.parameters)
    if design.rom:
        name, bits, words = design.rom
        packed = sum((w & (2**bits - 1)) << (bits * i) for i, w in enumerate(words))
        values[name] = f"{bits * len(words)}'h{packed:x}"
    settings = ", ".join(f".{k}({v})" for k, v in values.items())
    ports = [f"input [{bits - 1}:0] {name}" for name, bits in design.inputs.items()]
    ports += [f"output [{bits - 1}:0] {name}" for name, bits in design.outputs.items()]
    links = [f".{name}({name})" for name in design.inputs]
    if design.is_clocked:
        ports = ["input clk", "input clear", *ports]
        links += [".clk(clk)", ".clear(clear)"]
    if design.is_mac:
        links.append(f".acc({{{', '.join(reversed(design.outputs))}}})")
    else:
        links += [f".{name}({name})" for name in design.outputs]
    header = ",\n    ".join(ports)
    return f"""module top (
    {header}
);
    {design.module} #({settings}) unit (
        {", ".join(links)});
endmodule
"""
