"""Kill workers, driver and database at random moments: nothing is lost, nothing is done twice."""

import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_objective import measuring, result_of
from adq_search.plugins.optuna_storage import open_storage
from adq_search.plugins.optuna_worker import FINISHED
from adq_search.session import prepare
from tests.faults.evidence import judge_front, trainings
from tests.faults.processes import STUDY, drive, start, work
from tests.servers import Database

TINY = Path(__file__).parent.parent / "tiny.yaml"
N_TRIALS = 40
N_KILLS = 18
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    job = read_job(TINY).with_search(trials=N_TRIALS)
    prepare(plan(job.with_training(checkpoint_every_s=0.0)), folder)
    return folder


@pytest.fixture(scope="module")
def database():
    found = Database()
    yield found
    found.stop()


class Campaign:
    """A driver and two workers on one study, and what was seen of it so far."""

    def __init__(self, url, folder, seed):
        self.url = url
        self.folder = folder
        self.log = folder / "trainings.log"
        self.random = random.Random(seed)
        self.seen = {}
        self.n_started = 0
        self.driver = start(drive, url, str(folder / "run"), str(self.log), False)
        self.wait_for(1)
        self.workers = [self.start_worker() for _ in range(2)]

    def start_worker(self):
        self.n_started += 1
        place = self.folder / f"worker{self.n_started}"
        return start(work, self.url, str(place), str(self.log))

    def kill_a_worker(self):
        at = self.random.randrange(len(self.workers))
        self.blow(self.workers[at])
        self.workers[at] = self.start_worker()

    def kill_the_driver(self):
        self.blow(self.driver)
        self.driver = start(drive, self.url, str(self.folder / "run"), str(self.log), True)

    def leave_half_checkpoints(self):
        """Kill a worker, and leave no checkpoint whole, as a crash of its file system may."""
        self.kill_a_worker()
        for pattern in ("*/checkpoints/*.safetensors", "run/artifacts/checkpoint-*"):
            for file in self.folder.glob(pattern):
                with suppress(FileNotFoundError):  # its trial has just finished
                    content = file.read_bytes()
                    half = file.with_name(f".{file.name}.half")
                    half.write_bytes(content[: len(content) // 2])
                    half.replace(file)

    def blow(self, process):
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), self.said()  # 0: it had finished

    def finished(self):
        try:
            study = optuna.load_study(
                study_name=STUDY, storage=open_storage(self.url, patience_s=30.0)
            )
        except KeyError:
            return []
        return measuring(study.get_trials(deepcopy=False, states=FINISHED))

    def check(self):
        """Nothing that was finished has changed; no policy is measured twice."""
        trials = self.finished()
        now = {t.number: (t.user_attrs["policy_hash"], t.state, t.values) for t in trials}
        assert {number: now.get(number) for number in self.seen} == self.seen
        hashes = [name for name, _, _ in now.values()]
        assert len(set(hashes)) == len(hashes) <= N_TRIALS
        ended = {t.user_attrs["policy_hash"]: t.datetime_complete.timestamp() for t in trials}
        again = [name for name, at in trainings(self.log) if at > ended.get(name, at) + 0.5]
        assert again == []
        self.seen = now

    def end(self):
        """Let the driver and the workers finish, and judge the results."""
        self.driver.join(600)
        for worker in self.workers:
            worker.join(300)
        assert [p.exitcode for p in (self.driver, *self.workers)] == [0, 0, 0], self.said()
        self.check()
        assert len(self.seen) == N_TRIALS

    def said(self):
        return "".join(f.read_text() for f in self.folder.glob("*/said.txt"))

    def wait_for(self, n_finished):
        deadline = time.monotonic() + 300
        while len(self.finished()) < n_finished:
            assert time.monotonic() < deadline, self.said()
            assert self.driver.exitcode in (None, 0), self.said()
            time.sleep(0.05)

    def stop(self):
        for process in [self.driver, *self.workers]:
            process.kill()
            process.join()


@pytest.fixture
def campaign(request, prepared, database, tmp_path):
    kind, seed = request.param
    url = database.fresh_url() if kind == "postgresql" else str(tmp_path / "study.journal")
    shutil.copytree(prepared, tmp_path / "run")
    found = Campaign(url, tmp_path, seed)
    yield found
    found.stop()


@pytest.mark.parametrize(
    "campaign", [("journal", 1), ("postgresql", 2)], indirect=True, ids=["journal", "postgresql"]
)
def test_kills_at_random_moments_lose_nothing(campaign, database):
    def restart_database():
        database.kill()
        time.sleep(campaign.random.uniform(0.0, 1.0))
        database.start()

    def leave_half_a_line():
        """As a writer does that is killed while it appends."""
        lock = JournalFileSymlinkLock(campaign.url)
        lock.acquire()
        with Path(campaign.url).open("ab") as journal:
            journal.write(b'{"op_code": 8, "worker_id"')
        lock.release()

    is_journal = campaign.url.endswith(".journal")
    faults = [campaign.kill_a_worker, campaign.kill_a_worker, campaign.kill_the_driver]
    faults.append(campaign.leave_half_checkpoints)
    faults.append(leave_half_a_line if is_journal else restart_database)
    order = [faults[i % len(faults)] for i in range(N_KILLS)]
    campaign.random.shuffle(order)
    for n_before, fault in enumerate(order):
        # Faults are spread over the whole search, however fast the machine is.
        campaign.wait_for(n_before * N_TRIALS // N_KILLS)
        time.sleep(campaign.random.uniform(0.0, 0.5))
        fault()
        campaign.check()
    campaign.end()
    complete = [t for t in campaign.finished() if t.values]
    judge_front(campaign.folder / "run", [result_of(t) for t in complete])
