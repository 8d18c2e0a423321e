"""Guarantee (a): every sum equals slow int64 arithmetic, exactly."""

import copy
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adq_search.errors import IntegerError
from adq_search.integer._exact import EXACT_FLOAT32, ExactSum, Geometry, exact_float32
from adq_search.integer._int8 import Int8Convolution, code_dtype, has_exact_int8


def loops(codes, words, geometry):
    """The definition of a convolution, in NumPy int64, one output at a time."""
    codes, words = codes.numpy().astype(np.int64), words.numpy().astype(np.int64)
    if not geometry.stride:
        return np.einsum("...i,oi->...o", codes, words)
    pads = [(0, 0), (0, 0)]
    pads += list(zip(geometry.pads[0::2], geometry.pads[1::2], strict=True))[::-1]
    codes = np.pad(codes, pads)
    n_out, per_group, *kernel = words.shape
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, geometry.dilation, strict=True)]
    space = [(size - r) // s + 1 for size, r, s in zip(codes.shape[2:], reach, geometry.stride)]
    out = np.zeros((len(codes), n_out, *space), dtype=np.int64)
    for o in range(n_out):
        group = o // (n_out // geometry.groups)
        inputs = codes[:, group * per_group : (group + 1) * per_group]
        for place in itertools.product(*map(range, space)):
            window = tuple(
                slice(p * s, p * s + r, d)
                for p, s, r, d in zip(place, geometry.stride, reach, geometry.dilation)
            )
            products = inputs[(slice(None), slice(None), *window)] * words[o]
            out[(slice(None), o, *place)] = products.reshape(len(codes), -1).sum(1)
    return out


@st.composite
def layers(draw):
    """Codes, words and geometry of a random layer: grouped, depthwise, strided, dilated."""
    n_dims = draw(st.integers(0, 2))
    groups = 1 if n_dims == 0 else draw(st.integers(1, 3))
    per_group, out_per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(n_dims)]
    stride = tuple(draw(st.integers(1, 2)) for _ in range(n_dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(n_dims))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(2 * n_dims))
    space = [(k - 1) * d + draw(st.integers(1, 4)) for k, d in zip(kernel, dilation, strict=True)]
    word_bits = draw(st.sampled_from([2, 8, 14, 18, 30]))
    code_bits = draw(st.integers(2, 8))
    is_signed = draw(st.booleans())
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low = -(2 ** (code_bits - 1)) if is_signed else 0
    high = low + 2**code_bits - 1
    codes = torch.randint(low, high + 1, (2, groups * per_group, *space), generator=random)
    words = torch.randint(
        -(2 ** (word_bits - 1)),
        2 ** (word_bits - 1),
        (groups * out_per_group, per_group, *kernel),
        generator=random,
    )
    geometry = Geometry(stride, dilation, pads, "constant", groups)
    return codes, ExactSum(words, geometry, max(abs(low), high), "layer")


@given(layers())
@settings(deadline=None, max_examples=150)
def test_sums_are_those_of_the_definition(layer):
    codes, sums = layer
    wanted = loops(codes, sums.words, sums.geometry)
    with exact_float32():
        fast = sums.fast(codes.float())
    np.testing.assert_array_equal(fast.double().numpy(), wanted.astype(np.float64))
    np.testing.assert_array_equal(sums.slow(codes).numpy(), wanted)
    largest = np.abs(wanted).max(axis=(0, *range(2, wanted.ndim))) if wanted.size else 0
    assert (largest <= sums.bounds.numpy()).all()


@given(layers())
@settings(deadline=None, max_examples=50)
def test_channels_are_split_so_that_every_part_is_exact(layer):
    _, sums = layer
    assert [c for pair in sums.chunks for c in range(*pair)] == list(range(sums.words.shape[1]))
    if not sums.is_wide:
        for start, stop in sums.chunks:
            norms = sums.words[:, start:stop].abs().flatten(1).sum(1)
            assert int(norms.max()) * sums.max_code < EXACT_FLOAT32


