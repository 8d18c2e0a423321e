import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from adq_search.distill import Teacher
from adq_search.errors import TaskError
from adq_search.evaluation import evaluate
from adq_search.integer import lower, snap_codebooks_, verify, weight_words
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.store import load_quantized
from adq_search.teacher import load_weights_, make_teacher
from adq_search.training import TrainingSettings, fit
from adq_search.trial import TrialResult, fingerprint_of, run_trial, weights_of
from tests import tiny

LAYERS = ("0", "3", "5", "8")
SETTINGS = TrainingSettings(epochs=2, batch_size=10, learning_rate=0.05)
SCHEMES = {
    s: LayerPrecision(4, 4, s, 0.9 if s == "adq" else None)
    for s in ("lsq", "asq", "pot", "post", "asq_post", "adq")
}


@pytest.fixture(scope="module")
def task():
    return tiny.make()


@pytest.fixture(scope="module")
def teacher(task):
    return Teacher(make_teacher(task, seed=0), task)


def policy_of(precision):
    return Policy.uniform(LAYERS, precision, ends=LayerPrecision(8, 8, "lsq"))


@pytest.mark.parametrize("precision", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_trains_and_is_measured(task, teacher, precision):
    result, network = run_trial(
        policy_of(precision), task, teacher, SETTINGS, {"macs": 1.0}, seed=0
    )
    assert result.state == "complete"
    assert result.epochs == 2
    assert result.accuracy == evaluate(network, task.validation, teacher).accuracy
    assert result.kl == pytest.approx(evaluate(network, task.validation, teacher).kl)
    assert result.accuracy > 0.6
    assert result.cost == {"macs": 1.0}
    assert 0.0 < result.train_s <= result.wall_s
    assert result.health["wrong_sign_steps"] == 0
    back = TrialResult.from_json(json.loads(json.dumps(result.to_json())))
    assert back == result


def test_a_trial_repeats_itself_whatever_ran_before(task, teacher):
    policy = policy_of(SCHEMES["asq"])
    first, network = run_trial(policy, task, teacher, SETTINGS, {}, seed=3)
    torch.manual_seed(99)
    run_trial(policy_of(SCHEMES["adq"]), task, teacher, SETTINGS, {}, seed=1)
    second, again = run_trial(policy, task, teacher, SETTINGS, {}, seed=3)
    timeless = {"wall_s": 0.0, "train_s": 0.0}
    assert dataclasses.replace(first, **timeless) == dataclasses.replace(second, **timeless)
    for a, b in zip(weights_of(network).values(), weights_of(again).values(), strict=True):
        assert torch.equal(a, b)


def test_the_teacher_is_left_as_it_was(task, teacher):
    before = weights_of(teacher.network)
    run_trial(policy_of(SCHEMES["adq"]), task, teacher, SETTINGS, {}, seed=0)
    after = weights_of(teacher.network)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_loss_that_is_not_finite_is_an_outcome(task, teacher):
    wild = TrainingSettings(epochs=3, batch_size=10, learning_rate=1e30)
    result, _ = run_trial(policy_of(SCHEMES["lsq"]), task, teacher, wild, {}, seed=0)
    assert result.state == "diverged"
    assert "loss" in result.reason
    assert "chance" not in result.reason
    assert result.accuracy is None or math.isfinite(result.accuracy)
    json.dumps(result.to_json(), allow_nan=False)


def test_accuracy_at_chance_is_an_outcome(task, teacher):
    """A teacher of random weights, trained on for one step of no size, stays at chance."""
    torch.manual_seed(0)
    blank = task.make_network()
    for parameter in blank.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(blank[0].weight, 1.0)
    still = TrainingSettings(epochs=1, batch_size=10, learning_rate=1e-12)
    result, _ = run_trial(
        Policy.uniform(LAYERS, FLOAT), task, Teacher(blank, task), still, {}, seed=0
    )
    assert result.state == "diverged"
    assert "at chance" in result.reason
    assert result.accuracy == pytest.approx(1 / 3, abs=0.05)


class StopAfterOne:
    def __init__(self):
        self.heard = []

    def report(self, epoch, loss):
        self.heard.append(epoch)

    def should_stop(self):
        return True


def test_a_monitor_can_stop_a_trial_and_it_says_so(task, teacher):
    monitor = StopAfterOne()
    long = TrainingSettings(epochs=5, batch_size=10, learning_rate=0.05)
    result, _ = run_trial(
        policy_of(SCHEMES["lsq"]), task, teacher, long, {}, monitor=monitor, seed=0
    )
    assert (result.state, result.epochs, monitor.heard) == ("stopped", 1, [1])
    assert result.accuracy is not None


def test_distillation_can_be_switched_off(task, teacher):
    alone = SETTINGS.model_copy(
        update={"distillation": SETTINGS.distillation.model_copy(update={"enabled": False})}
    )
    with_teacher, _ = run_trial(policy_of(SCHEMES["lsq"]), task, teacher, SETTINGS, {}, seed=0)
    without, _ = run_trial(policy_of(SCHEMES["lsq"]), task, teacher, alone, {}, seed=0)
    assert with_teacher.loss != without.loss


@pytest.mark.parametrize("precision", SCHEMES.values(), ids=SCHEMES)
def test_saved_weights_give_the_same_network(task, teacher, precision, tmp_path):
    policy = policy_of(precision)
    result, network = run_trial(policy, task, teacher, SETTINGS, {}, seed=0)
    save_file(weights_of(network), tmp_path / "w.safetensors")
    loaded = load_quantized(task, policy, tmp_path / "w.safetensors")
    network.eval()
    for batch in task.test.batches(8):
        assert torch.equal(loaded(batch.inputs), network(batch.inputs))
    with pytest.raises(TaskError, match="does not fit the network"):
        load_quantized(task, policy_of(LayerPrecision(5, 4, "lsq")), tmp_path / "w.safetensors")


def test_damaged_and_missing_weights_are_refused(task, tmp_path):
    file = tmp_path / "w.safetensors"
    with pytest.raises(TaskError, match="no weights file"):
        load_weights_(task.make_network(), file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(TaskError, match="damaged"):
        load_weights_(task.make_network(), file)


def test_a_teacher_that_diverges_says_what_to_lower(task):
    recipe = dataclasses.replace(task.teacher, learning_rate=1e30)
    with pytest.raises(TaskError, match="Lower its learning rate"):
        make_teacher(dataclasses.replace(task, teacher=recipe), seed=0)


def test_teacher_weights_come_from_a_file(task, teacher, tmp_path):
    save_file(weights_of(teacher.network), tmp_path / "t.safetensors")
    recipe = dataclasses.replace(task.teacher, weights_file=tmp_path / "t.safetensors")
    loaded = make_teacher(dataclasses.replace(task, teacher=recipe), seed=5)
    for a, b in zip(weights_of(loaded).values(), weights_of(teacher.network).values(), strict=True):
        assert torch.equal(a, b)


def test_data_order_follows_the_seed_alone(task):
    networks = [task.make_network() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    losses = [fit(n, task, SETTINGS, seed=7).loss for n in networks]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_adq_is_measured_as_it_is_deployed(task, teacher, bits):
    """The accuracy of a trial is that of 8-bit level words: nothing moves at export."""
    policy = policy_of(LayerPrecision(bits, 4, "adq", 0.9))
    result, network = run_trial(policy, task, teacher, SETTINGS, {}, seed=0)
    network.eval()
    before = weights_of(network)
    assert max(snap_codebooks_(network).values()) < 1e-7
    after = weights_of(network)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.weights_fingerprint == fingerprint_of(after)
    for name in ("3", "5"):
        layer = network.get_submodule(name)
        words = weight_words(layer.weight_quantizer, layer.weight).banks[0]
        assert int(words.abs().max()) == 127
    integer = lower(network, task.calibration(90, seed=0))
    agreement = verify(network, integer, [batch.inputs for batch in task.validation.batches(30)])
    assert agreement.unexplained == 0
    assert agreement.is_verified
    assert evaluate(integer, task.validation).accuracy == result.accuracy


def test_a_fingerprint_sees_every_bit_and_every_name():
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    made = fingerprint_of(weights)
    assert made == fingerprint_of(dict(reversed(weights.items())))
    moved = torch.ones(2).nextafter(torch.tensor(2.0))
    for other in (
        {**weights, "b": moved},
        {**weights, "a": torch.zeros(3, 2)},
        {"a": weights["a"], "c": weights["b"]},
    ):
        assert fingerprint_of(other) != made
