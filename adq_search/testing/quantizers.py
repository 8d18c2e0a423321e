"""Contracts of quantizers.

Subclass `WeightQuantizerContract` or `InputQuantizerContract` in a test module, name the quantizer,
and write down its published formulas once more, slowly:

    class TestMyWeight(WeightQuantizerContract):
        quantizer_class = MyWeight

        def slow_pass(self, quantizer, values, upstream):
            ...  # loops over Python floats, straight from the paper
            return outputs, {"values": value_gradients, "step": step_gradients}
"""

# ruff: noqa: D102 (a test's name is its sentence)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from adq_search.errors import QuantizerError
from adq_search.policy import MAX_BITS, MIN_BITS, OptionValue
from adq_search.quantizers import InputQuantizer, Quantizer, WeightQuantizer

#: Outputs, and gradients by name (`values` and every parameter), all flat in row-major order.
SlowPass = tuple[list[float], dict[str, list[float]]]

_EVERY_BITS = pytest.mark.parametrize("bits", range(MIN_BITS, MAX_BITS + 1))
_EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
_EVERY_DEVICE = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


class QuantizerContract(ABC):
    """What holds for every quantizer; subclass one of its two kinds.

    Attributes:
        shape: Shape of the values the quantizer is tried on.
        options: Options it is made with.
    """

    shape: ClassVar[tuple[int, ...]]
    options: ClassVar[Mapping[str, OptionValue]] = {}

    @abstractmethod
    def kind(self) -> type[Quantizer]:
        """Return the class under test."""

    @abstractmethod
    def make(self, bits: int, **options: OptionValue) -> Quantizer:
        """Return a quantizer that is not fitted yet."""

    @abstractmethod
    def sample(self, seed: int) -> Tensor:
        """Return float32 values of the kind that the quantizer is made for."""

    @abstractmethod
    def slow_pass(
        self, quantizer: Quantizer, values: list[float], upstream: list[float]
    ) -> SlowPass:
        """Compute outputs and gradients from the published formulas, in Python floats.

        Args:
            quantizer: A fitted float64 quantizer; read its parameters and buffers.
            values: The values, of shape `self.shape`, flat.
            upstream: Gradient of the loss at every output, flat.
        """

    def grids(self, quantizer: Quantizer, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield masks over `values` that together cover them, with the levels of each part."""
        levels = quantizer.levels()
        if levels.ndim == 1:
            yield torch.ones_like(values, dtype=torch.bool), levels
        else:
            for channel, row in enumerate(levels):
                mask = torch.zeros_like(values, dtype=torch.bool)
                mask[channel] = True
                yield mask, row

    def fitted(self, bits: int, *, dtype: torch.dtype = torch.float32) -> Quantizer:
        """Return a quantizer in evaluation mode, fitted and then moved as training would."""
        torch.manual_seed(bits)
        quantizer = self.make(bits, **self.options).to(dtype)
        quantizer.initialize_(self.sample(1).to(dtype))
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
                parameter.add_(torch.empty_like(parameter).uniform_(0, 0.02))
        return quantizer.eval()

    @_EVERY_BITS
    @_EVERY_DTYPE
    def test_values_lie_on_the_grid_that_the_codes_name(
        self, bits: int, dtype: torch.dtype
    ) -> None:
        quantizer = self.fitted(bits, dtype=torch.promote_types(dtype, torch.float32))
        values = self.sample(2).to(dtype)
        out, codes = quantizer(values), quantizer.codes(values)
        assert codes.dtype == torch.int64
        n_covered = 0
        for mask, levels in self.grids(quantizer, values):
            named = levels[codes[mask] - quantizer.lowest_code].to(dtype)
            assert torch.equal(out[mask], named)
            n_covered += int(mask.sum())
        assert n_covered == values.numel()

    @_EVERY_BITS
    def test_has_no_more_levels_than_its_codes_can_name(self, bits: int) -> None:
        quantizer = self.fitted(bits)
        n_levels = quantizer.n_levels(bits, **self.options)
        levels = quantizer.levels()
        assert levels.shape[-1] == n_levels <= 2 ** quantizer.storage_bits(bits, **self.options)
        assert quantizer.n_levels(bits) <= 2**bits
        assert (levels.diff(dim=-1) > 0).all()
        assert len(quantizer.codes(self.sample(2)).unique()) <= n_levels

    @_EVERY_BITS
    @_EVERY_DTYPE
    def test_quantizing_twice_changes_nothing_more(self, bits: int, dtype: torch.dtype) -> None:
        quantizer = self.fitted(bits)
        if quantizer.is_projection:
            once = quantizer(self.sample(2).to(dtype))
            assert torch.equal(quantizer(once), once)

    @_EVERY_BITS
    def test_zero_stays_zero_where_there_is_one(self, bits: int) -> None:
        torch.manual_seed(0)
        quantizer = self.make(bits, **self.options)
        quantizer.initialize_(self.sample(1))
        assert (quantizer.levels() == 0).any(dim=-1).all()
        assert (quantizer.eval()(torch.zeros(self.shape)) == 0).all()

    @_EVERY_BITS
    def test_agrees_with_the_published_formulas(self, bits: int) -> None:
        quantizer = self.fitted(bits, dtype=torch.float64)
        values = self.sample(2).double().requires_grad_()
        upstream = torch.randn(values.shape, dtype=torch.float64)
        out = quantizer(values)
        out.backward(upstream)
        outputs, gradients = self.slow_pass(
            quantizer, values.detach().flatten().tolist(), upstream.flatten().tolist()
        )
        torch.testing.assert_close(out.flatten(), torch.tensor(outputs, dtype=torch.float64))
        tensors = {"values": values, **dict(quantizer.named_parameters())}
        assert set(gradients) == set(tensors)
        for name, expected in gradients.items():
            found = tensors[name].grad
            assert found is not None, name
            slow = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(found.flatten(), slow, rtol=1e-9, atol=1e-11)

    @_EVERY_BITS
    def test_state_dict_carries_everything(self, bits: int) -> None:
        quantizer = self.fitted(bits)
        values = self.sample(2)
        other = self.make(bits, **self.options).eval()
        assert not other.is_initialized
        other.load_state_dict(quantizer.state_dict())
        assert other.is_initialized
        assert torch.equal(other(values), quantizer(values))
        assert torch.equal(other.levels(), quantizer.levels())

    def test_state_of_other_bits_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match=r"the state is of 3 bits|size mismatch"):
            self.make(4, **self.options).load_state_dict(self.fitted(3).state_dict())

    @_EVERY_DTYPE
    @_EVERY_DEVICE
    def test_keeps_dtype_device_and_shape(self, dtype: torch.dtype, device: str) -> None:
        quantizer = self.fitted(4).to(device)
        values = self.sample(2).to(device, dtype).requires_grad_()
        out = quantizer(values)
        assert (out.dtype, out.device, out.shape) == (dtype, values.device, values.shape)
        out.sum().backward()
        assert values.grad is not None
        assert (values.grad.dtype, values.grad.device) == (dtype, values.device)
        for parameter in quantizer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32

    @_EVERY_BITS
    def test_is_deterministic(self, bits: int) -> None:
        def run() -> list[Tensor]:
            quantizer = self.fitted(bits)
            values = self.sample(2).requires_grad_()
            out = quantizer(values)
            out.square().sum().backward()
            tensors = [values, *quantizer.parameters()]
            return [out, *(t.grad for t in tensors if t.grad is not None)]

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)

    def test_evaluation_moves_nothing(self) -> None:
        quantizer = self.fitted(3)
        before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        quantizer(self.sample(3))
        for name, tensor in quantizer.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    @_EVERY_BITS
    def test_not_a_number_stays_visible(self, bits: int) -> None:
        values = self.sample(2)
        values.view(-1)[5] = torch.nan
        out = self.fitted(bits)(values.requires_grad_())
        assert out.view(-1)[5].isnan()
        out.sum().backward()

    def test_memory_layout_does_not_matter(self) -> None:
        plain = self.sample(2).requires_grad_()
        strided = plain.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        quantizer = self.fitted(4)
        upstream = torch.randn(self.shape)
        quantizer(plain).backward(upstream)
        quantizer(strided).backward(upstream)
        assert torch.equal(quantizer(plain), quantizer(strided))
        torch.testing.assert_close(plain.grad, strided.grad)

    @_EVERY_BITS
    def test_health_counts_levels_and_saturation(self, bits: int) -> None:
        quantizer = self.fitted(bits)
        health = quantizer.health(self.sample(2))
        reached = len(quantizer.codes(self.sample(2)).unique())
        assert health.n_levels - health.dead_levels == reached
        assert health.wrong_sign_steps == 0
        assert 0 <= health.saturated <= 1

    def test_refuses_to_run_before_it_is_fitted(self) -> None:
        with pytest.raises(QuantizerError, match="never fitted"):
            self.make(4, **self.options)(self.sample(1))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
    def test_refuses_to_be_fitted_to_what_is_not_finite(self, bad: float) -> None:
        values = self.sample(1)
        values.view(-1)[3] = bad
        with pytest.raises(QuantizerError, match=rf"1 of {values.numel()} are not"):
            self.make(4, **self.options).initialize_(values)

    @pytest.mark.parametrize("bits", [1, 9, True, 4.0])
    def test_refuses_other_bits(self, bits: int) -> None:
        with pytest.raises(QuantizerError, match="2 to 8 bits"):
            self.make(bits)

    def test_refuses_unknown_options(self) -> None:
        with pytest.raises(QuantizerError, match="has no option 'levle'"):
            self.make(4, levle="eq17")
        for option in self.kind().option_values:
            with pytest.raises(QuantizerError, match=f"'{option}' .* cannot be 'nonsense'"):
                self.make(4, **{option: "nonsense"})


class WeightQuantizerContract(QuantizerContract):
    """What holds for every weight quantizer.

    Attributes:
        quantizer_class: The class under test.
    """

    quantizer_class: ClassVar[type[WeightQuantizer]]
    shape: ClassVar[tuple[int, ...]] = (5, 3, 2, 3)

    def kind(self) -> type[Quantizer]:
        """Return the class under test."""
        return self.quantizer_class

    def make(self, bits: int, **options: OptionValue) -> WeightQuantizer:
        """Return a weight quantizer for `self.shape`."""
        momentum = 0.9 if self.quantizer_class.has_codebook else None
        return self.quantizer_class(bits, self.shape, ema_momentum=momentum, **options)

    def sample(self, seed: int) -> Tensor:
        """Return Gaussian weights, of another spread in each output channel."""
        generator = torch.Generator().manual_seed(seed)
        spread = torch.linspace(0.05, 0.2, self.shape[0]).view(-1, *(1 for _ in self.shape[1:]))
        return torch.randn(self.shape, generator=generator) * spread

    def test_momentum_belongs_to_codebooks(self) -> None:
        kind = self.quantizer_class
        wrong = None if kind.has_codebook else 0.9
        with pytest.raises(QuantizerError, match="ema_momentum"):
            kind(4, self.shape, ema_momentum=wrong, **self.options)

    @pytest.mark.parametrize("shape", [(6, 4), (4, 3, 5), (4, 1, 3, 3)], ids=str)
    def test_fits_every_kind_of_layer(self, shape: tuple[int, ...]) -> None:
        momentum = 0.9 if self.quantizer_class.has_codebook else None
        quantizer = self.quantizer_class(4, shape, ema_momentum=momentum, **self.options)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        quantizer.initialize_(weight)
        assert quantizer(weight).shape == shape
        assert (quantizer(weight) - weight).square().mean() < 0.2 * weight.square().mean()

    def test_weights_of_zero_can_still_be_fitted(self) -> None:
        quantizer = self.make(4, **self.options)
        quantizer.initialize_(torch.zeros(self.shape))
        assert (quantizer(torch.zeros(self.shape)) == 0).all()
        assert quantizer.health(torch.zeros(self.shape)).wrong_sign_steps == 0


class InputQuantizerContract(QuantizerContract):
    """What holds for every input quantizer.

    Attributes:
        quantizer_class: The class under test.
        is_signed: Whether it is tried on inputs with negative values.
    """

    quantizer_class: ClassVar[type[InputQuantizer]]
    is_signed: ClassVar[bool]
    shape: ClassVar[tuple[int, ...]] = (4, 9, 2, 3)

    def kind(self) -> type[Quantizer]:
        """Return the class under test."""
        return self.quantizer_class

    def make(self, bits: int, **options: OptionValue) -> InputQuantizer:
        """Return an input quantizer for a convolution over `self.shape`."""
        return self.quantizer_class(
            bits, n_channels=self.shape[1], channel_dim=1 - len(self.shape), **options
        )

    def sample(self, seed: int) -> Tensor:
        """Return Gaussian inputs, of another spread in each sample; without a sign rectified."""
        generator = torch.Generator().manual_seed(seed)
        spread = torch.linspace(0.5, 2, self.shape[0]).view(-1, *(1 for _ in self.shape[1:]))
        values = torch.randn(self.shape, generator=generator) * spread
        return values if self.is_signed else values.relu()

    @_EVERY_BITS
    def test_finds_the_sign_at_calibration(self, bits: int) -> None:
        quantizer = self.make(bits, **self.options)
        quantizer.initialize_(self.sample(1))
        assert quantizer.is_signed == self.is_signed
        assert quantizer.lowest_code == (-(2 ** (bits - 1)) if self.is_signed else 0)
        restored = self.make(bits, **self.options)
        restored.load_state_dict(quantizer.state_dict())
        assert restored.is_signed == self.is_signed

    @pytest.mark.parametrize(
        ("before", "after"),
        [((7,), ()), ((3, 5), ()), ((), ()), ((3,), (5,)), ((), (4, 4)), ((0,), ())],
        ids=["linear", "tokens", "one vector", "conv1d", "one image", "no samples"],
    )
    def test_fits_every_kind_of_input(
        self, before: tuple[int, ...], after: tuple[int, ...]
    ) -> None:
        n_channels = self.shape[1]
        quantizer = self.quantizer_class(
            4, n_channels=n_channels, channel_dim=-1 - len(after), **self.options
        )
        shape = (*before, n_channels, *after)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = (values if self.is_signed else values.relu()).requires_grad_()
        quantizer.initialize_(values if values.numel() else self.sample(1))
        out = quantizer(values)
        out.sum().backward()
        assert out.shape == shape
        assert values.grad is not None
        assert torch.isfinite(values.grad).all()

    def test_one_sample_does_not_depend_on_the_others(self) -> None:
        quantizer, values = self.fitted(4), self.sample(2)
        assert torch.equal(quantizer(values)[1:2], quantizer(values[1:2]))

    def test_inputs_of_zero_can_still_be_fitted(self) -> None:
        quantizer = self.make(4, **self.options)
        quantizer.initialize_(torch.zeros(self.shape))
        assert (quantizer(torch.zeros(self.shape)) == 0).all()
        assert quantizer.health(torch.zeros(self.shape)).wrong_sign_steps == 0

    @pytest.mark.parametrize("channel_dim", [0, 1])
    def test_refuses_a_channel_dimension_counted_from_the_front(self, channel_dim: int) -> None:
        with pytest.raises(QuantizerError, match="counts from the end"):
            self.quantizer_class(4, n_channels=9, channel_dim=channel_dim, **self.options)
