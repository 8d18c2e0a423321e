"""Trials that several processes train together: equal to one process's, and no one left behind."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

from adq_search import following
from adq_search.checkpoint import TrainingCheckpoint
from adq_search.distill import Teacher
from adq_search.errors import ParallelError
from adq_search.global_batch_norm import global_batch_norms
from adq_search.hosting import HostOptions
from adq_search.job import load_job
from adq_search.leading import leading
from adq_search.parallel import ALONE, Ranks
from adq_search.plan import plan
from adq_search.plugins.optuna_artifacts import publish
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_objective import PolicyObjective, measuring
from adq_search.policy import LayerPrecision, Policy
from adq_search.progress import NoProgress
from adq_search.session import prepare
from adq_search.teacher import make_teacher
from adq_search.training import TrainingSettings
from adq_search.trial import run_trial, weights_of
from tests import tiny
from tests.ranks import Processes, die, impatient

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
SETTINGS = TrainingSettings(epochs=3, batch_size=10, learning_rate=0.05)
SCHEMES = {
    s: LayerPrecision(4, 3, s, 0.9 if s == "adq" else None)
    for s in ("lsq", "asq", "post", "asq_post", "adq")
}


@pytest.fixture(scope="module")
def processes():
    found = Processes(3)
    yield found
    found.stop()


def policy_of(scheme):
    ends = LayerPrecision(8, 8, "lsq")
    return Policy.uniform(("0", "3", "5", "8"), SCHEMES[scheme], ends=ends)


def shaken(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def make_task(*, augmented=False):
    """31 training samples: no batch size divides them."""
    return dataclasses.replace(tiny.make(93), augment=shaken if augmented else None)


def trial(ranks, scheme, settings=SETTINGS, *, dtype=torch.float64, augmented=False, **more):
    """Run a trial; return its result without seconds, and its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        task = make_task(augmented=augmented)
        teacher = Teacher(make_teacher(task, seed=0), task)
        result, network = run_trial(
            policy_of(scheme), task, teacher, settings, {}, ranks=ranks, seed=0, **more
        )
        assert type(network[1]) is nn.BatchNorm2d
        kept = {k: v.tolist() for k, v in weights_of(network).items()}
        return dataclasses.replace(result, wall_s=0.0, train_s=0.0), kept
    finally:
        torch.set_default_dtype(before)


def options_of(ranks, scheme, settings, dtype, augmented):
    return trial(ranks, scheme, settings, dtype=dtype, augmented=augmented)


def check_equal(found, wanted, *, tolerance):
    """Make sure that all processes found the same bits, and one process the same numbers."""
    assert all(result == found[0][0] and kept == found[0][1] for result, kept in found)
    (result, kept), (one, wanted_weights) = found[0], wanted
    for name in ("state", "accuracy", "epochs", "policy"):
        assert getattr(result, name) == getattr(one, name)
    assert result.loss == pytest.approx(one.loss, rel=tolerance)
    assert result.kl == pytest.approx(one.kl, rel=tolerance, abs=tolerance)
    for name, wanted_values in wanted_weights.items():
        values = torch.tensor(kept[name], dtype=torch.float64)
        wanted_tensor = torch.tensor(wanted_values, dtype=torch.float64)
        torch.testing.assert_close(
            values, wanted_tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes_train_the_network_of_one(processes, scheme):
    found = processes.run(options_of, scheme, SETTINGS, torch.float64, False)
    check_equal(found, trial(ALONE, scheme), tolerance=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_single_precision_they_differ_by_rounding(processes, scheme):
    found = processes.run(options_of, scheme, SETTINGS, torch.float32, False)
    check_equal(found, trial(ALONE, scheme, dtype=torch.float32), tolerance=1e-5)


def test_augmentation_is_drawn_for_the_whole_batch(processes):
    found = processes.run(options_of, "asq", SETTINGS, torch.float64, True)
    wanted = trial(ALONE, "asq", augmented=True)
    check_equal(found, wanted, tolerance=1e-12)
    assert wanted[1] != trial(ALONE, "asq")[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("scheme", "size"), [("adq", 10), ("adq", 2), ("asq_post", 2)])
def test_three_processes_share_batches_of_any_size(processes, scheme, size, dtype, tolerance):
    """Of a batch of two, one of three processes gets nothing."""
    settings = SETTINGS.model_copy(update={"batch_size": size, "epochs": 1})
    found = processes.run(options_of, scheme, settings, dtype, False, n=3)
    check_equal(found, trial(ALONE, scheme, settings, dtype=dtype), tolerance=tolerance)


def norms():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, affine=False, momentum=None),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
    ).double()


