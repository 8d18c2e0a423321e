"""Training that is interrupted goes on bit for bit; what is damaged or foreign is left aside."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adq_search.checkpoint import TrainingCheckpoint, _checksum, read_checkpoint, training_state
from adq_search.convert import apply_policy_
from adq_search.distill import DistillationSettings, Teacher
from adq_search.errors import AdqSearchWarning, TaskError
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.session import prepare
from adq_search.store import load_quantized
from adq_search.teacher import load_weights_, make_teacher
from adq_search.training import TrainingSettings, fit
from adq_search.trial import run_trial, weights_of
from adq_search.warm_start import Donor
from tests import tiny

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny.yaml"
LAYERS = ("0", "3", "5", "8")
SETTINGS = TrainingSettings(epochs=4, batch_size=8, learning_rate=0.05)
MINE = {"policy": "a", "seed": "0"}


def augment(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


class Interrupted(Exception):
    pass


class Watch:
    """Hears every epoch; is interrupted, or asks to stop, after some."""

    def __init__(self, *, interrupt_at=None, stop_at=None):
        self.heard, self.asked = [], 0
        self._interrupt_at, self._stop_at = interrupt_at, stop_at

    def report(self, epoch, loss):
        self.heard.append((epoch, loss))
        if epoch == self._interrupt_at:
            raise Interrupted

    def should_stop(self):
        self.asked += 1
        return self.heard[-1][0] == self._stop_at


@pytest.fixture(scope="module")
def task():
    return tiny.make()


@pytest.fixture(scope="module")
def teacher(task):
    return Teacher(make_teacher(task, seed=0), task)


def policy_of(scheme, momentum=None):
    precision = FLOAT if scheme == "float" else LayerPrecision(3, 4, scheme, momentum)
    return Policy.uniform(LAYERS, precision, ends=LayerPrecision(8, 8, "lsq"))


def trial(policy, task, teacher, settings, *, checkpoint=None, monitor=None):
    """Run a trial as another process does: with answers of the teacher of its own."""
    fresh = Teacher(teacher.network, task)
    return run_trial(
        policy, task, fresh, settings, {}, checkpoint=checkpoint, monitor=monitor, seed=3
    )


def timeless(result):
    return dataclasses.replace(result, wall_s=0.0, train_s=0.0)


def with_dropout():
    """Random numbers that the network itself draws, from torch's global generator."""
    network = tiny.network()
    network[6] = nn.Dropout(0.2)
    return network


CASES = {
    **{scheme: (scheme, {}, {}) for scheme in ("float", "lsq", "asq", "post", "asq_post", "adq")},
    **{f"{s}, augmented": (s, {}, {"augment": augment}) for s in ("lsq", "asq_post", "adq")},
    "dropout": ("adq", {}, {"make_network": with_dropout}),
    "no momentum": ("adq", {"momentum": 0.0}, {}),
    "labels alone": ("adq", {"distillation": DistillationSettings(enabled=False)}, {}),
    "bfloat16": ("asq", {"precision": "bfloat16"}, {}),
}


