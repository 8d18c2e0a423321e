"""Integer weights, input stages and the paper's table, against the quantizers they stand for."""

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from adq_search.convert import apply_policy_
from adq_search.errors import IntegerError
from adq_search.integer import register_words, snap_codebooks_, weight_words
from adq_search.integer._exact import ExactSum, Geometry
from adq_search.integer._fixed import Carrier
from adq_search.integer.inputs import Seen, input_stage, register_input_stage, seen_of
from adq_search.integer.shift_and_table import product_table, sqnr_db, table_sums
from adq_search.policy import LayerPrecision, Policy
from adq_search.quantizers import INPUT_QUANTIZERS, WEIGHT_QUANTIZERS, PostWeight
from tests.test_quantizers_powers import PowerContract, printed_levels, slow_power

SNAPPED = {"45/64": 45 / 64, "181/256": 181 / 256}


def made(name, bits, **options):
    torch.manual_seed(bits)
    weight = torch.randn(6, 3, 2, 2) * torch.rand(6, 1, 1, 1)
    momentum = 0.9 if WEIGHT_QUANTIZERS[name].has_codebook else None
    quantizer = WEIGHT_QUANTIZERS[name](bits, tuple(weight.shape), ema_momentum=momentum, **options)
    quantizer.initialize_(weight)
    return quantizer.eval(), weight


