r"""ASQ: LSQ for inputs whose step size a small adapter fits to every sample.

Notation:
    s_a = s \\beta, x_int = clamp(round(x / s_a), n, p), \\hat x = x_int s_a

References:
    [Zhou2025] arXiv 2504.17263, Eqs. 4-9 and algorithm 1; its public code (SENGEL13/ASQ-POST).

Eq. 6 prints s where s_a is meant (algorithm 1 and the code have s_a); Eqs. 7-9 likewise. As in the
code, LSQ's gradient scale acts on s and not on beta, and the inputs receive a second gradient
through the adapter. N in that scale counts the features of one sample (see `lsq`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adq_search.policy import OptionValue
from adq_search.quantizers import _native
from adq_search.quantizers._again import mark_made
from adq_search.quantizers._base import INPUT_QUANTIZERS, InputQuantizer
from adq_search.quantizers._calibration import (
    EPS,
    computing_dtype,
    initial_step,
    integer_grid,
    n_features,
)
from adq_search.quantizers._native_functions import ADAPTIVE
from adq_search.quantizers._through import (
    lsq_gradient_scale,
    positive_step,
    signed,
    uniform_gradients,
    uniform_inputs_through,
    uniform_integers,
    uniform_values,
)

#: From this many channels on, the adapter has a hidden layer of a quarter of them.
MIN_CHANNELS_FOR_HIDDEN = 8
SMALLEST_FACTOR = 1e-8


class Adapter(nn.Module):
    """Maps channel means of a sample to its step factor, about 1 before training.

    C -> C/4 -> 1 with ReLU after both; C -> 1 below eight channels [Zhou2025, code]. Stays in its
    own precision under autocast.

    Args:
        n_channels: Channels C of the input.
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        width = n_channels
        self.hidden: nn.Linear | None = None
        if n_channels >= MIN_CHANNELS_FOR_HIDDEN:
            width = n_channels // 4
            self.hidden = nn.Linear(n_channels, width)
        self.output = nn.Linear(width, 1)
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.ones_(self.output.bias)

    def forward(self, means: Tensor) -> Tensor:
        """Return one factor a sample.

        Args:
            means: Channel means, # shape: (N, C)

        Returns:
            Factors beta >= 1e-8, # shape: (N,)
        """
        return self.trace(means)[0]

    def trace(self, means: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the factors, and what `gradients` needs: means, hidden and output activations."""
        with torch.autocast(device_type=means.device.type, enabled=False):
            means = means.to(self.output.weight.dtype)
            inner = means if self.hidden is None else F.relu(self.hidden(means))
            out = F.relu(self.output(inner))
        return out.squeeze(-1).clamp(min=SMALLEST_FACTOR), means, inner, out

    def gradients(
        self, upstream: Tensor, means: Tensor, inner: Tensor, out: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients to the means and to the parameters, in their order.

        Args:
            upstream: Gradient to the factors, # shape: (N,)
            means: As `trace` returned them, like the rest.
            inner: Hidden activations, # shape: (N, C / 4); the means where there are none.
            out: Output activations, # shape: (N, 1)
        """
        to_out = upstream.unsqueeze(-1) * (out >= SMALLEST_FACTOR)
        to_inner = to_out @ self.output.weight
        found = [to_out.T @ inner, to_out.sum(dim=0)]
        if self.hidden is None:
            return to_inner, found
        to_inner = to_inner * (inner > 0)
        return to_inner @ self.hidden.weight, [to_inner.T @ means, to_inner.sum(dim=0), *found]


@INPUT_QUANTIZERS.register("asq")
class AsqInput(InputQuantizer):
    """ASQ for inputs: step s times a factor beta of each sample.

    `levels()` leaves the factor out; `codes()` takes it into account.

    Attributes:
        step: The trained step s, # shape: ()
        adapter: Computes beta.
    """

    name = "asq"
    # Quantized inputs have other channel means, hence another factor.
    is_projection = False

    def __init__(
        self, bits: int, *, n_channels: int, channel_dim: int, **options: OptionValue
    ) -> None:
        super().__init__(bits, n_channels=n_channels, channel_dim=channel_dim, **options)
        self.step = nn.Parameter(torch.ones(()))
        self.adapter = Adapter(n_channels)
        self._frozen_factor: float | None = None

    def freeze_factor_(self, value: float | None) -> None:
        """Use `value` as every sample's factor, or the adapter again where it is None."""
        self._frozen_factor = value

    @property
    def is_adaptive(self) -> bool:
        """Whether the adapter finds the factors."""
        return self._frozen_factor is None

    def factors(self, values: Tensor) -> Tensor:
        """Return beta of every sample, # shape: (N, 1, ..., 1)."""
        shape = self._sample_shape(values)
        if self._frozen_factor is not None:
            return self.step.new_full(shape, self._frozen_factor)
        beta: Tensor = self.adapter(self.channel_means(values))
        return beta.view(shape)

    def channel_means(self, values: Tensor) -> Tensor:
        """Return averages over all but samples and channels, # shape: (N, C)."""
        batch, pooled = self._batch_and_pooled(values)
        dtype = computing_dtype(values, self.step)
        return batch.mean(dim=pooled, dtype=dtype) if pooled else batch.to(dtype)

    def _batch_and_pooled(self, values: Tensor) -> tuple[Tensor, list[int]]:
        batch = values if values.ndim > -self.channel_dim else values.unsqueeze(0)
        channel_dim = batch.ndim + self.channel_dim
        return batch, [dim for dim in range(1, batch.ndim) if dim != channel_dim]

    def adapted_steps(self, means: Tensor) -> tuple[Tensor, ...]:
        """Return the steps s_a of samples, # shape: (N,), and what `trained_gradients` needs.

        Args:
            means: Channel means, # shape: (N, C)
        """
        adapter = tuple(self.adapter.parameters())
        # Other channels than the adapter's are torch's to refuse.
        if means.shape[-1] == self.n_channels and _native.takes(means, self.step, *adapter):
            steps, beta, *activations = _native.adapted_steps(
                means, self.step, EPS, adapter, SMALLEST_FACTOR
            )
            return steps, beta, means, *activations
        beta, *parts = self.adapter.trace(means)
        return self.step.abs().clamp(min=EPS) * beta, beta, *parts

    def trained_gradients(
        self, upstream: Tensor, values: Tensor, raw: Tensor, *parts: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the gradients to the channel means, to the step and to the adapter's parameters.

        Args:
            upstream: Gradient to the steps s_a, one a sample.
            values: What was quantized.
            raw: The trained step, # shape: ()
            *parts: What else `adapted_steps` returned.
        """
        beta, means, *activations = parts
        n = n_features(values, self._sample_shape(values))
        adapter = tuple(self.adapter.parameters())
        if _native.takes(means, raw, upstream, self.qmax, *adapter):
            return _native.adapted_steps_backward(
                *(upstream, raw, EPS, self.qmax, n, adapter, SMALLEST_FACTOR),
                *(beta, means, *activations),
            )
        upstream = upstream.flatten()
        grad_s = signed(raw, (upstream * beta).sum())
        to_beta = upstream * raw.abs().clamp(min=EPS)
        to_means, to_parameters = self.adapter.gradients(to_beta, means, *activations)
        return to_means, grad_s * lsq_gradient_scale(self.qmax, n), to_parameters

    def add_mean_gradient_(self, gradient: Tensor, to_means: Tensor) -> None:
        """Add what the channel means pass back to a gradient with the shape of the values.

        Args:
            gradient: Changed in place.
            to_means: Gradient to the channel means, # shape: (N, C)
        """
        batch, pooled = self._batch_and_pooled(gradient)
        n_pooled = math.prod(batch.shape[dim] for dim in pooled)
        share = (to_means / max(1, n_pooled)).to(gradient.dtype)
        for dim in pooled:
            share = share.unsqueeze(dim)
        batch.add_(share)

    def _fit(self, values: Tensor) -> None:
        self._fit_range(values)
        self.step.copy_(initial_step(values.reshape(1, -1), self.qmax)[0])

    def _quantize(self, values: Tensor) -> Tensor:
        if not self.is_adaptive or torch.compiler.is_compiling():
            n = n_features(values, self._sample_shape(values))
            step = positive_step(self.step, lsq_gradient_scale(self.qmax, n))
            step = step * self.factors(values)
            return uniform_inputs_through(values, step, self.qmin, self.qmax, n_features=None)
        tensors = self.tensors()
        known = [tensor for tensor in tensors if tensor is not None]
        if self._lies_by_pixels(values) and _native.takes(values, *known):
            out, steps = ADAPTIVE((values, *tensors), self.numbers(values))
        else:
            out, steps = _Adaptive.apply(values, self.step, self, *self.adapter.parameters())
        return mark_made(out, partial(uniform_values, values, steps, self.qmin, self.qmax, None))

    def _lies_by_pixels(self, values: Tensor) -> bool:
        """Whether each sample is in one piece, and in it the channels of each pixel.

        Values with other channels than the adapter's are left to torch, which says what is wrong.
        """
        if values.ndim <= -self.channel_dim or values.shape[self.channel_dim] != self.n_channels:
            return False
        if self.channel_dim == -1:
            return values.is_contiguous()
        is_image = self.channel_dim == -3 and values.ndim == 4
        return is_image and values.is_contiguous(memory_format=torch.channels_last)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return range, step and adapter as C++ takes them; None for the layer that it lacks."""
        hidden, output = self.adapter.hidden, self.adapter.output
        first = (None, None) if hidden is None else (hidden.weight, hidden.bias)
        return self.qmin, self.qmax, self.step, *first, output.weight, output.bias

    def numbers(self, values: Tensor) -> tuple[float, ...]:
        """Return the sizes of values and adapter as C++ takes them."""
        n, features = len(values), values[0].numel()
        sizes = (self.adapter.output.in_features, n, features // self.n_channels, self.n_channels)
        return EPS, SMALLEST_FACTOR, features, *sizes, torch.get_num_threads()

    def _codes(self, values: Tensor) -> Tensor:
        step = self._positive() * self.factors(values)
        return uniform_integers(values, step, self.qmin, self.qmax).long()

    def _levels(self) -> Tensor:
        return self._positive() * integer_grid(self.bits, self.qmin, self.step)

    def _saturated(self, values: Tensor) -> Tensor:
        scaled = values / (self._positive() * self.factors(values))
        return (scaled < self.qmin) | (scaled > self.qmax)

    def _positive_parameters(self) -> list[Tensor]:
        return [self.step]

    def _positive(self) -> Tensor:
        return self.step.detach().abs().clamp(min=EPS)


class _Adaptive(Function):
    """Eqs. 4-9 in two passes over memory a direction, where autograd alone would take six."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, raw: Tensor, quantizer: AsqInput, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        steps, *parts = quantizer.adapted_steps(quantizer.channel_means(values))
        s_a = steps.view(quantizer._sample_shape(values))
        ctx.save_for_backward(values, s_a, quantizer.qmin, quantizer.qmax, raw, *parts)
        ctx.quantizer = quantizer
        ctx.mark_non_differentiable(s_a)
        return uniform_values(values, s_a, quantizer.qmin, quantizer.qmax, None), s_a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, s_a, n, p, raw, *parts = ctx.saved_tensors
        grad_values, grad_s_a = uniform_gradients(values, gradients[0], s_a, n, p, None)
        to_means, grad_raw, to_parameters = ctx.quantizer.trained_gradients(
            grad_s_a, values, raw, *parts
        )
        ctx.quantizer.add_mean_gradient_(grad_values, to_means)
        return grad_values, grad_raw, None, *to_parameters