@pytest.mark.parametrize(
    ("channels", "word", "n_chunks", "is_wide"),
    [(1040, 127, 19, False), (57, 127, 1, False), (58, 127, 2, False), (3, 2**20, 1, True)],
    ids=["many channels", "just one part", "one channel more", "float64"],
)
def test_the_largest_sums_are_exact(channels, word, n_chunks, is_wide):
    """The worst case: every code and word at its largest; 2^24 / (255 * 127 * 9) is 57.6."""
    words = torch.full((2, channels, 3, 3), word)
    words[1] = -words[1]
    geometry = Geometry((1, 1), (1, 1), (1, 1, 1, 1))
    sums = ExactSum(words, geometry, 255, "layer")
    assert (len(sums.chunks), sums.is_wide) == (n_chunks, is_wide)
    codes = torch.full((1, channels, 5, 5), 255)
    with exact_float32():
        assert torch.equal(sums.fast(codes.float()).long(), sums.slow(codes))
    assert int(sums.slow(codes).max()) == 255 * word * 9 * channels == int(sums.bounds.max())


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_no_fast_algorithm_and_no_reduced_precision_is_taken(kernel):
    """Shapes that invite Winograd, Fourier transforms and bfloat16 units, and words to show it."""
    random = torch.Generator().manual_seed(kernel)
    words = torch.randint(-999, 1000, (64, 64, kernel, kernel), generator=random)
    pads = (kernel // 2,) * 4
    sums = ExactSum(words, Geometry((1, 1), (1, 1), pads), 15, "layer")
    assert len(sums.chunks) > 0
    codes = torch.randint(0, 16, (4, 64, 16, 16), generator=random)
    dense = ExactSum(words[:, :, 0, 0], Geometry(), 15, "dense")
    held = torch.backends.mkldnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    try:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        torch.set_float32_matmul_precision("medium")
        with exact_float32(), torch.autocast("cpu", enabled=False):
            assert torch.equal(sums.fast(codes.float()).long(), sums.slow(codes))
            rows = codes.permute(0, 2, 3, 1)
            assert torch.equal(dense.fast(rows.float()).long(), dense.slow(rows))
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.conv.fp32_precision = held[0]
        torch.set_float32_matmul_precision(held[1])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4),
        nn.Conv2d(3, 2, (1, 3), padding=(0, 2), padding_mode="reflect"),
        nn.Linear(5, 3),
    ],
    ids=["conv1d", "depthwise same", "reflect", "linear"],
)
def test_geometry_is_that_of_the_torch_layer(layer):
    random = torch.Generator().manual_seed(0)
    words = torch.randint(-7, 8, layer.weight.shape, generator=random)
    shape = {nn.Conv1d: (2, 4, 9), nn.Linear: (2, 7, 5)}.get(type(layer))
    shape = shape or (2, layer.in_channels, 8, 9)
    codes = torch.randint(0, 16, shape, generator=random)
    with torch.no_grad():
        layer.double().weight.copy_(words)
        layer.bias.zero_()
        wanted = layer(codes.double())
    sums = ExactSum(words, Geometry.of(layer), 15, "layer")
    with exact_float32():
        assert torch.equal(sums.fast(codes.float()).double(), wanted)
    assert torch.equal(sums.slow(codes).double(), wanted)


def test_sums_that_nothing_holds_exactly_are_refused():
    with pytest.raises(IntegerError, match=r"Layer 'conv': .* below 2\^53.* fewer weight bits"):
        ExactSum(torch.full((1, 2, 1), 2**50), Geometry((1,), (1,), (0, 0)), 255, "conv")


def int8_part(sums):
    """The layer's int8 convolution, or None where it has none."""
    (part,) = sums._parts
    return part if isinstance(part, Int8Convolution) else None


