"""Kill trials, driver and nodes of a Ray search at random moments, and tear its files."""

import json
import math
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adq_search.job import read_job
from adq_search.plugins._ray_records import hosted_trials, records_of
from adq_search.session import reopen
from tests import clusters
from tests.faults.evidence import judge_front, trainings
from tests.faults.processes import STUDY, command, start

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
N_TRIALS = 28
PATIENCE_S = 300
pytestmark = pytest.mark.slow


class Campaign:
    """A driver on a cluster of three nodes, and what was seen of its search so far."""

    def __init__(self, cluster, folder, seed):
        self.cluster = cluster
        self.folder = folder
        self.run = folder / "run"
        self.harm = folder / "harm"
        self.log = folder / "trainings.log"
        self.random = random.Random(seed)
        self.seen = {}
        self.harm.mkdir()
        content = read_job(TINY).to_plain()
        content["task"] = "tests.faults.evidence:noted_task"
        content["task_options"] = {"harm": str(self.harm), "log": str(self.log)}
        content["training"] |= {"epochs": 4, "checkpoint_every_s": 0.0}
        content["search"] |= {"trials": N_TRIALS, "pruner": "front"}
        (folder / "job.yaml").write_text(json.dumps(content))
        self.driver = self.start_driver()
        self.wait_for(1)

    def start_driver(self, *more):
        arguments = ["run", str(self.folder / "job.yaml"), "--out", str(self.run)]
        arguments += ["--study", STUDY, "--host", "ray", "--address", self.cluster.address]
        return start(command, str(self.folder), [*arguments, *more])

    def kill_a_trial(self):
        """Have the next training that takes a batch kill its process."""
        self.harm_a_trial("kill")

    def fill_the_disk_of_a_trial(self):
        """Let the process of a trial write nothing from now on."""
        self.harm_a_trial("full")

    def kill_the_driver(self):
        self.driver.kill()
        self.driver.join()
        assert self.driver.exitcode == -signal.SIGKILL, self.said()
        self.driver = self.start_driver("--resume")

    def fill_the_disk_of_the_driver(self):
        """Let the driver write nothing for a while, as on a full disk; then make room."""
        fill_the_disk(self.driver.pid)
        time.sleep(self.random.uniform(1.0, 3.0))
        make_room(self.driver.pid)

    def kill_a_node(self):
        node = self.random.choice(sorted(self.cluster.worker_nodes, key=str))
        clusters.replace_node(self.cluster, node)

    def tear_files(self):
        """Kill the driver, and leave half of all that Ray has written: it is a cache."""
        self.driver.kill()
        self.driver.join()
        for file in (self.run / "ray").rglob("*"):
            if file.is_file():
                halve(file)
        for folder in ("trials", "ray_trials", "weights"):
            (self.run / folder).mkdir(exist_ok=True)
            (self.run / folder / ".torn.json.1a2b").write_text('{"policy": {"lay')
        self.driver = self.start_driver("--resume")

    def harm_a_trial(self, what):
        file = self.harm / what
        file.touch()
        self.wait_until(lambda: not file.exists())

    def results(self):
        """Return the bytes of every result, by the hash of its policy."""
        return {f.stem: f.read_bytes() for f in (self.run / "trials").glob("*.json")}

    def check(self):
        """Nothing finished has changed or was trained again; each trial has its own policy."""
        now = self.results()
        assert {name: now.get(name) for name in self.seen} == self.seen
        assert len(now) <= N_TRIALS
        records = records_of(self.run)
        assert {r.policy_hash for r in records} >= now.keys()
        assert len({r.number for r in records}) == len(records)
        ended = {name: at * 1e-9 for name, at in clusters.measured_in(self.run).items()}
        again = [t for t in trainings(self.log) if t.began_at > ended.get(t.policy_hash, math.inf)]
        assert again == []
        self.seen = now

    def end(self):
        """Let the driver finish, and judge the results."""
        self.driver.join(PATIENCE_S)
        assert self.driver.exitcode == 0, self.said()
        self.check()
        hosted = hosted_trials(reopen(self.run))
        assert len(self.seen) == len(hosted) == len(records_of(self.run)) == N_TRIALS
        judge_front(self.run, [t.result for t in hosted])

    def said(self):
        return (self.folder / "said.txt").read_text()

    def wait_for(self, n_finished):
        self.wait_until(lambda: len(self.results()) >= n_finished)

    def wait_until(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while True:
            is_over = self.driver.exitcode is not None or time.monotonic() > deadline
            if condition():
                return
            assert not is_over, self.said()
            time.sleep(0.05)

    def stop(self):
        self.driver.kill()
        self.driver.join()


def halve(file):
    """Leave the first half of a file, in its place."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.fixture
def campaign(tmp_path):
    with clusters.nodes(3) as cluster:
        found = Campaign(cluster, tmp_path, seed=1)
        yield found
        found.stop()


def test_kills_at_random_moments_lose_nothing(campaign):
    order = 3 * [campaign.kill_a_trial] + 3 * [campaign.kill_the_driver]
    order += 2 * [campaign.kill_a_node] + [campaign.tear_files]
    order += [campaign.fill_the_disk_of_a_trial, campaign.fill_the_disk_of_the_driver]
    campaign.random.shuffle(order)
    for n_before, fault in enumerate(order):
        # Faults are spread over the search, however fast the machine is; the last comes before
        # its end.
        campaign.wait_for(n_before * N_TRIALS // (len(order) + 3))
        time.sleep(campaign.random.uniform(0.0, 0.5))
        fault()
        campaign.check()
    campaign.end()
    tear_a_result(campaign)


def test_a_search_on_a_full_disk_waits_for_room_and_goes_on(tmp_path):
    n_trials = 40
    command = [sys.executable, "-m", "adq_search.cli", "run", str(TINY), "--out", str(tmp_path)]
    command += ["--host", "ray", "--trials", str(n_trials)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        while len(clusters.measured_in(tmp_path)) < 2:
            assert driver.poll() is None
            time.sleep(0.05)
        fill_the_disk(driver.pid)
        waits = next((line for line in driver.stdout if "the search waits" in line), "")
        before = clusters.measured_in(tmp_path)
        make_room(driver.pid)
        said, _ = driver.communicate(timeout=PATIENCE_S)
    assert "a disk does not take them" in waits
    assert driver.returncode == 0, said
    after = clusters.measured_in(tmp_path)
    assert len(after) == n_trials > len(before)
    assert {name: after[name] for name in before} == before


def fill_the_disk(pid):
    """Let a process write nothing from now on: to it, every disk is full."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def make_room(pid):
    """Let a process write again."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


def tear_a_result(campaign):
    """A result is moved into its place whole; should a disk tear it all the same, it is told."""
    before, n_before = campaign.results(), len(trainings(campaign.log))
    kept = (campaign.run / "ray").rglob("trials/*.json")
    whole = next(f.stem for f in sorted(kept) if f.read_bytes() == before.get(f.stem))
    halve(campaign.run / "trials" / f"{whole}.json")
    campaign.driver = campaign.start_driver("--resume")
    campaign.driver.join(PATIENCE_S)
    assert campaign.driver.exitcode == 2, campaign.said()
    assert f"{whole}.json is damaged" in campaign.said()
    (campaign.run / "trials" / f"{whole}.json").unlink()
    campaign.driver = campaign.start_driver("--resume")
    campaign.end()
    assert campaign.results() == before  # brought home again from the trial's checkpoint
    assert len(trainings(campaign.log)) == n_before