KINDS = [
    *(("lsq", b, {}) for b in (2, 4, 8)),
    ("lsq", 3, {"granularity": "tensor"}),
    *(("pot", b, {}) for b in (2, 4, 6)),
    *(("post", b, {}) for b in (2, 3, 4, 7)),
    ("post", 4, {"levels": "eq17", "granularity": "tensor"}),
    *(("post", 4, {"sqrt_half": root}) for root in SNAPPED),
    *(("root", 5, {"root": r}) for r in (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("name", "bits", "options"), KINDS, ids=str)
def test_words_times_their_unit_are_the_quantized_weights(name, bits, options):
    quantizer, weight = made(name, bits, **options)
    words = weight_words(quantizer, weight)
    wanted = quantizer(weight).detach().double()
    # What is left is the rounding of the float32 product level times threshold.
    torch.testing.assert_close(words.values(), wanted, rtol=4 * 2.0**-24, atol=0)
    assert all(bank.dtype == torch.int64 for bank in words.banks)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_post_has_a_bank_of_even_and_one_of_odd_exponents(bits):
    quantizer, weight = made("post", bits)
    words = weight_words(quantizer, weight)
    n_banks = 1 if bits == 2 else 2  # two bits leave exponent 0 alone
    assert words.constants == (1.0, math.sqrt(0.5))[:n_banks]
    assert not sum(bank != 0 for bank in words.banks).gt(1).any()
    for bank in words.banks:
        magnitudes = bank.abs()[bank != 0].double()
        assert torch.log2(magnitudes).frac().eq(0).all()


@pytest.mark.parametrize("root", SNAPPED)
def test_a_snapped_root_makes_the_two_accumulators_one_integer(root):
    """64 E + 45 O, the dual accumulators with the constant multiplication, is one exact sum."""
    numerator, denominator = map(int, root.split("/"))
    exact, weight = made("post", 4)
    snapped, _ = made("post", 4, sqrt_half=root)
    snapped.load_state_dict(exact.state_dict())
    signs = weight_words(snapped, weight).banks[0].sign()
    codes = snapped.codes(weight)
    halves = snapped.exponents.long()[codes]
    even = signs * 2 ** (3 - halves // 2) * (halves % 2 == 0)
    odd = signs * 2 ** (3 - halves // 2) * (halves % 2 == 1)
    inputs = torch.randint(0, 16, (2, 3, 5, 5))
    geometry = Geometry((1, 1), (1, 1), (0,) * 4)
    sums = [
        ExactSum(w, geometry, 15, "layer").slow(inputs)
        for w in (even, odd, weight_words(snapped, weight).banks[0])
    ]
    assert torch.equal(denominator * sums[0] + numerator * sums[1], sums[2])


class TestSnappedPost(PowerContract):
    """The quantizer's contract with the snapped levels, from the printed formula."""

    quantizer_class = PostWeight
    options: ClassVar = {"sqrt_half": "45/64"}

    def slow_pass(self, quantizer, values, upstream):
        levels = [
            math.copysign(abs(v) * (SNAPPED["45/64"] / math.sqrt(0.5)) ** _is_odd(v), v)
            for v in printed_levels(quantizer.bits, math.sqrt(2), "b_bit")
        ]
        thresholds = quantizer.threshold.flatten().tolist()
        return slow_power(levels, thresholds, 18, values, upstream)


def _is_odd(level):
    return level != 0 and round(-2 * math.log2(abs(level))) % 2 == 1


def test_powers_that_no_integer_holds_are_refused():
    quantizer, weight = made("pot", 8)
    weight[0, 0, 0, 0] = 1e-30
    quantizer.threshold.data.fill_(1.0)
    weight[0, 0, 0, 1] = 2.0**-60
    with pytest.raises(IntegerError, match=r"'pot' at 8 bits .* Give fewer weight bits"):
        weight_words(quantizer, weight)


def test_codebooks_are_snapped_to_words_of_eight_bits():
    network = nn.Sequential(nn.Linear(40, 30))
    policy = Policy.of({"0": LayerPrecision(4, 4, "adq", 0.99)})
    apply_policy_(network, policy, torch.randn(20, 40))
    network.eval()
    moves = snap_codebooks_(network)
    assert 0 < moves["0"] <= 0.5 / 127 + 1e-6
    quantizer = network[0].weight_quantizer
    words = weight_words(quantizer, network[0].weight)
    assert int(words.banks[0].abs().max()) == 127
    wanted = quantizer(network[0].weight).detach().double()
    torch.testing.assert_close(words.values(), wanted, rtol=4 * 2.0**-24, atol=0)
    assert snap_codebooks_(network)["0"] < 1e-6
    assert 0.1 < snap_codebooks_(network, level_bits=3)["0"] <= 0.5 / 3 + 1e-6
    assert len(quantizer.codebook.unique()) == 7


def fitted_input(name, bits, values):
    quantizer = INPUT_QUANTIZERS[name](bits, n_channels=values.shape[1], channel_dim=-3)
    quantizer.initialize_(values)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
    return quantizer.eval()


@pytest.mark.parametrize("is_signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["lsq", "asq", "n2uq"])
def test_input_codes_are_those_of_the_quantizer(name, bits, is_signed):
    torch.manual_seed(bits)
    carrier = Carrier(unit=2.0**-24, bound=2**30)
    whole = torch.randint(-(2**25) if is_signed else 0, 2**26, (64, 12, 4, 4))
    # Exact in float64, so that only the boundaries of codes are left to differ.
    values = whole.double() * carrier.unit
    quantizer = fitted_input(name, bits, values).double()
    stage = input_stage(quantizer, carrier, seen_of(quantizer, values))
    factors = () if stage.factor is None else (stage.factor(whole),)
    slow = stage.codes(whole, *factors)
    fast = stage.codes(whole.double(), *factors)
    assert fast.dtype == stage.code_dtype == (torch.int8 if is_signed else torch.uint8)
    assert torch.equal(slow, fast.long())
    assert int((slow != quantizer.codes(values)).sum()) <= 1
    assert (stage.lowest, stage.lowest + 2**bits - 1) == (quantizer.lowest_code, stage.highest)


def test_the_factor_of_asq_is_the_adapters():
    torch.manual_seed(0)
    carrier = Carrier(unit=2.0**-24, bound=2**30)
    whole = torch.randint(0, 2**26, (16, 12, 4, 4))
    values = whole.double() * carrier.unit
    quantizer = fitted_input("asq", 4, values).double()
    factor = input_stage(quantizer, carrier, seen_of(quantizer, values)).factor
    found = factor(whole).double() * 2.0**-factor.fraction_bits
    torch.testing.assert_close(found, quantizer.factors(values).detach(), rtol=1e-6, atol=0)
    assert float(found.max()) <= factor.limit


def test_quantizers_without_an_integer_form_are_named():
    quantizer, weight = made("lsq", 4)
    quantizer.name = "other"
    with pytest.raises(IntegerError, match=r"'other' has none.*register_words.*Known: adq, lsq"):
        weight_words(quantizer, weight)
    inputs = fitted_input("lsq", 4, torch.rand(2, 3, 4, 4))
    inputs.name = "other"
    with pytest.raises(IntegerError, match=r"'other' has none.*Known: asq, lsq, n2uq"):
        input_stage(inputs, Carrier(1.0, 1), Seen((2, 3, 4, 4)))
    for register in (register_words, register_input_stage):
        with pytest.raises(IntegerError, match="already"):
            register("lsq")(weight_words)


def test_the_papers_table_for_three_bits():
    """Eq. 18: 8 input codes, 4 exponents; odd columns are looked up, even ones are shifts."""
    table = product_table(4, 2, lowest=0, highest=7)
    assert table.shape == (8, 4)
    assert table[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert table[:, 1].tolist() == [0, 1, 1, 2, 3, 4, 4, 5]
    assert table[:, 2].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table[:, 3].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    signed = product_table(3, 2, lowest=-4, highest=3)
    assert signed[:, 2].tolist() == [-2, -2, -1, -1, 0, 0, 1, 1]


def test_fraction_bits_buy_six_decibels_each():
    """The shipped rule (hardware notes 2.4): about 6.1 dB a bit, since only rounding errs."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(576, 64, bias=False))
    nn.init.normal_(network[0].weight)
    inputs = torch.randn(256, 576).relu()
    policy = Policy.of({"0": LayerPrecision(4, 4, "post")})
    layer = apply_policy_(network, policy, inputs).eval()[0]
    codes = layer.input_quantizer.codes(inputs)
    words = weight_words(layer.weight_quantizer, layer.weight)
    wanted = codes.double() @ words.values().T
    found = {}
    for bits in (0, 2, 4, 6, 8):
        sums = table_sums(layer, "0", fraction_bits=bits)
        slow, fast = sums.slow(codes), sums.fast(codes.float())
        assert torch.equal(slow.double(), fast)
        assert (slow.abs().amax(0) <= sums.bounds).all()
        found[bits] = sqnr_db(wanted, slow * sums.unit)
    assert 5 < found[0] < 20  # the literal mode loses more than its 4-bit inputs did
    for bits in (4, 6, 8):
        assert 10.5 < found[bits] - found[bits - 2] < 15.5
    assert sqnr_db(wanted, wanted) == math.inf


def test_the_table_is_for_powers_only():
    network = nn.Sequential(nn.Linear(4, 3))
    apply_policy_(network, Policy.of({"0": LayerPrecision(4, 4, "lsq")}), torch.rand(5, 4))
    with pytest.raises(IntegerError, match=r"Layer 'fc': shifts and a table .*'lsq'"):
        table_sums(network[0], "fc")