def step(network, ranks, n, shares):
    random = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, 2, 4, 4, generator=random, dtype=torch.float64)
    targets = torch.randn(n, 5, generator=random, dtype=torch.float64)
    own = shares[ranks.index]
    network.zero_grad()
    (network(inputs[own]) - targets[own]).pow(4).sum().div(n).backward()
    ranks.add_gradients_(network)


def normalized(ranks, batches):
    """Train batch norms for some steps; return their gradients and statistics after each."""
    network = norms()
    seen = []
    with global_batch_norms(network, ranks):
        assert ranks.size == 1 or type(network[1]) is not nn.BatchNorm2d
        for n, shares in batches:
            step(network, ranks, n, shares)
            seen.append([p.grad.tolist() for p in network.parameters()])
            seen.append([b.tolist() for b in network.buffers()])
    assert [type(m) for m in network] == [type(m) for m in norms()]
    return seen


def test_batch_statistics_are_those_of_torch_over_all_processes(processes):
    """Shares of any size, also none; the reference is torch's own batch norm."""
    sizes = [(9, [slice(0, 4), slice(4, 9)]), (7, [slice(0, 6), slice(6, 7)])]
    sizes += [(5, [slice(0, 5), slice(5, 5)]), (5, [slice(0, 0), slice(0, 5)])]
    found = processes.run(normalized, sizes)
    wanted = normalized(ALONE, [(n, [slice(0, n)]) for n, _ in sizes])
    assert found[0] == found[1]
    for ours, theirs in zip(found[0], wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-9, atol=1e-12)


class FusedNorm(nn.BatchNorm2d):
    def forward(self, input):
        return nn.functional.relu(super().forward(input))


def test_a_batch_norm_of_another_class_is_refused():
    network = nn.Sequential(nn.BatchNorm2d(2), FusedNorm(2))
    with (
        pytest.raises(ParallelError, match="'1' would be those of each process's share: FusedNorm"),
        global_batch_norms(network, Ranks(size=2)),
    ):
        pass
    assert type(network[0]) is nn.BatchNorm2d


def test_shares_of_a_batch_are_all_of_it():
    for n in range(12):
        for size in (1, 2, 3, 5):
            shares = [list(range(n))[Ranks(i, size).own(n)] for i in range(size)]
            assert [i for share in shares for i in share] == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Told:
    """A monitor that stops after an epoch, or fails; the first process's alone is asked."""

    def __init__(self, ranks, *, stop=None, fail=None):
        assert ranks.is_first
        self.epochs, self.stop, self.fail = [], stop, fail

    def report(self, epoch, loss):
        self.epochs.append(epoch)
        if epoch == self.fail:
            msg = "the storage is gone"
            raise OSError(msg)

    def should_stop(self):
        return self.epochs[-1] == self.stop


def stopped(ranks):
    monitor = Told(ranks, stop=2) if ranks.is_first else None
    result, _ = trial(ranks, "lsq", monitor=monitor)
    return result.state, result.epochs


def test_the_first_process_decides_when_to_stop(processes):
    assert processes.run(stopped) == [("stopped", 2)] * 2


def failing(ranks):
    trial(ranks, "lsq", monitor=Told(ranks, fail=2) if ranks.is_first else None)


def test_an_error_of_the_first_process_ends_the_others(processes):
    first, second = processes.run(failing)
    assert isinstance(first, OSError)
    assert isinstance(second, ParallelError)
    assert "The first process failed, and this one ends with it: OSError: the storage" in str(
        second
    )


def drawn_apart(ranks):
    trial(ranks, list(SCHEMES)[ranks.index])


def test_processes_with_policies_of_their_own_are_refused(processes):
    for error in processes.run(drawn_apart):
        assert isinstance(error, ParallelError)
        assert "have one trial, but 1 of 0 to 1 came with another than 0" in str(error)


def interrupted(ranks, file):
    def checkpoint():
        return TrainingCheckpoint(file, {}) if ranks.is_first else None

    try:
        monitor = Told(ranks, fail=2) if ranks.is_first else None
        trial(ranks, "adq", monitor=monitor, checkpoint=checkpoint(), augmented=True)
    except (OSError, ParallelError):
        monitor = Told(ranks) if ranks.is_first else None
        return trial(ranks, "adq", monitor=monitor, checkpoint=checkpoint(), augmented=True)


def test_all_processes_go_on_from_the_checkpoint_of_the_first(processes, tmp_path):
    file = tmp_path / "c.safetensors"
    found = processes.run(interrupted, file)
    assert file.exists()
    wanted = processes.run(options_of, "adq", SETTINGS, torch.float64, True)
    assert found == wanted