@pytest.mark.parametrize(("scheme", "changes", "of_task"), CASES.values(), ids=CASES)
def test_an_interrupted_trial_ends_as_one_that_was_not(
    scheme, changes, of_task, task, teacher, tmp_path
):
    task = dataclasses.replace(task, **of_task)
    settings = SETTINGS.model_copy(update=changes)
    policy = policy_of(scheme, 0.9 if scheme == "adq" else None)
    expected = trial(policy, task, teacher, settings, monitor=(whole := Watch()))
    file = tmp_path / "c.safetensors"
    for epoch in (1, 3):
        with pytest.raises(Interrupted):
            trial(
                policy,
                task,
                teacher,
                settings,
                checkpoint=TrainingCheckpoint(file, MINE),
                monitor=Watch(interrupt_at=epoch),
            )
    torch.manual_seed(99)
    resumed = TrainingCheckpoint(file, MINE)
    again = trial(policy, task, teacher, settings, checkpoint=resumed, monitor=(rest := Watch()))
    assert resumed.resumed_epochs == 3
    assert timeless(again[0]) == timeless(expected[0])
    assert rest.heard == whole.heard
    assert (whole.asked, rest.asked) == (3, 1)
    for a, b in zip(weights_of(again[1]).values(), weights_of(expected[1]).values(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def interrupted(task, teacher, tmp_path_factory):
    """A checkpoint of two epochs, and the result that its training has in the end."""
    policy = policy_of("adq", 0.9)
    file = tmp_path_factory.mktemp("interrupted") / "c.safetensors"
    checkpoint = TrainingCheckpoint(file, MINE)
    with pytest.raises(Interrupted):
        trial(policy, task, teacher, SETTINGS, checkpoint=checkpoint, monitor=Watch(interrupt_at=2))
    return file, trial(policy, task, teacher, SETTINGS)[0]


def copy_of(file, change):
    """Return the tensors and the header of a checkpoint, changed."""
    header, tensors = read_checkpoint(file)
    content = json.loads(header.model_dump_json())
    change(tensors, content)
    return tensors, {"checkpoint": json.dumps(content)}


def write_whole(path, tensors, metadata):
    """Write what may be anything but damaged: its checksum is right."""
    content = json.loads(metadata["checkpoint"])
    content["crc32"] = _checksum(tensors)
    save_file(tensors, path, metadata={"checkpoint": json.dumps(content)})


class Malice:
    """Unpickling this makes a folder."""

    def __init__(self, folder):
        self._folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self._folder),))


