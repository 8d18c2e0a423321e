import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adq_search.quantizers import Adapter, AsqInput, LsqInput
from adq_search.testing import InputQuantizerContract, SlowPass
from tests.test_quantizers_lsq import lsq_element


def slow_adapter(
    quantizer: AsqInput, means: list[float]
) -> tuple[float, dict[str, list[float]], list[float]]:
    """Factor of one sample, its gradients to the adapter's parameters, and to the means."""
    adapter = quantizer.adapter
    first = adapter.hidden
    features, pre = means, []
    if first is not None:
        pre = [
            b + sum(w * m for w, m in zip(row, means, strict=True))
            for row, b in zip(first.weight.tolist(), first.bias.tolist(), strict=True)
        ]
        features = [max(0.0, h) for h in pre]
    last = adapter.output.weight.tolist()[0]
    out = adapter.output.bias.item() + sum(w * f for w, f in zip(last, features, strict=True))
    beta, alive = max(out, 1e-8), float(out > 1e-8)
    grads = {"adapter.output.weight": [alive * f for f in features], "adapter.output.bias": [alive]}
    to_features = [alive * w for w in last]
    if first is None:
        return beta, grads, to_features
    to_hidden = [g * (h > 0) for g, h in zip(to_features, pre, strict=True)]
    grads["adapter.hidden.bias"] = to_hidden
    grads["adapter.hidden.weight"] = [g * m for g in to_hidden for m in means]
    rows = first.weight.tolist()
    to_means = [
        sum(g * row[c] for g, row in zip(to_hidden, rows, strict=True)) for c in range(len(means))
    ]
    return beta, grads, to_means


class AsqContract(InputQuantizerContract):
    quantizer_class = AsqInput

    def grids(self, quantizer: AsqInput, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        codes = torch.arange(2**quantizer.bits) + quantizer.lowest_code
        for sample, factor in enumerate(quantizer.factors(values).flatten()):
            mask = torch.zeros_like(values, dtype=torch.bool)
            mask[sample] = True
            yield mask, codes * (quantizer.step * factor)

    def slow_pass(
        self, quantizer: AsqInput, values: list[float], upstream: list[float]
    ) -> SlowPass:
        """Zhou et al. 2025, Eqs. 4-9 with s_a in every place; x also acts through beta."""
        n_samples, n_channels, pixels = self.shape[0], self.shape[1], 6
        n_features = n_channels * pixels
        lowest = -(2 ** (quantizer.bits - 1)) if self.is_signed else 0
        codes = (lowest, lowest + 2**quantizer.bits - 1)
        s = quantizer.step.item()
        gradients = {name: [0.0] * p.numel() for name, p in quantizer.named_parameters()}
        outputs, to_values = [], []
        for n in range(n_samples):
            sample = values[n * n_features : (n + 1) * n_features]
            r = upstream[n * n_features : (n + 1) * n_features]
            means = [sum(sample[c * pixels : (c + 1) * pixels]) / pixels for c in range(n_channels)]
            beta, to_parameters, to_means = slow_adapter(quantizer, means)
            elements = [lsq_element(v, s * beta, *codes) for v in sample]
            outputs += [out for out, _, _ in elements]
            to_step = sum(ri * ds for ri, (_, _, ds) in zip(r, elements, strict=True))
            gradients["step"][0] += to_step * beta / math.sqrt(n_features * codes[1])
            for name, slopes in to_parameters.items():
                for i, slope in enumerate(slopes):
                    gradients[name][i] += to_step * s * slope
            to_values += [
                ri * dv + to_step * s * to_means[i // pixels] / pixels
                for i, (ri, (_, dv, _)) in enumerate(zip(r, elements, strict=True))
            ]
        return outputs, {"values": to_values, **gradients}


class TestAsqUnsigned(AsqContract):
    is_signed = False


class TestAsqSigned(AsqContract):
    is_signed = True


class TestAsqWithoutHiddenLayer(AsqContract):
    is_signed = False
    shape = (4, 5, 2, 3)


def passed(quantizer: AsqInput | LsqInput, values: Tensor, upstream: Tensor) -> list[Tensor]:
    values = values.clone().requires_grad_()
    out = quantizer(values)
    out.backward(upstream)
    return [out, values.grad, quantizer.step.grad]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((8, 12, 7, 5), -3), ((8, 12, 9), -2), ((8, 12), -1), ((8, 6, 12), -1)],
    ids=["conv2d", "conv1d", "linear", "tokens"],
)
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"]
)
def test_with_a_factor_of_one_it_is_lsq_bit_for_bit(bits, shape, channel_dim, is_signed, dtype):
    torch.manual_seed(bits)
    values = torch.randn(shape).mul(3)
    values = (values if is_signed else values.relu()).to(dtype)
    lsq = LsqInput(bits, n_channels=12, channel_dim=channel_dim)
    asq = AsqInput(bits, n_channels=12, channel_dim=channel_dim)
    asq.freeze_factor_(1.0)
    layouts = [values]
    if len(shape) == 4:
        layouts.append(values.contiguous(memory_format=torch.channels_last))
    for laid_out in layouts:
        for quantizer in (lsq, asq):
            quantizer.zero_grad()
            quantizer.initialize_(laid_out)
        upstream = torch.randn(shape).to(dtype)
        *ours, our_step = passed(asq, laid_out, upstream)
        *theirs, their_step = passed(lsq, laid_out, upstream)
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
        # ASQ sums by sample first.
        torch.testing.assert_close(our_step, their_step, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n_channels", "n_parameters"), [(1, 2), (7, 8), (8, 21), (64, 64 * 16 + 16 + 16 + 1)]
)
def test_adapter_has_the_size_of_the_public_code(n_channels, n_parameters):
    assert sum(p.numel() for p in Adapter(n_channels).parameters()) == n_parameters


