"""What each circuit must compute: widths and exact int64 arithmetic, written from the definitions.

Notation:
    b_a, b_w     bits of an unsigned input code and of a weight code
    N            terms of one sum (fan-in)
    k            exponent of a weight +-root2^-k or +-2^(-k/r); k all ones means zero
    S            largest left shift, floor(k_max / r), with k_max = 2^(b_w - 1) - 2
    f            fraction bits of a / sqrt 2
    W            bits of an accumulator (each of them) that no sum of N terms overflows

Nothing here is imported from `adq_search`: the tests compare the two.
"""

from math import isqrt

import numpy as np

CONSTANTS = {181: 8, 45: 6}  # sqrt(1/2) is about 181 / 2^8 or 45 / 2^6


def growth(n_terms):
    """Bits that a sum of n terms needs beyond one term: ceil(log2 n)."""
    return int(np.ceil(np.log2(n_terms)))


def largest_shift(b_w, root):
    return (2 ** (b_w - 1) - 2) // root


def accumulator_width(kind, *, b_a, b_w, n, f=0, root=2, level_bits=8):
    """W of section 2.2 of the hardware notes."""
    if kind == "uniform":
        return b_a + b_w + growth(n)
    if kind in ("codebook", "codebook_loaded"):
        return b_a + level_bits + growth(n)
    if kind == "codebook_bins":
        return b_a + growth(n)
    if kind == "post_literal":
        return b_a + 1 + growth(n)
    return b_a + largest_shift(b_w, root) + f + 1 + growth(n)


def signed(codes, bits):
    """Two's-complement value of unsigned codes."""
    codes = np.asarray(codes, dtype=np.int64)
    return codes - ((codes >> (bits - 1)) << bits)


def sign_and_exponent(codes, b_w):
    """Return the weight's sign (0 where it is zero) and its exponent k."""
    codes = np.asarray(codes, dtype=np.int64)
    k = codes & (2 ** (b_w - 1) - 1)
    is_zero = k == 2 ** (b_w - 1) - 1
    return np.where(is_zero, 0, 1 - 2 * (codes >> (b_w - 1))), k


def root_half(a, f):
    """round(a 2^f / sqrt 2), ties impossible: the square root is irrational but at 0."""
    return np.array([(1 + isqrt(2 * int(v) ** 2 * 4**f)) // 2 for v in np.ravel(a)], dtype=np.int64)


def root_prepared(a, f, constant):
    """a times the dyadic constant, f fraction bits kept, rounded half up."""
    t = CONSTANTS[constant]
    return (np.asarray(a, dtype=np.int64) * constant * 2**f + 2 ** (t - 1)) >> t


def literal(a, k):
    """Eq. 18: integers shifted right at even k, a table of rounded integers at odd k."""
    table = [(1 + isqrt((4 * int(v) ** 2) >> int(e))) // 2 for v, e in zip(a, k, strict=True)]
    return np.where(k % 2 == 0, a >> (k // 2), np.array(table, dtype=np.int64))


def terms(design, inputs):
    """What one multiply-accumulate adds to each accumulator; shape (steps, accumulators)."""
    a, code = inputs["a"], inputs["code"]
    p = design.parameters
    if design.kind == "uniform":
        return (a * signed(code, p["B_W"]))[:, None]
    if design.kind == "codebook":
        words = np.array(design.levels, dtype=np.int64)
        return (a * words[code])[:, None]
    if design.kind == "codebook_loaded":
        return (a * signed(words_of(inputs["words"], p["L"], code), p["L"]))[:, None]
    if design.kind == "codebook_bins":
        return np.where(code[:, None] == np.arange(2 ** p["B_W"]), a[:, None], 0)
    sign, k = sign_and_exponent(code, p["B_W"])
    if design.kind == "post_literal":
        return (sign * literal(a, k))[:, None]
    root = p.get("ROOT", 2)
    shift = largest_shift(p["B_W"], root)
    scale = np.int64(1) << (shift - np.minimum(k // root, shift))  # beyond k_max lies only zero
    if design.kind in ("post_broadcast", "post_table"):
        f = p["F"]
        odd = inputs["a_root"] if "a_root" in inputs else root_half(a, f)
        return (sign * np.where(k % 2 == 1, odd, a << f) * scale)[:, None]
    return np.where((k % root)[:, None] == np.arange(root), (sign * a * scale)[:, None], 0)


def outputs(design, inputs):
    """Outputs after every step, by port name, as unsigned codes of the port's width."""
    p = design.parameters
    if design.is_mac:
        added = np.cumsum(terms(design, inputs), axis=0)
        starts = np.flatnonzero(inputs["first"])
        before = np.vstack([np.zeros_like(added[:1]), added[:-1]])[starts]
        sums = added - before[np.cumsum(inputs["first"]) - 1]
        return {f"acc{j}": sums[:, j] & (2**design.width - 1) for j in range(sums.shape[1])}
    if design.kind == "constant_multiply":
        product = signed(inputs["x"], p["WIDTH"]) * p["C"]
        return {"product": product & (2 ** (p["WIDTH"] + CONSTANTS[p["C"]]) - 1)}
    if design.kind == "post_prepare":
        return {"a_root": root_prepared(inputs["a"], p["F"], p["C"])}
    if design.kind == "codebook_decode":
        return {"word": words_of(inputs["words"], p["L"], inputs["code"])}
    if design.kind == "requantize":
        product = signed(inputs["x"], p["W"]) * inputs["m"]
        shifted = (product + ((np.int64(1) << inputs["s"]) >> 1)) >> inputs["s"]
        return {"y": np.clip(shifted, 0, 2 ** p["B"] - 1)}
    return search(design, inputs)


def words_of(packed, bits, codes):
    """The code-th word of each packed table (Python integers: tables are wider than 64 bits)."""
    mask = 2**bits - 1
    picked = [(int(t) >> (bits * int(c))) & mask for t, c in zip(packed, codes, strict=True)]
    return np.array(picked, dtype=np.int64)


def search(design, inputs):
    """Codes and next addresses of a binary search; at its end the code is the number of T < x."""
    b, w = design.parameters["B"], design.parameters["W"]
    is_above = signed(inputs["x"], w) > signed(inputs["threshold"], w)
    codes, addresses, code, step = [], [], 0, 0
    for first, above in zip(inputs["first"], is_above, strict=True):
        if first:
            code, step = 0, 2 ** (b - 1)
        code |= step * int(above)
        step >>= 1
        codes.append(code)
        addresses.append(code | step)
    return {"code": np.array(codes), "address": np.array(addresses)}
