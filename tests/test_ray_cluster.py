"""Searches on a Ray cluster of several nodes that come and go."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adq_search.hosting import HostOptions
from adq_search.pareto import front_indices
from adq_search.plan import plan
from adq_search.plugins._ray_records import hosted_trials, records_of
from adq_search.plugins.ray_host import RayHost
from adq_search.progress import NoProgress
from adq_search.session import prepare, reopen
from tests import clusters, fragile

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent / "tiny.yaml"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def three():
    with clusters.nodes(3) as cluster:
        yield cluster


def run(session, address):
    asked = HostOptions("tiny", workers=0, address=address)
    return RayHost().run(session, asked, NoProgress())


def check(session, outcome, n):
    """As many finished trials as asked, each with its own policy, record, result and weights."""
    assert len(outcome.trials) == n
    assert len({t.result.policy for t in outcome.trials}) == n
    assert len(records_of(session.folder)) == n
    for trial in outcome.trials:
        assert trial.result.state in ("complete", "diverged")
        if trial.result.state == "complete":
            assert session.weights_file(trial.result.policy).exists()


def test_a_search_uses_every_node_and_loses_none_with_one_of_them(three, tmp_path):
    session = prepare(plan(fragile.job(tmp_path, trials=14)), tmp_path / "session")
    doomed = sorted(three.worker_nodes, key=str)[0]
    for i in range(14):  # long enough for the other nodes' processes to start
        (tmp_path / "harm" / f"wait-2-start{i}").touch()

    def blow():
        for i in range(3):  # one for each trial that runs, so that one is hit in its training
            (tmp_path / "harm" / f"wait-2-{i}").touch()
        three.remove_node(doomed, allow_graceful=False)

    with fragile.later(lambda: len(clusters.measured_in(session.folder)) >= 4, blow):
        outcome = run(session, three.address)
    check(session, outcome, 14)
    assert len({t.worker for t in outcome.trials}) >= 2


COMMAND = [sys.executable, "-m", "adq_search.cli", "run", "--study", "tiny", "--host", "ray"]


def start(folder, address, *more):
    command = [*COMMAND, str(folder / "job.yaml"), "--out", str(folder / "session"), *more]
    command += ["--address", address]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    ("blow", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["kill", "ctrl-c"]
)
def test_an_interrupted_driver_is_started_again_and_nothing_is_lost(three, tmp_path, blow, code):
    job = fragile.job(tmp_path, trials=12)
    (tmp_path / "job.yaml").write_text(json.dumps(job.to_plain()))
    with (
        start(tmp_path, three.address) as driver,
        fragile.later(
            lambda: len(clusters.measured_in(tmp_path / "session")) >= 4,
            lambda: os.kill(driver.pid, blow),
        ),
    ):
        said, _ = driver.communicate(timeout=900)
    assert driver.returncode == code, said
    assert ("with --resume goes on" in said) == (blow == signal.SIGINT)
    before = clusters.measured_in(tmp_path / "session")
    begun = {r.policy_hash: r.number for r in records_of(tmp_path / "session")}
    with start(tmp_path, three.address, "--resume") as driver:
        said, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, said
    after = clusters.measured_in(tmp_path / "session")
    assert {name: after[name] for name in before} == before  # none lost, none measured again
    session = reopen(tmp_path / "session")
    hosted = hosted_trials(session)
    assert len(after) == len(hosted) == len(records_of(session.folder)) == 12  # R3
    numbers = {t.result.policy.hash: t.number for t in hosted}
    assert {name: numbers[name] for name in begun} == begun  # interrupted ones were run again
    front = json.loads((session.folder / "front.json").read_text())
    complete = [t.result for t in hosted if t.result.state == "complete"]
    directions = ["maximize", "minimize"]
    expected = front_indices([session.plan.values(r) for r in complete], directions)
    found = {p["policy_hash"] for p in front["points"]}
    assert found == {complete[i].policy.hash for i in expected}
