"""Input vectors: exhaustive or random ones with corners for proofs, Gaussian ones for energy."""

from itertools import product

import numpy as np
from reference import root_prepared, sign_and_exponent, signed

EXHAUSTIVE_BITS = 16
REPEATED_BITS = 10
SMALLEST_N = 9
N_SEARCHES = 400
ROOT_CONSTANT = 181


def random_codes(rng, bits, count):
    """Unsigned random codes; Python integers where they pass 62 bits."""
    if bits <= 62:
        return rng.integers(0, 2**bits, count, dtype=np.int64)
    words = rng.integers(0, 2**32, (count, -(-bits // 32)), dtype=np.uint64)
    mask = 2**bits - 1
    codes = [sum(int(w) << (32 * i) for i, w in enumerate(row)) & mask for row in words]
    return np.array(codes, dtype=object)


def free_bits(design):
    """Bits of the inputs that can be chosen: `a_root` follows from `a`."""
    return sum(bits for name, bits in design.inputs.items() if name != "a_root")


def single_vectors(design, seed, *, n_random, exhaustive_bits=EXHAUSTIVE_BITS):
    """Every input if there are at most 2^exhaustive_bits, in Gray order; else random ones.

    The first half of the random ones holds the corners of one input at a time.
    """
    rng = np.random.default_rng(seed)
    free = {k: v for k, v in design.inputs.items() if k != "a_root"}
    if free_bits(design) <= exhaustive_bits:
        index, place, inputs = np.arange(2 ** free_bits(design)), 0, {}
        codes = index ^ (index >> 1)
        for name, bits in free.items():
            inputs[name] = (codes >> place) & (2**bits - 1)
            place += bits
    else:
        inputs = {name: random_codes(rng, bits, n_random) for name, bits in free.items()}
        narrow = {name: bits for name, bits in free.items() if bits <= 62}
        corners = [
            (name, c)
            for name, bits in narrow.items()
            for c in (0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        ]
        each = max(1, n_random // 2 // max(1, len(corners)))
        for i, (name, corner) in enumerate(corners):
            inputs[name][i * each : (i + 1) * each] = corner
        extremes = [(0, 2**bits - 1, 2 ** (bits - 1)) for bits in narrow.values()]
        for i, values in enumerate(product(*extremes)):
            for name, value in zip(narrow, values, strict=True):
                inputs[name][-1 - i] = value
    if design.kind == "requantize":
        inputs["s"] = np.minimum(inputs["s"], design.inputs["x"] + design.inputs["m"] - 1)
    return _with_prepared(design, inputs)


def icarus_vectors(design, seed):
    """Vectors for the Verilog: single ones, then for accumulators whole sums of N terms.

    Sums of an N above the smallest share their products with it: there the single vectors are
    random, and every product of the netlist is tried.

    Returns:
        Inputs by port; for clocked circuits also `first` (1 where a new sum starts).
    """
    rng = np.random.default_rng(seed)
    if design.kind == "threshold_search":
        return _searches(design, rng, N_SEARCHES)
    n = design.parameters.get("N")
    full = EXHAUSTIVE_BITS if n in (None, SMALLEST_N) else REPEATED_BITS
    n_random = 128 if design.kind == "requantize" else 1024
    inputs = single_vectors(design, seed, n_random=n_random, exhaustive_bits=full)
    if not design.is_mac:
        return inputs
    inputs["first"] = np.ones(len(inputs["a"]), dtype=np.int64)
    for a, code in _long_sums(design, rng, n):
        first = np.zeros(len(a), dtype=np.int64)
        first[0] = 1
        inputs["a"] = np.concatenate([inputs["a"], a])
        inputs["code"] = np.concatenate([inputs["code"], code])
        if "words" in inputs:
            inputs["words"] = np.concatenate([inputs["words"], np.full(len(a), _packed(design))])
        inputs["first"] = np.concatenate([inputs["first"], first])
    return _with_prepared(design, inputs)


def _packed(design):
    """The level words as one integer, code 0 in the lowest bits."""
    bits = design.parameters["L"]
    return sum((w & (2**bits - 1)) << (bits * i) for i, w in enumerate(design.levels))


def _with_prepared(design, inputs):
    if "a_root" in design.inputs:
        inputs["a_root"] = root_prepared(inputs["a"], design.parameters["F"], ROOT_CONSTANT)
    return inputs


def _long_sums(design, rng, n):
    """Sums of N terms: the largest input times every extreme weight, then random ones."""
    b_a, b_w = design.inputs["a"], design.inputs["code"]
    largest = np.full(n, 2**b_a - 1)
    # Most negative and most positive weight: two's complement, sign and exponent, level words.
    extremes = {2 ** (b_w - 1), 2 ** (b_w - 1) - 1, 0, 2**b_w - 2}
    for code in sorted(extremes):
        yield largest, np.full(n, code)
    n = min(n, 1024)
    for _ in range(2):
        yield rng.integers(0, 2**b_a, n), rng.integers(0, 2**b_w, n)


def _searches(design, rng, n_searches):
    """Searches of random values in random sorted thresholds; values on thresholds among them."""
    b, w = design.parameters["B"], design.parameters["W"]
    rows = {"x": [], "threshold": [], "first": []}
    for i in range(n_searches):
        thresholds = np.sort(rng.integers(-(2 ** (w - 1)), 2 ** (w - 1), 2**b - 1))
        x = int(rng.integers(-(2 ** (w - 1)), 2 ** (w - 1)))
        if i % 4 == 0:
            x = int(thresholds[rng.integers(len(thresholds))])
        code = 0
        for j in range(b):
            address = code | 2 ** (b - 1 - j)
            rows["x"].append(x)
            rows["threshold"].append(int(thresholds[address - 1]))
            rows["first"].append(int(j == 0))
            code = address if x > thresholds[address - 1] else code
        if code != np.count_nonzero(thresholds < x):
            msg = "the binary search must count the thresholds below x"
            raise AssertionError(msg)
    mask = 2**w - 1
    found = {k: np.array(v, dtype=np.int64) for k, v in rows.items()}
    return {**found, "x": found["x"] & mask, "threshold": found["threshold"] & mask}


def energy_vectors(design, seed, lanes, steps):
    """Operands of `lanes` independent units over `steps` clocks, as arrays (steps, lanes).

    Inputs are a rectified Gaussian in unsigned codes clipped at 3 sigma, weights a Gaussian on the
    scheme's levels at the clipping threshold of least squared error; a new weight every clock.
    """
    rng = np.random.default_rng(seed)
    shape = (steps, lanes)
    if design.kind == "threshold_search":
        b = design.parameters["B"]
        found = _searches(design, rng, lanes * (steps // b))
        return {
            k: v.reshape(steps // b, lanes, b).transpose(0, 2, 1).reshape(-1, lanes)
            for k, v in found.items()
        }
    found = {}
    for name, bits in design.inputs.items():
        if name == "a":
            top = 2**bits - 1
            real = rng.standard_normal(shape) * top / 3
            found[name] = np.clip(np.rint(real), 0, top).astype(np.int64)
        elif name == "code" and design.is_mac:
            found[name] = _weight_codes(design, rng, shape)
        elif name != "a_root":
            found[name] = np.reshape(random_codes(rng, bits, steps * lanes), shape)
    if design.kind == "codebook_loaded":
        found["words"] = np.full(shape, _packed(design))
    if design.kind == "codebook_decode":  # the table stays, the codes change
        found["words"] = np.repeat(found["words"][:1], steps, axis=0)
    if design.kind == "requantize":  # multiplier and shift stay for a layer
        found["m"] = np.repeat(found["m"][:1] | 2 ** (design.inputs["m"] - 1), steps, axis=0)
        found["s"] = np.full(
            shape, design.inputs["x"] + design.inputs["m"] - 1 - design.outputs["y"]
        )
    return _with_prepared(design, found)


def _weight_codes(design, rng, shape):
    levels = weight_levels(design)
    codes, values = np.array(list(levels)), np.array(list(levels.values()))
    order = np.argsort(values)
    codes, values = codes[order], values[order] / np.abs(values).max()
    sample = np.sort(rng.standard_normal(20_000))
    clips = np.linspace(0.5, 6.0, 56)
    errors = [np.mean((sample - c * values[_nearest(sample / c, values)]) ** 2) for c in clips]
    clip = clips[int(np.argmin(errors))]
    return codes[_nearest(rng.standard_normal(shape) / clip, values)]


def _nearest(x, values):
    return np.searchsorted((values[1:] + values[:-1]) / 2, x)


def weight_levels(design):
    """Real value of each weight code that is used, one code a value."""
    b_w = design.inputs["code"]
    codes = np.arange(2**b_w)
    if design.kind == "uniform":
        values = signed(codes, b_w)
        return {int(c): float(values[c]) for c in codes if c != 2 ** (b_w - 1)}
    if design.levels:
        return {int(c): float(design.levels[c]) for c in codes[:-1]}
    root = design.parameters.get("ROOT", 2)
    sign, k = sign_and_exponent(codes, b_w)
    values = sign * 2.0 ** (-k / root)
    return {int(c): float(values[c]) for c in codes[:-1]}  # the last code is the other zero
