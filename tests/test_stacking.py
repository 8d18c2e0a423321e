"""Many networks as one: what each computes, learns and is measured to be."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_search.convert import apply_policy_
from adq_search.distill import Teacher
from adq_search.errors import TaskError
from adq_search.hosting import HostOptions
from adq_search.job import Job
from adq_search.plan import plan
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.progress import NoProgress
from adq_search.session import prepare
from adq_search.stacking import Stack, why_not_stackable
from adq_search.tasks.networks import resnet20, small_resnet
from adq_search.teacher import make_teacher
from adq_search.training import TrainingSettings, fit, fit_stack
from adq_search.trial import fingerprint_of, run_trial, run_trials, weights_of
from tests import tiny

LAYERS = ("0", "3", "5", "8")
ADQ = LayerPrecision(3, 4, "adq", 0.9)
PRECISIONS = {
    "lsq": LayerPrecision(4, 3, "lsq"),
    "asq": LayerPrecision(3, 4, "asq"),
    "post": LayerPrecision(4, 4, "post"),
    "asq_post": LayerPrecision(3, 2, "asq_post"),
    "pot": LayerPrecision(4, 8, "pot"),
    "adq": ADQ,
    "adq+asq": LayerPrecision(2, 2, "adq+asq", 0.99),
    "float": FLOAT,
}
SETTINGS = TrainingSettings(epochs=2, batch_size=10, learning_rate=0.05, networks_per_pass=3)


@pytest.fixture(scope="module")
def task():
    return tiny.make()


@pytest.fixture(scope="module")
def teacher(task):
    return Teacher(make_teacher(task, seed=0), task)


def mixed(shift, layers=LAYERS):
    """Each layer under another scheme, each shift with other ones."""
    kinds = list(PRECISIONS.values())
    return Policy.of({name: kinds[(i + shift) % len(kinds)] for i, name in enumerate(layers)})


def students(task, policies, dtype=torch.float64):
    networks = []
    for policy in policies:
        torch.manual_seed(0)
        network = apply_policy_(task.make_network(), policy, task.calibration(40, seed=0))
        networks.append(network.to(dtype))
    return networks


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("alone", [False, True], ids=["beside others", "all alike"])
def test_a_step_of_the_stack_is_a_step_of_each_network(task, name, alone):
    """Outputs, and every parameter and buffer after one step, in float64."""
    one = Policy.uniform(LAYERS, PRECISIONS[name])
    policies = [one, one, one] if alone else [mixed(0), one, mixed(3), one]
    apart = students(task, policies)
    together = copy.deepcopy(apart)
    batch = next(task.train.batches(10, seed=1))
    inputs = batch.inputs.double()
    stack = Stack([network.train() for network in together])
    losses = F.cross_entropy(stack(inputs).flatten(0, 1), batch.targets.repeat(len(policies)))
    (losses * len(policies)).backward()
    torch.optim.SGD(stack.parameters(), lr=0.1).step()
    stack.unstack_()
    for network, other in zip(apart, together):
        F.cross_entropy(network.train()(inputs), batch.targets).backward()
        torch.optim.SGD(network.parameters(), lr=0.1).step()
        for (key, wanted), found in zip(network.state_dict().items(), other.state_dict().values()):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=key)


def test_training_together_is_training_apart(task, teacher):
    """Momentum, schedule, decay and learning rates of quantizers, over two epochs of float64."""
    double = dataclasses.replace(
        task,
        make_network=lambda: tiny.network().double(),
        train=(task.train.inputs.double(), task.train.targets),
    )
    guide = Teacher(copy.deepcopy(teacher.network).double(), double)
    apart = students(double, [mixed(0), mixed(1), mixed(4)])
    together = copy.deepcopy(apart)
    stack = Stack(together)
    outcomes = fit_stack(stack, double, SETTINGS, teacher=guide, seed=3)
    stack.unstack_()
    for network, other, outcome in zip(apart, together, outcomes):
        wanted = fit(network, double, SETTINGS, teacher=guide, seed=3)
        assert outcome.loss == pytest.approx(wanted.loss, rel=1e-6)
        for key, value in network.state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-5, atol=1e-7)


def timeless(result):
    return dataclasses.replace(result, wall_s=0.0, train_s=0.0)


def test_the_same_pass_repeats_itself_whatever_ran_before(task, teacher):
    policies = [mixed(0), mixed(2), mixed(5)]
    first = run_trials(policies, task, teacher, SETTINGS, [{}] * 3, seed=1)
    torch.manual_seed(99)
    run_trials(policies[:2], task, teacher, SETTINGS, [{}] * 2, seed=2)
    again = run_trials(policies, task, teacher, SETTINGS, [{}] * 3, seed=1)
    for (result, network), (repeated, other) in zip(first, again):
        assert timeless(result) == timeless(repeated)
        assert result.weights_fingerprint == fingerprint_of(weights_of(other))
        assert weights_of(network).keys() == weights_of(other).keys()


def test_a_result_is_that_of_a_trial_alone(task, teacher):
    """Neighbours and places change the order of sums, no more."""
    policy = mixed(2)
    alone, _ = run_trial(policy, task, teacher, SETTINGS, {}, seed=1)
    for policies in ([policy, mixed(0), mixed(1)], [mixed(5), mixed(6), policy], [policy]):
        measured = run_trials(policies, task, teacher, SETTINGS, [{}] * len(policies), seed=1)
        result, _ = measured[policies.index(policy)]
        assert (result.policy, result.state, result.epochs) == (policy, alone.state, alone.epochs)
        assert result.accuracy == pytest.approx(alone.accuracy, abs=0.034)  # one sample of 30
        assert result.loss == pytest.approx(alone.loss, rel=1e-2)
        assert result.health.keys() == alone.health.keys()


def test_a_network_that_diverges_leaves_the_others_alone(task, teacher):
    wild = mixed(1)
    calm = [mixed(0), mixed(4)]
    passes = [calm[0], wild, calm[1]], [*calm]
    networks = students(task, passes[0], torch.float32)
    with torch.no_grad():
        networks[1].get_submodule("8").weight.fill_(torch.nan)
    stack = Stack(networks)
    outcomes = fit_stack(stack, task, SETTINGS, teacher=teacher, seed=0)
    assert [outcome.is_finite for outcome in outcomes] == [True, False, True]
    assert outcomes[1].epochs == 1
    stack.unstack_()
    for key, value in weights_of(networks[2]).items():
        assert bool(value.isfinite().all()), key


class Shuffled(nn.Module):
    """Pads channels, as ResNet's shortcut A does; in a stack that would mix networks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, x):
        return (self.conv(x) + F.pad(x, (0, 0, 0, 0, 1, 1))).mean((2, 3))


class Flipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x).flip(1))


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (small_resnet, (1, 1, 8, 8), None),
        (tiny.network, (1, 1, 4, 4), None),
        (
            lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten()),
            (1, 2, 8),
            None,
        ),
        (resnet20, (1, 3, 8, 8), "refuses stacked channels"),
        (Shuffled, (1, 2, 4, 4), "refuses stacked channels"),
        (Flipped, (1, 4), "something else"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout()), (1, 4), "random numbers"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), (1, 4), "something else"),
    ],
    ids=["resnet", "tiny", "1d", "resnet20", "pads", "flips", "dropout", "other parameters"],
)
def test_what_cannot_be_stacked_is_found(make, shape, reason):
    found = why_not_stackable(make, torch.zeros(shape))
    assert found is None if reason is None else reason in found


def test_token_inputs_cannot_be_stacked():
    assert "int64" in why_not_stackable(tiny.network, torch.zeros(1, 4, dtype=torch.int64))


def job(n):
    return Job.model_validate(
        {
            "task": "tests.tiny:make",
            "space": {
                "default": {"weight_bits": [2, 4, 8], "input_bits": [4], "schemes": ["lsq", "asq"]}
            },
            "training": {"epochs": 1, "batch_size": 10, "networks_per_pass": n},
            "search": {"trials": 7, "prior": None, "seeds": 0},
        }
    )


def test_the_optuna_host_fills_passes_and_measures_exactly_as_many(tmp_path):
    planned = plan(job(3))
    host, options = OptunaHost(), HostOptions(study="s")
    host.check(planned, tmp_path, options)
    session = prepare(planned, tmp_path)
    outcome = host.run(session, options, NoProgress())
    assert len(outcome.trials) == 7
    assert len({t.result.policy for t in outcome.trials}) == 7
    for trial in outcome.trials:
        kept = session.result_of(trial.result.policy)
        assert kept == trial.result
        assert kept.state != "complete" or session.weights_file(kept.policy).exists()


def test_a_pass_that_is_lost_is_run_again_and_measures_only_what_is_new(tmp_path, monkeypatch):
    planned = plan(job(3))
    session = prepare(planned, tmp_path)
    policies = list(planned.space.uniform_policies().values())[:3]
    first = session.measure_together(policies[:1])
    trained = []
    monkeypatch.setattr(
        "adq_search.session.run_trials",
        lambda new, *rest, **more: trained.extend(new) or run_trials(new, *rest, **more),
    )
    again = session.measure_together(policies)
    assert trained == policies[1:]
    assert again[0] == first[0]


def test_the_optuna_host_refuses_networks_that_do_not_stack(tmp_path):
    planned = plan(job(2))
    task = dataclasses.replace(
        planned.task, make_network=lambda: nn.Sequential(*tiny.network(), nn.Dropout())
    )
    with pytest.raises(TaskError, match="Set networks_per_pass to 1"):
        OptunaHost().check(
            dataclasses.replace(planned, task=task), tmp_path, HostOptions(study="s")
        )


def test_half_precision_trains_alone_and_together(task, teacher):
    """bfloat16 has 3 digits: results are near those of float32, and weights stay float32."""
    half = SETTINGS.model_copy(update={"precision": "bfloat16", "epochs": 4})
    full = SETTINGS.model_copy(update={"epochs": 4})
    policies = [mixed(0), mixed(1), mixed(3)]
    wanted, _ = run_trial(policies[0], task, teacher, full, {}, seed=0)
    alone, network = run_trial(policies[0], task, teacher, half, {}, seed=0)
    (stacked, other), *_ = run_trials(policies, task, teacher, half, [{}] * 3, seed=0)
    assert alone.loss != wanted.loss
    for result, trained in ((alone, network), (stacked, other)):
        assert result.loss == pytest.approx(wanted.loss, rel=0.2)
        assert all(p.dtype == torch.float32 for p in trained.parameters())
