"""`adq-search status`: what it says of a study, wherever the study lies."""

import json
import shutil
import sys
import time
from pathlib import Path

import optuna
import pytest

from adq_search.cli import main
from adq_search.errors import StorageError
from adq_search.hosting import HostedTrial, HostOptions, alone_in, is_at_work
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_lease import LEASE, WORKER, LeaseTerms
from adq_search.plugins.optuna_storage import JOURNAL, open_storage
from adq_search.progress import NoProgress
from adq_search.session import prepare
from adq_search.status import study_status
from adq_search.trial import TrialResult

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def planned():
    return plan(read_job(TINY))


@pytest.fixture(scope="module")
def searched(planned, tmp_path_factory):
    """The session of a finished search by Optuna."""
    session = prepare(planned, tmp_path_factory.mktemp("searched") / "run")
    OptunaHost().run(session, HostOptions("tiny", dashboard=False), NoProgress())
    return session


@pytest.fixture
def folder(searched, tmp_path):
    """A copy of the finished search's folder, to change."""
    return Path(shutil.copytree(searched.folder, tmp_path / "run"))


def say(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["adq-search", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def study_in(folder):
    return optuna.load_study(study_name="tiny", storage=open_storage(str(folder / JOURNAL)))


def test_a_folder_tells_states_workers_hypervolume_seconds_eta_and_front(
    folder, monkeypatch, capsys
):
    trial = study_in(folder).ask()
    trial.set_user_attr(WORKER, "elsewhere:7")
    trial.set_user_attr(LEASE, time.time())
    assert say(monkeypatch, "status", folder) == 0
    shown = capsys.readouterr().out
    for line in (
        "study             tiny",
        "policies measured 6 of 6",
        "workers           1 elsewhere:7",
        "% of the box",
        "seconds a trial",
        "time left         0:00:00",
    ):
        assert line in shown
    assert "1 running" in shown
    assert say(monkeypatch, "status", folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    by_url = OptunaHost().status(str(folder / JOURNAL), "tiny").to_json()
    assert said == json.loads(json.dumps(by_url))
    assert said["front"]
    for point in said["front"]:
        assert point["policy_hash"] in shown


@pytest.mark.parametrize(("age_s", "workers"), [(0.0, ("elsewhere:7",)), (120.0, ())])
def test_a_worker_whose_lease_is_over_is_not_at_work(age_s, workers, folder):
    trial = study_in(folder).ask()
    trial.set_user_attr(WORKER, "elsewhere:7")
    trial.set_user_attr(LEASE, time.time() - age_s)
    assert LeaseTerms().grace_s == 60.0
    found = OptunaHost().status_in(folder)
    assert found.workers == workers
    assert found.counts["running"] == 1


def test_looking_changes_nothing(folder):
    before = (folder / JOURNAL).read_bytes()
    OptunaHost().status_in(folder)
    assert (folder / JOURNAL).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "by a run's folder, or by --storage and --study"),
        (("x", "--study", "y"), "by a run's folder, or by --storage and --study"),
        (("--storage", "y"), "by a run's folder, or by --storage and --study"),
        (("/nowhere",), "no study.journal in /nowhere"),
    ],
)
def test_where_to_look_must_be_said_once(words, said, monkeypatch, capsys):
    assert say(monkeypatch, "status", *words) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_two_studies_is_ambiguous(folder):
    optuna.create_study(study_name="other", storage=open_storage(str(folder / JOURNAL)))
    with pytest.raises(StorageError, match="must hold one study, but has: "):
        OptunaHost().status_in(folder)


def trials(planned, seconds):
    policies = planned.space.uniform_policies().values()
    return [
        HostedTrial(
            i, {}, TrialResult(p, "complete", 0.5, 0.1, 0.1, planned.totals(p), 2, s, s), "sampler"
        )
        for i, (p, s) in enumerate(zip(policies, seconds, strict=False))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "is_over", "eta_s"),
    [(("a:1",), False, 16.0), (("a:1", "b:1"), False, 8.0), ((), False, None), ((), True, 0.0)],
)
def test_time_left_is_that_of_the_workers_alive(workers, is_over, eta_s, planned):
    found = study_status(
        "s",
        planned.job,
        trials(planned, [3.0, 5.0]),
        counts={"complete": 2},
        workers=workers,
        is_over=is_over,
    )
    assert found.seconds_per_trial == 4.0
    assert found.n_trials == 6
    assert found.eta_s == eta_s


def test_a_folder_is_at_work_while_its_lock_is_held(tmp_path):
    assert not is_at_work(tmp_path)
    with alone_in(tmp_path):
        assert is_at_work(tmp_path)
        with pytest.raises(StorageError, match="Another run is at work in"), alone_in(tmp_path):
            pass
    assert not is_at_work(tmp_path)


def test_a_search_by_ray_tells_how_it_stands_from_its_folder(searched, folder, monkeypatch, capsys):
    pytest.importorskip("ray")
    from adq_search.plugins._ray_records import RayRecord, write_record  # noqa: PLC0415

    begun = [(t.user_attrs["policy_hash"], t.user_attrs["origin"]) for t in study_in(folder).trials]
    for number, (name, origin) in enumerate([*begun, ("f" * 16, "sampler")]):
        record = RayRecord(name, number, f"t{number}", "", {}, origin, "node:9", "", ())
        write_record(folder, record)
    with alone_in(folder):
        assert say(monkeypatch, "status", folder, "--host", "ray", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == {"complete": 6, "running": 1}
    assert said["workers"] == ["node:9"]
    ours = OptunaHost().status_in(folder)
    assert said["hypervolume"] == ours.hypervolume
    assert {p["policy_hash"] for p in said["front"]} == {p.policy_hash for p in ours.front}
    assert say(monkeypatch, "status", folder, "--host", "ray") == 0
    assert "1 interrupted" in capsys.readouterr().out