DAMAGES = {
    "empty": lambda content: b"",
    "first byte": lambda content: content[:1],
    "header alone": lambda content: content[: 8 + struct.unpack("<Q", content[:8])[0]],
    "half": lambda content: content[: len(content) // 2],
    "last byte lost": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "one bit": lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
    "zeros": lambda content: bytes(len(content)),
    "long header": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "nested header": lambda content: struct.pack("<Q", 80_000) + b"[" * 80_000,
    "other file": lambda content: b"PK\3\4" + content,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_left_aside_and_said(damage, interrupted, task, teacher, tmp_path):
    file, expected = interrupted
    damaged = tmp_path / "c.safetensors"
    damaged.write_bytes(damage(file.read_bytes()))
    begins_anew(damaged, expected, task, teacher, "is damaged: .* The training begins anew")


def begins_anew(file, expected, task, teacher, match):
    checkpoint = TrainingCheckpoint(file, MINE)
    with pytest.warns(AdqSearchWarning, match=match):
        result, _ = trial(expected.policy, task, teacher, SETTINGS, checkpoint=checkpoint)
    assert checkpoint.resumed_epochs == 0
    assert timeless(result) == timeless(expected)
    assert len(read_checkpoint(file)[0].losses) == SETTINGS.epochs


def test_nothing_is_unpickled(interrupted, task, teacher, tmp_path):
    _, expected = interrupted
    trap = tmp_path / "trap"
    for name in ("c.safetensors", "w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Malice(trap), protocol=2))
    torch.save({"0.weight": Malice(trap)}, tmp_path / "zip.pth")
    begins_anew(tmp_path / "c.safetensors", expected, task, teacher, "is damaged")
    with pytest.raises(TaskError, match="does not fit the network or is damaged"):
        load_weights_(task.make_network(), tmp_path / "w.safetensors")
    for name in ("w.pth", "zip.pth"):
        with pytest.raises(TaskError, match=r"more than tensors by name\. Nothing in it was run"):
            load_weights_(task.make_network(), tmp_path / name)
    with pytest.raises(TaskError, match="does not fit the network or is damaged"):
        load_quantized(task, expected.policy, tmp_path / "w.safetensors")
    assert not trap.exists()


def forget(tensors, content):
    del tensors["network.3.weight"]


def add(tensors, content):
    tensors["network.9.weight"] = torch.zeros(1)


def reshape(tensors, content):
    tensors["momentum.0.weight"] = torch.zeros(4, 9)


def widen(tensors, content):
    tensors["network.1.running_mean"] = tensors["network.1.running_mean"].double()


def shorten(tensors, content):
    tensors["random.global"] = tensors["random.global"][:10]


def break_generator(tensors, content):
    tensors["random.augmentation"] = torch.full_like(tensors["random.augmentation"], 255)


def be_of_another_policy(tensors, content):
    content["identity"]["policy"] = "b"


def be_of_more_parts(tensors, content):
    content["identity"]["donor"] = "c"


def be_of_another_version(tensors, content):
    content["version"] = 2


def have_trained_nothing(tensors, content):
    content["losses"] = []


FOREIGN = [
    (forget, "'network.3.weight' is missing there"),
    (add, "'network.9.weight' is torch.float32 .1,. there, missing here"),
    (reshape, "'momentum.0.weight' is torch.float32 .4, 9. there, torch.float32 .4, 1, 3, 3. here"),
    (widen, "'network.1.running_mean' is torch.float64 .4,. there"),
    (shorten, "'random.global' is torch.uint8 .10,. there"),
    (break_generator, "is damaged: 'random.augmentation'"),
    (be_of_another_policy, r"is of another training: policy \(policy b there, a here\)"),
    (be_of_more_parts, r"is of another training: donor \(donor c there, None here\)"),
    (be_of_another_version, "'version': Input should be 1"),
    (have_trained_nothing, "'losses': List should have at least 1 item"),
]


@pytest.mark.parametrize(("change", "match"), FOREIGN, ids=[c.__name__ for c, _ in FOREIGN])
def test_what_is_not_of_this_training_is_left_aside(
    change, match, interrupted, task, teacher, tmp_path
):
    file, expected = interrupted
    write_whole(tmp_path / "c.safetensors", *copy_of(file, change))
    begins_anew(tmp_path / "c.safetensors", expected, task, teacher, match)


def test_weights_without_a_header_are_no_checkpoint(interrupted, task, teacher, tmp_path):
    _, expected = interrupted
    save_file(weights_of(teacher.network), tmp_path / "c.safetensors")
    begins_anew(tmp_path / "c.safetensors", expected, task, teacher, "is none: .* has no header")


def test_a_checkpoint_that_cannot_be_written_stops_nothing(interrupted, task, teacher, tmp_path):
    _, expected = interrupted
    (tmp_path / "file").write_text("in the way of a folder")
    checkpoint = TrainingCheckpoint(tmp_path / "file" / "c.safetensors", MINE)
    with pytest.warns(AdqSearchWarning, match=r"cannot be written: .* Make room"):
        result, _ = trial(expected.policy, task, teacher, SETTINGS, checkpoint=checkpoint)
    assert timeless(result) == timeless(expected)


def test_a_stop_at_the_epoch_of_the_checkpoint_is_not_forgotten(task, teacher, tmp_path):
    """Killed between the file and the decision: the monitor is asked again, of that epoch first."""
    policy, file = policy_of("lsq"), tmp_path / "c.safetensors"
    checkpoint = TrainingCheckpoint(file, MINE)
    with pytest.raises(Interrupted):
        trial(policy, task, teacher, SETTINGS, checkpoint=checkpoint, monitor=Watch(interrupt_at=2))
    stopped = Watch(stop_at=2)
    checkpoint = TrainingCheckpoint(file, MINE)
    result, _ = trial(policy, task, teacher, SETTINGS, checkpoint=checkpoint, monitor=stopped)
    assert (result.state, result.epochs, stopped.asked) == ("stopped", 2, 1)
    alone, _ = trial(policy, task, teacher, SETTINGS, monitor=Watch(stop_at=2))
    assert timeless(result) == timeless(alone)


def test_a_checkpoint_is_written_no_more_often_than_asked(task, tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr("adq_search.checkpoint.time.monotonic", lambda: seconds[0])
    file, saved = tmp_path / "c.safetensors", []

    class Clock(Watch):
        def report(self, epoch, loss):
            super().report(epoch, loss)
            seconds[0] += 10.0

    settings = SETTINGS.model_copy(update={"epochs": 12})
    checkpoint = TrainingCheckpoint(file, MINE, every_s=30.0, on_saved=saved.append)
    fit(task.make_network(), task, settings, monitor=Clock(), checkpoint=checkpoint, seed=0)
    assert saved == [4, 7, 10]
    header, _ = read_checkpoint(file)
    assert (len(header.losses), header.steps, header.train_s) == (10, 40, 90.0)
    checkpoint.remove()
    checkpoint.remove()
    assert not file.exists()


@pytest.mark.slow
def test_a_trial_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    """Another process is killed with SIGKILL in mid-trial; this one trains the rest alone."""
    job = read_job(TINY).with_training(epochs=5, checkpoint_every_s=0.0)
    session = prepare(plan(job), tmp_path / "run")
    reference = prepare(plan(job), tmp_path / "other")
    policy = session.seeds[1].policy
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from adq_search.session import reopen\n"
        "torch.set_num_threads(1)\n"
        "class Kill:\n"
        "    def report(self, epoch, loss):\n"
        "        if epoch == 3:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    def should_stop(self):\n"
        "        return False\n"
        "session = reopen(Path(sys.argv[1]))\n"
        "session.measure(session.seeds[1].policy, Kill())\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(session.folder)], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    assert session.result_of(policy) is None
    assert len(read_checkpoint(session.checkpoint_file(policy))[0].losses) == 3
    half_written = session.folder / "checkpoints" / f".{policy.hash}.safetensors.abcd"
    half_written.write_bytes(b"as of a process that was killed while it wrote")
    trained = []
    after_epoch = TrainingCheckpoint.after_epoch

    def noted(self, *arguments, **named):
        trained.append(named["losses"])
        after_epoch(self, *arguments, **named)

    monkeypatch.setattr(TrainingCheckpoint, "after_epoch", noted)
    result = session.measure(policy, watch := Watch())
    assert len(trained) == 2
    assert [epoch for epoch, _ in watch.heard] == [1, 2, 3, 4, 5]
    assert list((session.folder / "checkpoints").iterdir()) == []
    assert timeless(result) == timeless(reference.measure(policy))
    assert len(trained) == 2 + 5


def test_how_often_to_save_is_no_part_of_a_job(tmp_path):
    job = read_job(TINY)
    often = job.with_training(checkpoint_every_s=0.0)
    assert plan(job).fingerprint == plan(often).fingerprint
    session = prepare(plan(job), tmp_path)
    short = session.measure(session.seeds[0].policy)
    assert short.state == "complete"
    assert not (tmp_path / "checkpoints").exists()


def test_a_warm_trial_keeps_the_donor_that_it_began_from(task, teacher, tmp_path):
    """By the time it goes on, or where it goes on, another donor may be the nearest one."""
    policy, donors = policy_of("lsq"), []
    for scheme in ("post", "asq"):
        result, network = trial(policy_of(scheme), task, teacher, SETTINGS)
        donors.append(Donor(result.policy, weights_of(network), result.epochs))
    begin = partial(run_trial, policy, task, teacher, SETTINGS, {}, seed=3)
    expected, _ = begin(donor=donors[0])
    file = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        begin(
            donor=donors[0],
            checkpoint=TrainingCheckpoint(file, MINE),
            monitor=Watch(interrupt_at=2),
        )
    for other in (donors[1], None):
        kept = TrainingCheckpoint(tmp_path / "copy.safetensors", MINE)
        shutil.copy(file, kept.file)
        result, _ = begin(donor=other, checkpoint=kept)
        assert (result.donor, result.epochs_before) == (donors[0].policy.hash, 4)
        assert timeless(result) == timeless(expected)


def test_every_tensor_comes_back(task, interrupted):
    """Running statistics too, though batch norms are re-estimated before anything is measured."""
    file, _ = interrupted
    network = task.make_network()
    policy = policy_of("adq", 0.9)
    apply_policy_(network, policy, task.calibration(20, seed=0))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses, steps = TrainingCheckpoint(file, MINE).restore_(network, optimizer, generator)
    header, tensors = read_checkpoint(file)
    found = training_state(network, optimizer, generator)
    assert (losses, steps) == (header.losses, header.steps)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
