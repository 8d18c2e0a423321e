"""The networks and their variants: how each contestant becomes a function that trains one step."""

import os

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_
from adq_search.norms import fused_norms
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.tasks.networks import resnet20
from adq_search.tracing import parametric_layers

try:
    import brevitas.nn as brevitas_nn
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
except ImportError:  # pip install brevitas
    brevitas_nn = None

BITS = 4
#: Name, factory, input shape.
NETWORKS = {
    "resnet20_32": (resnet20, (128, 3, 32, 32)),
    "resnet20_16": (resnet20, (128, 3, 16, 16)),
    "mobilenet_v2_96": (
        lambda: torchvision.models.mobilenet_v2(num_classes=10, dropout=0.0),
        (32, 3, 96, 96),
    ),
}
#: Name, scheme, share of float training's time allowed (issue 4).
SCHEMES = {
    "lsq": ("lsq", 1.10),
    "post": ("post", 1.15),
    "asq": ("asq", 1.15),
    "asq_post": ("asq_post", 1.15),
    "adq+lsq": ("adq+lsq", 1.20),
    "adq": ("adq", 1.20),
    "n2uq": ("lsq+n2uq", None),
}


def float_network(network):
    factory, _ = NETWORKS[network]
    torch.manual_seed(0)
    return factory().to(memory_format=torch.channels_last)


def inner_layers(model):
    """Names of all layers with weights but the first and the last."""
    return list(parametric_layers(model))[1:-1]


def ours(network, scheme):
    model = float_network(network)
    names = list(parametric_layers(model))
    momentum = 0.99 if scheme.startswith("adq") else None
    precision = LayerPrecision(BITS, BITS, scheme, ema_momentum=momentum)
    inner = set(inner_layers(model))
    policy = Policy.of({name: precision if name in inner else FLOAT for name in names})
    apply_policy_(model, policy, batch_of(network)[0])
    return model


class AtenConv(nn.Conv2d):
    """ATen's fused learnable fake quantization of weights and inputs, one step a tensor."""

    def prepare(self):
        self.zero = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.weight_step = nn.Parameter(2 * self.weight.detach().abs().mean().view(1) / 7**0.5)
        self.input_step = nn.Parameter(torch.full((1,), 0.1))
        return self

    def forward(self, x):
        quantize = torch._fake_quantize_learnable_per_tensor_affine
        weight = quantize(self.weight, self.weight_step, self.zero, -8, 7)
        values = quantize(x, self.input_step, self.zero, 0, 15)
        return self._conv_forward(values, weight, self.bias)


def aten(network):
    model = float_network(network)
    for name in inner_layers(model):
        layer = model.get_submodule(name)
        layer.__class__ = AtenConv
        layer.prepare()
    return model


def brevitas(network):
    """Brevitas' own layers: learned-from-statistics steps, one a tensor, 4 bits."""
    model = float_network(network)
    for name in inner_layers(model):
        layer = model.get_submodule(name)
        twin = brevitas_nn.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
            bias=layer.bias is not None,
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=BITS,
            input_quant=Uint8ActPerTensorFloat,
            input_bit_width=BITS,
        )
        twin.load_state_dict(layer.state_dict(), strict=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, twin)
    return model.to(memory_format=torch.channels_last)


class OnePassEachWay(torch.autograd.Function):
    """The least that a quantizer apart from other layers can do: read and write the input once."""

    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):
        (values,) = ctx.saved_tensors
        return torch.add(upstream, values, alpha=0.0)


class FloorConv(nn.Conv2d):
    """A convolution behind `OnePassEachWay`; weights cost nothing."""

    def forward(self, x):
        return self._conv_forward(OnePassEachWay.apply(x), self.weight, self.bias)


def floor(network):
    model = float_network(network)
    for name in inner_layers(model):
        model.get_submodule(name).__class__ = FloorConv
    return model


def batch_of(network):
    _, shape = NETWORKS[network]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
    return inputs, torch.randint(0, 10, shape[:1], generator=generator)


class Contestant:
    """One variant of one network, ready to train a step with SGD."""

    def __init__(self, network, variant):
        base, _, detail = variant.partition(", ")
        self.compile_mode = "off" if detail == "eager" else "auto"
        self.is_bf16 = detail == "bf16"
        if base == "float":
            self.model = float_network(network)
        elif base == "brevitas":
            self.model = brevitas(network)
        elif base == "aten":
            self.model = aten(network)
        elif base == "floor":
            self.model = floor(network)
        else:
            self.model = ours(network, SCHEMES[base][0])
        self.model.train()
        if base in SCHEMES or detail == "norms":
            self.norms = fused_norms(self.model)  # as `adq_search.training.fit` does
            self.norms.__enter__()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.call = torch.compile(self.model) if detail == "compiled" else self.model
        self.inputs, self.targets = batch_of(network)

    def step(self):
        os.environ["ADQ_SEARCH_COMPILE"] = self.compile_mode
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
            loss = F.cross_entropy(self.call(self.inputs).float(), self.targets)
        loss.backward()
        self.optimizer.step()


def variants(*, with_compiled, with_eager, with_bf16):
    """Names of all contestants: a base, and after a comma how it is run."""
    names = ["float", "float, norms", "floor", "aten"]
    names += ["float, bf16"] if with_bf16 else []
    names += ["float, compiled", "lsq, compiled"] if with_compiled else []
    names += ["brevitas"] if brevitas_nn is not None else []
    for scheme in SCHEMES:
        names.append(scheme)
    names += [f"{scheme}, bf16" for scheme in ("lsq", "post", "asq", "adq")] if with_bf16 else []
    if with_eager:
        names += [f"{scheme}, eager" for scheme in ("lsq", "post", "asq", "adq")]
    return names


def peak_bytes(contestant):
    """Largest sum of tensors that one step holds beyond what it starts with, from the allocator."""
    contestant.step()
    contestant.optimizer.zero_grad()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        contestant.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
