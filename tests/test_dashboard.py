"""What optuna-dashboard shows of a search: read back through its API and its web application."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.trial import Trial

from adq_search.cli._run import find_host
from adq_search.errors import MissingExtraError, StorageError
from adq_search.hosting import HostOptions
from adq_search.job import read_job
from adq_search.pareto import Objective
from adq_search.plan import plan
from adq_search.plugins import optuna_trial_pages
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_objective import measuring
from adq_search.plugins.optuna_storage import open_storage
from adq_search.policy import FLOAT, LayerPrecision, Policy, load_policy
from adq_search.progress import NoProgress
from adq_search.report.notes import study_note, trial_note
from adq_search.report.records import TrialRecord
from adq_search.session import prepare

dashboard = pytest.importorskip("optuna_dashboard")

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def planned():
    return plan(read_job(TINY))


@pytest.fixture(scope="module")
def prepared(planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(planned, folder)
    return folder


@pytest.fixture(scope="module")
def searched(planned, prepared, tmp_path_factory):
    """A finished search with pages: its session and its study."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    shutil.copytree(prepared, folder)
    session = prepare(planned, folder)
    OptunaHost().run(session, HostOptions("tiny"), NoProgress())
    return session, study_in(folder)


def study_in(folder):
    return optuna.load_study(study_name="tiny", storage=open_storage(str(folder / "study.journal")))


@pytest.fixture
def get(searched):
    """Ask the dashboard's own web application, started in this process."""
    session, study = searched
    store = optuna.artifacts.FileSystemArtifactStore(session.folder / "artifacts")
    application = dashboard.wsgi(study._storage, artifact_store=store)

    def ask(path):
        said = []
        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.input": BytesIO(),
            "wsgi.errors": BytesIO(),
            "wsgi.url_scheme": "http",
        }
        body = b"".join(application(environment, lambda status, *_: said.append(status)))
        assert said[0].startswith("200"), (path, said, body[:200])
        return body

    return ask


def test_every_measured_trial_has_a_note_of_what_it_was_and_measured(searched):
    _, study = searched
    trials = measuring(study.get_trials(deepcopy=False))
    assert len(trials) == 6
    for trial in trials:
        note = dashboard.get_note(Trial(study, trial._trial_id))
        result = trial.user_attrs["result"]
        assert f"**Policy `{trial.user_attrs['policy_hash']}`**" in note
        assert f"proposed by {trial.user_attrs['origin']}; {result['state']}" in note
        assert f"| KL from the teacher (nats) | {result['kl']:.4f} |" in note
        for name, layer in result["policy"]["layers"].items():
            row = f"| `{name}` | {layer['scheme']} | {layer['weight_bits']} | {layer['input_bits']}"
            assert row in note
        assert f"of {result['health']['n_levels']} levels dead" in note


def test_the_dashboard_serves_study_notes_figures_and_files(searched, get):
    session, study = searched
    study_id = study._study_id
    [listed] = json.loads(get("/api/studies"))["study_summaries"]
    assert listed["study_name"] == "tiny"
    detail = json.loads(get(f"/api/studies/{study_id}"))
    assert "6 of 6 measured" in detail["note"]["body"]
    assert "### Predicted loss increase" in detail["note"]["body"]
    assert {g["id"] for g in detail["plotly_graph_objects"]} == {"front", "hypervolume"}
    [front] = [g for g in detail["plotly_graph_objects"] if g["id"] == "front"]
    names = [trace.get("name") for trace in json.loads(front["graph_object"])["data"]]
    assert {"front", "uniform bits", "full precision"} <= set(names)
    files = {a["filename"]: a["artifact_id"] for a in detail["artifacts"]}
    assert json.loads(get(f"/artifacts/{study_id}/{files['job.json']}")) == (
        session.plan.job.to_plain()
    )
    for trial in detail["trials"]:
        if trial["note"]["body"]:
            held = {a["filename"]: a["artifact_id"] for a in trial["artifacts"]}
            place = f"/artifacts/{study_id}/{trial['trial_id']}"
            policy = json.loads(get(f"{place}/{held['policy.json']}"))
            assert policy["policy_hash"] in trial["note"]["body"]
            weights = [name for name in held if name.endswith(".safetensors")]
            for name in weights:
                file = session.folder / "weights" / name
                assert get(f"{place}/{held[name]}") == file.read_bytes()


