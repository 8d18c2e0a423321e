"""A Ray search whose disk is full waits for room, and goes on."""

import errno
import functools
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError
from safetensors import SafetensorError

from adq_search.errors import AdqSearchWarning, StorageError
from adq_search.hosting import HostOptions
from adq_search.job import Job, read_job
from adq_search.plan import plan
from adq_search.plugins import _ray_room
from adq_search.plugins._ray_experiment import first_fault
from adq_search.plugins._ray_records import RayRecord, TrialStore, reconcile, write_record
from adq_search.plugins._ray_room import DiskError, despite_full_disks
from adq_search.plugins.ray_host import RayHost
from adq_search.progress import NoProgress
from adq_search.session import Session, prepare
from tests import clusters, tiny

TINY = Path(__file__).parent / "tiny.yaml"
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    job = read_job(TINY).with_search(prior=None)
    return prepare(plan(job), tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def session(prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path / "session")
    return replace(prepared, folder=tmp_path / "session")


@pytest.fixture
def pauses(monkeypatch):
    """Return the pauses that are made; none of them takes time."""
    made = []
    monkeypatch.setattr(_ray_room.time, "sleep", made.append)
    return made


class Attempts:
    """Fails as told, one attempt after another, and then succeeds."""

    def __init__(self, *faults):
        self.faults = list(faults)

    def __call__(self):
        if self.faults:
            raise self.faults.pop(0)
        return "done"


def wrapped(fault):
    """Return an error as Tune raises it: of another kind, with its cause behind it."""
    error = RuntimeError("the experiment failed")
    error.__context__ = fault
    return error


@pytest.mark.parametrize(
    "fault",
    [FULL, wrapped(FULL), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["plain", "wrapped", "weights"],
)
def test_a_full_disk_is_waited_for_with_doubling_pauses(session, pauses, fault):
    with pytest.warns(AdqSearchWarning, match="No space left on device.* the search waits"):
        assert despite_full_disks(Attempts(fault, fault, fault), session.folder) == "done"
    assert pauses == [0.1, 0.2, 0.4]


def test_a_disk_that_stays_full_ends_the_search_with_a_sentence(session, pauses):
    attempts = Attempts(*[FULL] * 1000)
    with pytest.raises(StorageError, match="a disk does not take them: .*No space.*--resume"):
        despite_full_disks(attempts, session.folder, patience_s=30.0)
    assert sum(pauses) <= 30.0 < sum(pauses) + 2.0 * max(pauses)
    assert max(pauses) == 10.0


def test_patience_begins_anew_with_every_result(session, pauses):
    (session.folder / "trials").mkdir()
    attempts = Attempts(*[FULL] * 12)

    def measure():
        (session.folder / "trials" / f"{len(attempts.faults)}.json").write_text("{}")
        return attempts()

    assert despite_full_disks(measure, session.folder, patience_s=0.2) == "done"
    assert pauses == [0.1] * 12


def test_no_attempt_is_made_before_there_is_room_for_a_network(session, pauses, monkeypatch):
    rooms = iter([False, False, True])

    def open_file(**arguments):
        if not next(rooms):
            raise FULL
        return (session.folder / "room").open("wb")

    monkeypatch.setattr(_ray_room.tempfile, "TemporaryFile", open_file)
    assert despite_full_disks(Attempts(), session.folder) == "done"
    assert len(pauses) == 2
    written = (session.folder / "room").stat().st_size
    assert written == (session.folder / "teacher.safetensors").stat().st_size


def told(fault):
    error = StorageError("there is no such cluster")
    error.__cause__ = fault
    return error


@pytest.mark.parametrize(
    "fault", [ValueError("broken"), told(FULL)], ids=["not of a disk", "told already"]
)
def test_other_faults_are_raised_at_once(session, pauses, fault):
    with pytest.raises(type(fault), match=str(fault)):
        despite_full_disks(Attempts(fault), session.folder)
    assert pauses == []


@pytest.mark.parametrize(("cause", "kind"), [(FULL, DiskError), (ValueError("x"), StorageError)])
def test_a_trial_without_room_is_told_from_a_broken_one(cause, kind):
    error = RayTaskError("trial", f"Traceback\n{cause}", cause)
    assert type(first_fault(["Tune's text of a lost machine", error])) is kind


def test_a_result_that_finds_no_room_at_home_is_not_taken_for_half_written(session, monkeypatch):
    """Else its trial, which has no checkpoint any more, would be trained again."""
    policy = session.seeds[0].policy
    params = session.plan.space.params_of(policy)
    write_record(session.folder, RayRecord(policy.hash, 0, "a", "tiny/a", params, "", "", ""))
    there = session.folder / "ray" / "tiny" / "a" / "checkpoint_000000"
    replace(session, folder=there).measure(policy)
    store = TrialStore(str(session.folder / "ray"))
    with monkeypatch.context() as full:
        full.setattr(Session, "adopt", lambda *_: Attempts(FULL)())
        with pytest.raises(OSError, match="No space left"):
            reconcile(session, store)
    assert reconcile(session, store) == {}
    assert session.result_of(policy) is not None


def cramped(tickets):
    """Return the tiny task; a process that takes a file out of a folder can write no more."""
    return replace(tiny.make(), augment=functools.partial(_fill_the_disk, Path(tickets)))


def _fill_the_disk(tickets, inputs, generator):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ticket = next(tickets.glob("*"), None)
    if soft != 0 and ticket is not None:
        ticket.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    return inputs


@pytest.mark.slow
def test_trials_that_find_no_room_again_and_again_do_not_end_the_search(tmp_path):
    """Tune gives a trial up after four attempts; here the first five find a full disk."""
    tickets = tmp_path / "tickets"
    tickets.mkdir()
    content = read_job(TINY).to_plain()
    content["task"] = "tests.test_ray_room:cramped"
    content["task_options"] = {"tickets": str(tickets)}
    job = Job.model_validate(content).with_search(trials=2, prior=None)
    session = prepare(plan(job), tmp_path / "session")
    for i in range(5):
        (tickets / str(i)).touch()
    clusters.start_here(n_cpus=1)
    try:
        with pytest.warns(AdqSearchWarning, match="the search waits"):
            outcome = RayHost().run(session, HostOptions("tiny"), NoProgress())
    finally:
        ray.shutdown()
    assert len(outcome.trials) == 2
    assert not list(tickets.iterdir())