@st.composite
def byte_layers(draw):
    """Layers that int8 convolutions take: square, not dilated, codes and words of 8 bits."""
    groups, size = draw(st.sampled_from([1, 2, 3, 8])), draw(st.sampled_from([1, 2, 3, 5]))
    per_group, out_per_group = draw(st.sampled_from([1, 3, 8, 17])), draw(st.sampled_from([1, 4]))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, size // 2))
    space = [size + draw(st.integers(0, 9)) for _ in range(2)]
    lowest = draw(st.sampled_from([0, -128]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 3)), groups * per_group, *space)
    codes = torch.randint(lowest, lowest + 256, shape, generator=random)
    shape = (groups * out_per_group, per_group, size, size)
    words = torch.randint(-128, 128, shape, generator=random)
    if draw(st.booleans()):  # everything at its end
        codes.fill_(draw(st.sampled_from([lowest, lowest + 255])))
        words.fill_(draw(st.sampled_from([-128, 127])))
    geometry = Geometry((stride,) * 2, (1, 1), (padding,) * 4, "constant", groups)
    dtype = code_dtype(lowest, lowest + 255)
    return codes, ExactSum(words, geometry, max(-lowest, lowest + 255), "layer", dtype)


@given(byte_layers(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_sums_of_bytes_are_exact(layer, is_channels_last):
    codes, sums = layer
    given = codes.to(sums.code_dtype)
    if is_channels_last:
        given = given.contiguous(memory_format=torch.channels_last)
    wanted = sums.slow(codes)
    with exact_float32():
        assert torch.equal(sums.fast(given).long(), wanted)
        assert torch.equal(sums.fast(codes.float()).long(), wanted)
    for part in sums._parts:
        if isinstance(part, Int8Convolution):
            assert all(part._agrees.values())


@pytest.mark.skipif(not has_exact_int8(), reason="this processor has no exact int8 convolutions")
@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"dilation": (2, 2)}, False),
        ({"stride": (1, 2)}, False),
        ({"pads": (1, 1, 0, 0)}, False),
        ({"pads": (2, 2, 2, 2)}, False),
        ({"pad_mode": "reflect"}, False),
        ({"word": 128}, False),
        ({"max_code": 256}, False),
    ],
    ids=["common", "dilated", "strides", "uneven", "wide padding", "reflect", "word", "code"],
)
def test_int8_convolutions_take_common_layers_of_bytes_only(change, is_taken):
    """oneDNN is wrong, or crashes, for some of the others."""
    place = {"stride": (1, 1), "dilation": (1, 1), "pads": (1,) * 4, "pad_mode": "constant"}
    words = torch.full((4, 4, 3, 3), change.get("word", 127))
    geometry = Geometry(**{name: change.get(name, value) for name, value in place.items()})
    max_code = change.get("max_code", 255)
    sums = ExactSum(words, geometry, max_code, "layer", code_dtype(0, max_code))
    assert (int8_part(sums) is not None) == is_taken
    codes = torch.full((2, 4, 6, 7), max_code)
    with exact_float32():
        assert torch.equal(sums.fast(codes.float()).long(), sums.slow(codes))


@pytest.mark.skipif(not has_exact_int8(), reason="this processor has no exact int8 convolutions")
def test_an_int8_convolution_that_is_wrong_is_found_out_and_left():
    sums = ExactSum(torch.full((2, 1, 1, 1), 3), Geometry((1, 1), (1, 1), (0,) * 4), 15, "layer")
    part = int8_part(sums)
    part.raw = lambda codes: codes.float().repeat(1, 2, 1, 1)
    codes = torch.full((1, 1, 2, 2), 15)
    with exact_float32():
        for _ in range(2):
            assert torch.equal(sums.fast(codes.float()).long(), sums.slow(codes))
    assert part._agrees == {codes.shape: False}


def test_sums_that_were_used_can_be_copied():
    sums = ExactSum(torch.full((2, 1, 1, 1), 3), Geometry((1, 1), (1, 1), (0,) * 4), 15, "layer")
    codes = torch.full((1, 1, 2, 2), 15)
    with exact_float32():
        sums.fast(codes.float())
        assert torch.equal(copy.deepcopy(sums).fast(codes.float()).long(), sums.slow(codes))


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_sums_of_bytes_are_exact_on_older_processors(instructions):
    """Where 16-bit sums saturate, the int8 convolutions must not be taken."""
    program = (
        "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', "
        f"{__file__!r}, '-k', 'bytes and not older']))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-2000:]
