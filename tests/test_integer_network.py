"""Guarantee (b): the integer network is the network that was trained."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_, quantized_layers, reestimate_batch_norm_
from adq_search.errors import IntegerError
from adq_search.evaluation import evaluate
from adq_search.integer import lower, snap_codebooks_, verify, verify_layers
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.tasks import load_task
from adq_search.tasks.networks import resnet20
from adq_search.tracing import parametric_layers
from adq_search.training import TrainingSettings, fit, training_inputs
from tests import tiny

SNAPPED = {"post": {"sqrt_half": "45/64"}}
FINE = {"post": {"sqrt_half": "181/256"}}
SCHEMES = [
    ("lsq", 4, {}),
    ("lsq", 8, {}),
    ("asq", 4, {}),
    ("pot", 4, {}),
    ("post", 4, SNAPPED),
    ("post", 3, FINE),
    ("post", 4, {}),
    ("asq_post", 4, SNAPPED),
    ("adq", 4, {}),
    ("root+n2uq", 5, {}),
]
IDS = [f"{s}-{b}-{o.get('post', {}).get('sqrt_half', '')}" for s, b, o in SCHEMES]


class Inverted(nn.Module):
    """What MobileNet-V2 and ResNet-18 have: depthwise and grouped convolutions, ReLU6, both
    poolings, a residual sum of unlike ranges, a norm that stands alone, dropout, two dense layers.
    """

    def __init__(self, n_classes=3):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, groups=4), nn.BatchNorm2d(8))
        self.alone = nn.BatchNorm2d(8)
        self.pools = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, 2))
        self.hidden = nn.Linear(8, 12)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, n_classes))

    def forward(self, images):
        stem = F.relu(self.stem(images))
        out = stem + self.project(self.depthwise(self.expand(stem)))
        out = self.alone(out)
        out = F.pad(self.pools(out), (0, 1, 0, 1))[:, :, 0:2, 0:2]
        return self.classifier(torch.relu(self.hidden(out.mean((2, 3)))))


def trained(network, task, scheme, bits, options, *, epochs):
    """Train as a trial does, re-estimate and freeze the batch norm, snap the codebooks."""
    torch.manual_seed(0)
    momentum = 0.9 if scheme.startswith("adq") else None
    precision = LayerPrecision(bits, bits, scheme, momentum)
    fit(network, task, TrainingSettings(epochs=2, learning_rate=0.05), seed=0)
    network.eval()
    policy = Policy.uniform(tuple(parametric_layers(network)), precision, options=options)
    apply_policy_(network, policy, task.calibration(256, seed=0))
    settings = TrainingSettings(epochs=epochs, batch_size=32, learning_rate=0.02)
    fit(network, task, settings, seed=0)
    reestimate_batch_norm_(network, training_inputs(network, task, settings, seed=0))
    snap_codebooks_(network)
    return network.eval()


def inputs_of(part):
    return [batch.inputs for batch in part.batches(100)]


def every_result(integer, inputs, arithmetic):
    names = [operation.result for operation in integer.operations]
    return integer.integers(inputs, names, arithmetic=arithmetic)


@pytest.fixture(scope="module")
def task():
    return tiny.make(n=600)


@pytest.mark.parametrize(("scheme", "bits", "options"), SCHEMES, ids=IDS)
def test_trained_networks_agree_code_by_code_for_every_scheme(task, scheme, bits, options):
    network = trained(Inverted(), task, scheme, bits, options, epochs=2)
    integer = lower(network, task.calibration(64, seed=0))
    agreement = verify(network, integer, inputs_of(task.test))
    assert agreement.unexplained == 0
    assert agreement.ties <= agreement.codes // 10_000
    assert agreement.other_classes == 0
    assert agreement.is_verified
    assert agreement.samples == len(task.test)
    assert agreement.codes == sum(a.codes for a in agreement.layers.values()) > 100_000
    assert list(agreement.layers) == list(quantized_layers(network))
    assert agreement.largest_logit_error < 1e-5
    # (a) sums, codes and everything between are those of int64 arithmetic.
    inputs = task.test.inputs[:20]
    fast, slow = (every_result(integer, inputs, a) for a in ("fast", "int64"))
    for name, result in slow.items():
        assert result.dtype == torch.int64
        assert torch.equal(fast[name].long(), result), name
    for layer in integer.layers.values():
        for name, sums in zip(layer.sum_names, layer.sums, strict=True):
            largest = slow[name].abs().amax([d for d in range(slow[name].ndim) if d != 1])
            assert (largest <= sums.bounds).all()


@st.composite
def networks(draw):
    """A chain of random layers and norms: grouped, depthwise, strided, dilated, 1d or 2d."""
    is_flat = draw(st.booleans())
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if is_flat else (nn.Conv2d, nn.BatchNorm2d)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels = draw(st.integers(1, 12))
    shape = (16, channels, 12) if is_flat else (16, channels, 9, 12)
    modules = []
    side = min(shape[2:])
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3, channels) if channels % g == 0]))
        out = groups * draw(st.integers(1, 4))
        kernel, stride, padding, dilation = (draw(st.integers(1, n)) for n in (3, 2, 2, 2))
        side = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        assume(side > 0)
        modules.append(
            conv(
                *(channels, out, kernel, stride, padding, dilation, groups),
                bias=draw(st.booleans()),
            )
        )
        modules += [norm(out)] * draw(st.integers(0, 1)) + [nn.ReLU()] * draw(st.integers(0, 1))
        channels = out
    modules += [nn.Flatten(), nn.LazyLinear(4)]
    network = nn.Sequential(*modules)
    scheme, _, options = draw(st.sampled_from(SCHEMES))
    # Means of a hundred drive an untrained adapter to factors of zero, where a division by the
    # factor magnifies every rounding error: float32 is no witness there.
    scales = [0.01, 1.0] if "asq" in scheme else [0.01, 1.0, 100.0]
    inputs = torch.randn(shape) * draw(st.sampled_from(scales))
    with torch.no_grad():
        for _ in range(2):
            network(inputs)
    weight_bits = draw(st.sampled_from([3, 4] if "po" in scheme else [2, 3, 4, 6, 8]))
    momentum = 0.9 if scheme.startswith("adq") else None
    precision = LayerPrecision(weight_bits, draw(st.integers(2, 8)), scheme, momentum)
    names = tuple(parametric_layers(network))
    apply_policy_(network.eval(), Policy.uniform(names, precision, options=options), inputs)
    snap_codebooks_(network.eval())
    return network, inputs


@pytest.mark.slow
@given(networks())
@settings(deadline=None, max_examples=60)
def test_random_shapes_agree(made):
    network, inputs = made
    integer = lower(network, inputs)
    agreement = verify(network, integer, [inputs])
    assert agreement.unexplained == 0
    fast, slow = (every_result(integer, inputs, a) for a in ("fast", "int64"))
    assert all(torch.equal(fast[name].long(), slow[name]) for name in slow)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "bits", "options"), SCHEMES, ids=IDS)
def test_digits_networks_predict_every_class_of_the_test_set(scheme, bits, options, monkeypatch):
    digits = load_task("digits")
    # Ties of float32 rounding may turn a class, so the trained network has to be the same one on
    # every machine, with a C++ compiler or without.
    with monkeypatch.context() as patch:
        patch.setenv("ADQ_SEARCH_COMPILE", "off")
        network = trained(digits.make_network(), digits, scheme, bits, options, epochs=2)
    integer = lower(network, digits.calibration(256, seed=0))
    agreement = verify(network, integer, inputs_of(digits.test))
    assert agreement.is_verified
    assert agreement.ties <= agreement.codes // 10_000
    wanted = evaluate(network, digits.test).accuracy
    assert evaluate(integer, digits.test).accuracy == wanted > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet20_agrees(shortcut):
    torch.manual_seed(0)
    network = resnet20(shortcut=shortcut)
    inputs = torch.randn(32, 3, 32, 32)
    for _ in range(3):
        network(inputs)
    network.eval()
    names = tuple(parametric_layers(network))
    eight, four = LayerPrecision(8, 8, "lsq"), LayerPrecision(4, 4, "asq_post")
    apply_policy_(network, Policy.uniform(names, four, ends=eight, options=SNAPPED), inputs)
    integer = lower(network.eval(), inputs)
    agreement = verify(network, integer, [clearest(network, torch.randn(96, 3, 32, 32), 32)])
    assert agreement.is_verified
    assert agreement.ties <= agreement.codes // 10_000


@torch.no_grad()
def clearest(network, inputs, n):
    """The inputs whose class is clearest: of an untrained network's, some hang on any tie.

    Where ties lie depends on the order in which a processor's convolutions sum.
    """
    first, second = network(inputs).topk(2, dim=1).values.T
    return inputs[(first - second).argsort(descending=True)[:n]]


def quantized(network, inputs, scheme="lsq", *, skip=()):
    precision = LayerPrecision(4, 4, scheme)
    names = parametric_layers(network)
    policy = Policy.of({n: FLOAT if n in skip else precision for n in names})
    return apply_policy_(network.eval(), policy, inputs).eval()


def test_uniform_layers_in_a_row_hand_over_codes():
    """One multiplier and shift from sums to codes, batch norm and ReLU folded in."""
    inputs = torch.rand(8, 1, 6, 6)
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)),
    )
    integer = lower(quantized(network, inputs), inputs)
    assert [layer.is_fused for layer in integer.layers.values()] == [False, True, False]
    names = [operation.result for operation in integer.operations]
    assert names.index("0:sum0") + 1 == names.index("3:codes")


def test_a_broken_network_does_not_verify(task):
    """The check must find what is wrong: a weight, a code, a class."""
    network = trained(Inverted(), task, "lsq", 4, {}, epochs=1)
    integer = lower(network, task.calibration(64, seed=0))
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.expand[0].weight[3] *= -1
    agreement = verify(other, integer, inputs_of(task.test))
    assert not agreement.is_verified
    assert agreement.layers["stem"].unexplained == agreement.layers["expand.0"].unexplained == 0
    assert agreement.layers["depthwise.0"].unexplained > 100


def test_a_tie_is_counted_apart_with_what_follows_from_it():
    """The value 0.5 steps: float32 rounds half to even (0), fixed point rounds it up (1)."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    quantized(network, torch.rand(4, 1))
    with torch.no_grad():
        network[0].input_quantizer.step.fill_(0.25)
        network[0].weight_quantizer.step.fill_(0.5)
        network[1].input_quantizer.step.fill_(0.25)
    integer = lower(network, torch.ones(1, 1))
    agreement = verify(network, integer, [torch.tensor([[0.125], [0.25], [0.5]])])
    assert (agreement.ties, agreement.unexplained, agreement.tied_samples) == (1, 0, 1)
    assert agreement.layers["0"].ties == 1
    assert agreement.layers["1"].downstream == 1


