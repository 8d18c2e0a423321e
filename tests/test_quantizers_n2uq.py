import pytest
import torch
from torch import Tensor

from adq_search.quantizers import LsqInput, N2uqInput, Quantizer
from adq_search.testing import InputQuantizerContract


def surrogate(x: float, start: float, widths: list[float], in_scale: float) -> float:
    """g of Liu et al. 2022: piecewise linear, rising by D over each interval."""
    d = 2 / len(widths)
    scaled, left = in_scale * x, start
    if scaled <= start:
        return 0.0
    for i, a in enumerate(widths):
        if scaled <= left + a:
            return d * i + d * (scaled - left) / a
        left += a
    return 2.0


class N2uqContract(InputQuantizerContract):
    quantizer_class = N2uqInput

    def slow_pass(self, quantizer: Quantizer, values: list[float], upstream: list[float]):
        start, widths = quantizer.start.item(), quantizer.widths.tolist()
        beta_1, beta_2 = quantizer.in_scale.item(), quantizer.out_scale.item()
        offset = -(2 ** (quantizer.bits - 1)) if self.is_signed else 0
        m = len(widths)
        d = 2 / m
        thresholds, left = [], start
        for a in widths:
            thresholds.append(left + a / 2)
            left += a
        outputs, to_values = [], []
        to_start, to_widths, to_beta_1, to_beta_2 = 0.0, [0.0] * m, 0.0, 0.0
        for x, r in zip(values, upstream, strict=True):
            scaled = beta_1 * x
            q = d * (sum(scaled > t for t in thresholds) + offset)
            outputs.append(beta_2 * q)
            to_beta_2 += r * q
            left, slope = start, 0.0
            for i, a in enumerate(widths):
                if left < scaled <= left + a:
                    slope = d / a
                    to_start -= r * beta_2 * slope
                    for j in range(i):
                        to_widths[j] -= r * beta_2 * slope
                    to_widths[i] -= r * beta_2 * d * (scaled - left) / a**2
                left += a
            to_beta_1 += r * beta_2 * slope * x
            to_values.append(r * beta_2 * slope * beta_1)
        return outputs, {
            "values": to_values,
            "start": [to_start],
            "widths": to_widths,
            "in_scale": [to_beta_1],
            "out_scale": [to_beta_2],
        }


class TestN2uqUnsigned(N2uqContract):
    is_signed = False


class TestN2uqSigned(N2uqContract):
    is_signed = True


def as_published(bits: int) -> N2uqInput:
    """The paper's start: s = 0, a_i = 2 / M, both scales 1."""
    quantizer = N2uqInput(bits, n_channels=1, channel_dim=-1).double()
    quantizer.initialize_(torch.ones(1, 1, dtype=torch.float64))
    with torch.no_grad():
        quantizer.in_scale.fill_(1)
        quantizer.out_scale.fill_(1)
    return quantizer


@pytest.mark.parametrize("bits", range(2, 9))
def test_equal_intervals_are_the_clipped_straight_through_estimator(bits):
    d = 2 / (2**bits - 1)
    values = (torch.rand(400, 1, dtype=torch.float64) * 3.4 - 0.7).requires_grad_()
    upstream = torch.randn(values.shape, dtype=torch.float64)
    out = as_published(bits)(values)
    out.backward(upstream)
    clipped = values.detach().clamp(0, 2)
    torch.testing.assert_close(out.detach(), (clipped / d).round() * d)
    inside = (values > 0) & (values <= 2)
    torch.testing.assert_close(values.grad, upstream * inside)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_starts_as_lsq_does(bits, is_signed):
    torch.manual_seed(bits)
    values = torch.randn(4, 6, 5, 5)
    values = values if is_signed else values.relu()
    n2uq = N2uqInput(bits, n_channels=6, channel_dim=-3)
    lsq = LsqInput(bits, n_channels=6, channel_dim=-3)
    for quantizer in (n2uq, lsq):
        quantizer.initialize_(values)
    torch.testing.assert_close(n2uq.levels(), lsq.levels())
    assert torch.equal(n2uq.codes(values), lsq.codes(values))


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("name", ["start", "widths", "in_scale"])
def test_gradients_are_those_of_the_surrogate_by_finite_differences(bits, name):
    torch.manual_seed(bits)
    quantizer = N2uqInput(bits, n_channels=1, channel_dim=-1).double()
    values = torch.rand(60, 1, dtype=torch.float64) * 4
    quantizer.initialize_(values)
    with torch.no_grad():
        quantizer.start.fill_(0.05)
        quantizer.widths.mul_(torch.empty_like(quantizer.widths).uniform_(0.6, 1.4))
        quantizer.out_scale.fill_(1)
    quantizer(values).sum().backward()

    def total(changed: Tensor) -> float:
        now = {n: p.detach() for n, p in quantizer.named_parameters()} | {name: changed}
        start, widths, scale = now["start"].item(), now["widths"].tolist(), now["in_scale"].item()
        return sum(surrogate(x, start, widths, scale) for x in values.flatten().tolist())

    parameter = getattr(quantizer, name)
    step = 1e-7
    for i in range(parameter.numel()):
        moved = parameter.detach().flatten().clone()
        moved[i] += step
        above = total(moved.view_as(parameter))
        moved[i] -= 2 * step
        below = total(moved.view_as(parameter))
        slope = (above - below) / (2 * step)
        assert parameter.grad.flatten()[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_narrow_intervals_are_held_open_and_wrong_signs_counted():
    quantizer = as_published(3)
    values = torch.rand(20, 1, dtype=torch.float64) * 2
    with torch.no_grad():
        quantizer.widths[2] = -0.3
        quantizer.out_scale.neg_()
    assert quantizer.health(values).wrong_sign_steps == 2
    assert (quantizer.levels().diff() > 0).all()
    out = quantizer(values)
    out.sum().backward()
    assert torch.isin(out, quantizer.levels()).all()
    assert quantizer.widths.grad[2] == 0


def test_the_level_of_padding_is_exactly_zero_for_signed_inputs():
    values = torch.randn(50, 4)
    quantizer = N2uqInput(4, n_channels=4, channel_dim=-1)
    quantizer.initialize_(values)
    with torch.no_grad():
        quantizer.out_scale.mul_(1.234)
        quantizer.start.add_(0.3)
    assert (quantizer.levels() == 0).sum() == 1


def test_published_learning_rate_is_a_tenth():
    assert N2uqInput.learning_rate_factor == 0.1