def led(ranks, folder):
    """Measure two policies in the first process's session; return what each process knows."""
    if not ranks.is_first:
        return following.follow(ranks)
    job = load_job(TINY.read_text(), what="the job")
    with leading(prepare(plan(job), folder), ranks) as session:
        study = optuna.create_study(directions=["maximize", "minimize"])
        study.optimize(PolicyObjective(session), n_trials=2)
        again = session.measure(session.seeds[0].policy, seed=7)
    return [t.values for t in study.trials], again.to_json()


def test_the_others_follow_a_study_that_they_do_not_see(processes, tmp_path):
    (values, again), n_trials = processes.run(led, tmp_path / "first")
    assert len(values) == 2
    assert n_trials == 3
    alone = prepare(plan(load_job(TINY.read_text(), what="the job")), tmp_path / "first")
    result, _ = run_trial(
        alone.seeds[0].policy,
        alone.plan.task,
        alone.teacher,
        alone.plan.job.training,
        {},
        seed=7,
    )
    assert again["loss"] == pytest.approx(result.loss, rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first"]


def too_many(ranks, folder):
    if not ranks.is_first:
        return None
    job = load_job(TINY.read_text(), what="the job").with_training(networks_per_pass=4)
    with leading(prepare(plan(job), folder), ranks):
        pass


def test_networks_are_not_stacked_and_shared_out_at_once(processes, tmp_path):
    first, _ = processes.run(too_many, tmp_path)
    assert "asks for 4 networks a pass. Set networks_per_pass to 1" in str(first)


def missing(ranks):
    group = impatient(ranks, 1.0)
    return group.total(torch.ones(2)).tolist() if ranks.is_first else None


def test_a_silent_process_is_not_waited_for_forever(processes):
    first, _ = processes.run(missing)
    assert isinstance(first, ParallelError)
    assert "Process 0 of 0 to 1 lost the others" in str(first)


def work_without_help(ranks, url, folder):
    """Run a worker whose other process fails in the first trial; return the first one's error."""
    hasty = impatient(ranks, 2.0)
    if ranks.is_first:
        with pytest.raises(ParallelError, match="lost the others"):
            OptunaHost().work(url, "tiny", folder, NoProgress(), ranks=hasty)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "run_trial", out_of_memory)
        with pytest.raises(MemoryError):
            following.follow(hasty)


def out_of_memory(*_, **__):
    raise MemoryError


def test_the_policy_of_a_trial_that_lost_a_process_is_queued_again(processes, tmp_path):
    _, opened, url = begin(tmp_path / "run")
    assert processes.run(work_without_help, url, tmp_path / "w") == [None, None]
    (failed,) = opened.study.get_trials(states=(TrialState.FAIL,))
    (queued,) = opened.study.get_trials(states=(TrialState.WAITING,))
    assert queued.user_attrs["policy_hash"] == failed.user_attrs["policy_hash"]


def begin(folder):
    """Return a session, its published study in a journal file, and the file."""
    session = prepare(plan(load_job(TINY.read_text(), what="the job")), folder)
    url = str(folder / "study.journal")
    opened = OptunaHost()._open_study(session, HostOptions("tiny", url))
    publish(opened.study, session, str(folder / "artifacts"))
    return session, opened, url


def test_a_process_that_dies_is_noticed_at_once():
    found = Processes(2)
    first, second = found.run(die)
    found.stop()
    assert second is None
    assert isinstance(first, ParallelError)
    assert "one has ended or is silent" in str(first)


def test_without_a_group_there_are_no_ranks():
    with pytest.raises(ParallelError, match="Start with torchrun"):
        Ranks.of()


#: Followers cannot even import Optuna.
LAUNCHED = """
import os, sys
if os.environ["RANK"] != "0":
    sys.modules["optuna"] = None
from adq_search.cli import main
main()
"""


@pytest.mark.slow
def test_a_worker_under_torchrun_runs_a_study(tmp_path):
    session, opened, url = begin(tmp_path / "run")
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), "worker", "--storage", url, "--study", "tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert said.returncode == 0, said.stderr
    assert "study 'tiny' has its 6 trials" in said.stdout
    trials = measuring(opened.study.get_trials())
    assert len({t.user_attrs["policy_hash"] for t in trials}) == len(trials) == 6
    assert len({t.user_attrs["worker"] for t in trials}) == 1
    chosen = trials[0]
    policy = session.plan.space.policy_of(chosen.params)
    alone = session.measure(policy)
    shared = json.loads(json.dumps(chosen.user_attrs["result"]))
    assert shared["loss"] == pytest.approx(alone.loss, rel=1e-4)
    assert shared["accuracy"] == pytest.approx(alone.accuracy, abs=0.04)