def test_adapters_of_resnet18_are_the_share_of_parameters_that_the_paper_counts():
    stages = {64: 4, 128: 3, 256: 3, 512: 3}
    inner = dict(stages)
    # Inputs of the 19 inner convolutions: 4 + 1 + 1 see 64 channels, and so on.
    inner = {64: 6, 128: 5, 256: 5, 512: 3}
    total = sum(n * sum(p.numel() for p in Adapter(c).parameters()) for c, n in inner.items())
    assert total == 307_091


def test_factors_are_near_one_before_training():
    torch.manual_seed(0)
    quantizer = AsqInput(4, n_channels=32, channel_dim=-3)
    factors = quantizer.factors(torch.rand(16, 32, 5, 5))
    assert factors.shape == (16, 1, 1, 1)
    assert ((factors - 1).abs() < 0.1).all()


def test_step_follows_each_sample():
    quantizer = AsqInput(4, n_channels=2, channel_dim=-1)
    values = torch.tensor([[0.2, 0.4], [2.0, 4.0]])
    quantizer.initialize_(values)
    with torch.no_grad():
        quantizer.adapter.output.weight.fill_(0.5)  # beta = mean of the sample
        quantizer.adapter.output.bias.zero_()
    codes = quantizer.codes(values)
    assert torch.equal(codes[0], codes[1])
    torch.testing.assert_close(quantizer(values)[1], 10 * quantizer(values)[0])


def test_factor_never_reaches_zero():
    quantizer = AsqInput(4, n_channels=2, channel_dim=-1)
    values = torch.rand(3, 2)
    quantizer.initialize_(values)
    with torch.no_grad():
        quantizer.adapter.output.bias.fill_(-5.0)
    assert (quantizer.factors(values) == 1e-8).all()
    assert torch.isfinite(quantizer(values)).all()


def test_adapter_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    quantizer = AsqInput(4, n_channels=16, channel_dim=-3)
    values = torch.rand(2, 16, 3, 3)
    plain = quantizer.factors(values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.factors(values), plain)