def test_each_layer_alone_differs_by_float32_rounding_only(task):
    for scheme, bits, options in SCHEMES:
        network = trained(Inverted(), task, scheme, bits, options, epochs=1)
        checks = verify_layers(network, task.test.inputs[:50])
        assert list(checks) == list(quantized_layers(network))
        for name, check in checks.items():
            assert check.is_exact, (scheme, name, check)
            assert check.sqnr_db > 120
            has_table = any(power in scheme for power in ("po", "root"))
            assert (check.table_sqnr_db is not None) == has_table
            if check.table_sqnr_db is not None:
                assert check.table_sqnr_db < 60


def test_the_papers_shifts_and_table_run_as_a_network_and_lose_accuracy(task):
    network = trained(Inverted(), task, "post", 4, SNAPPED, epochs=2)
    example = task.calibration(64, seed=0)
    inputs = task.test.inputs[:50]
    exact = lower(network, example)(inputs)
    errors = []
    for bits in (0, 4, 8):
        table = lower(network, example, table_fraction_bits=bits)
        fast, slow = (every_result(table, inputs, a) for a in ("fast", "int64"))
        assert all(torch.equal(fast[name].long(), slow[name]) for name in slow)
        errors.append(float((table(inputs) - exact).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, values):
        return self.fc(values) if values.sum() > 0 else values


REFUSALS = [
    (
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.SiLU(), nn.Conv2d(2, 2, 1)),
        (),
        r"Module '1' \(SiLU\) has no integer form",
    ),
    (
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)),
        ("1",),
        r"Module '1' \(Conv2d\) is in floating point. Give it a precision",
    ),
    (
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(2)),
        (),
        r"Module '1' \(AdaptiveAvgPool2d\) has no integer form",
    ),
    (
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
        (),
        r"Module '1' \(BatchNorm2d\) normalizes by each batch",
    ),
    (
        nn.Sequential(*[nn.Conv2d(1, 1, 1)] * 2),
        (),
        "Layer '0' is called twice",
    ),
]


@pytest.mark.parametrize(
    ("network", "skip", "message"), REFUSALS, ids=[r[2][:28] for r in REFUSALS]
)
def test_what_has_no_integer_form_is_named(network, skip, message):
    inputs = torch.rand(4, 1, 4, 4)
    quantized(network, inputs, skip=skip)
    with pytest.raises(IntegerError, match=message):
        lower(network, inputs)


def test_bad_calls_are_refused():
    inputs = torch.rand(4, 4)
    branching = quantized(Branching(), inputs)
    with pytest.raises(IntegerError, match=r"Branching stops.*without branches on tensors"):
        lower(branching, inputs)
    network = quantized(nn.Sequential(nn.Linear(4, 3)), inputs)
    with pytest.raises(IntegerError, match=r"Call `network.eval\(\)` first"):
        lower(network.train(), inputs)
    integer = lower(network.eval(), inputs)
    with pytest.raises(IntegerError, match=r"\(N, 4\), but got \(2, 5\). Lower the network again"):
        integer(torch.rand(2, 5))
    with pytest.raises(IntegerError, match="Integers have no NaN"):
        integer(torch.tensor([[0.0, 1.0, float("nan"), 2.0]]))