def test_policies_of_trials_are_files_to_train_from_and_the_front_has_its_weights(searched):
    session, study = searched
    front = {t.number for t in study.best_trials}
    for trial in measuring(study.get_trials(deepcopy=False)):
        held = {
            a.filename: a.artifact_id
            for a in get_all_artifact_meta(study_or_trial=trial, storage=study._storage)
        }
        file = session.folder / "artifacts" / held["policy.json"]
        assert load_policy(file).hash == trial.user_attrs["policy_hash"]
        assert json.loads(file.read_text())["provenance"]["trial"] == trial.number
        if trial.number in front:
            assert f"{trial.user_attrs['policy_hash']}.safetensors" in held


def test_job_json_repeats_the_study(searched):
    session, study = searched
    held = {
        a.filename: a.artifact_id
        for a in get_all_artifact_meta(study_or_trial=study, storage=study._storage)
    }
    again = read_job(session.folder / "artifacts" / held["job.json"])
    assert plan(again).fingerprint == session.plan.fingerprint


def test_without_pages_nothing_is_written(planned, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "run")
    session = prepare(planned, tmp_path / "run")
    OptunaHost().run(session, HostOptions("tiny", dashboard=False), NoProgress())
    study = study_in(tmp_path / "run")
    attributes = study._storage.get_study_system_attrs(study._study_id)
    assert not [key for key in attributes if key.startswith("dashboard:")]


def test_pages_asked_for_need_the_dashboard(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_trial_pages, "optuna_dashboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'adq-search\[dashboard\]'"):
        OptunaHost().check(planned, tmp_path, HostOptions("tiny", dashboard=True))
    OptunaHost().check(planned, tmp_path, HostOptions("tiny"))


def test_a_search_by_ray_has_no_pages(planned, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(StorageError, match="Leave --dashboard out"):
        find_host("ray").check(planned, tmp_path, HostOptions("tiny", dashboard=True))


AXES = (Objective("accuracy", "maximize"), Objective("energy_pj", "minimize"))


def record(number, state="complete", **changes):
    policy = Policy.of({"fc": LayerPrecision(number + 2, 4, "adq", 0.9), "in": FLOAT})
    cost = {"energy_pj": 1000.0 * (number + 1), "weight_bytes": 10.0}
    measured = {"accuracy": 0.5 + 0.1 * number, "loss": 0.3, "kl": 0.2, "epochs": 3} | changes
    return TrialRecord(number, policy, {}, state, "sampler", cost=cost, **measured)


def test_a_trial_that_diverged_says_why_and_what_is_missing():
    lost = record(0, "diverged", accuracy=None, kl=None, loss=None, reason="loss is NaN")
    note = trial_note(lost, AXES)
    assert "; diverged: loss is NaN." in note
    assert "| validation accuracy | – |" in note
    assert "Health: not measured." in note


def test_a_trial_note_tells_layers_as_they_are():
    note = trial_note(record(0), AXES)
    assert "| `fc` | adq | 2 | 4 | 0.9 |" in note
    assert "| `in` | floating point | – | – | – |" in note
    assert "| energy per inference | 1.00 nJ |" in note


def test_a_study_note_holds_the_front_alone_and_how_to_repeat_it():
    worse = record(2, accuracy=0.1)
    note = study_note(
        "s", "digits", records=[record(0), record(1), worse], n_trials=9, objectives=AXES,
        budgets={"energy_pj": 2500.0},
    )  # fmt: skip
    assert "3 of 9 measured" in note
    assert "within energy per inference <= 2.50 nJ" in note
    rows = [line for line in note.splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{record(n).policy_hash}` | sampler | {n} | {a} | {e} |"
        for n, a, e in ((0, "50.00%", "1.00 nJ"), (1, "60.00%", "2.00 nJ"))
    ]
    assert "adq-search run job.json --study s" in note
