"""Studies that several machines share: joining one, leases, outages, and how it stands."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from adq_search.cli import main
from adq_search.errors import StorageError
from adq_search.hosting import HostOptions
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins._outages import wait_out
from adq_search.plugins.optuna_artifacts import CODE, fetch_session, publish
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_journal import open_journal
from adq_search.plugins.optuna_lease import MAX_RETRIES, LeaseTerms, Sweeper, requeue, worker_name
from adq_search.plugins.optuna_objective import PolicyObjective, measuring, result_of
from adq_search.plugins.optuna_worker import FINISHED, Worker
from adq_search.progress import NoProgress
from adq_search.results import write_outcome
from adq_search.session import prepare
from tests import fragile
from tests.servers import Database, grpc_proxy, object_server

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def planned():
    return plan(read_job(TINY))


@pytest.fixture(scope="module")
def prepared(planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(planned, folder)
    return folder


@pytest.fixture
def session(planned, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "run")
    return prepare(planned, tmp_path / "run")


@pytest.fixture(scope="module")
def database():
    found = Database()
    yield found
    found.stop()


@pytest.fixture
def began(session):
    """A study in a journal file, published, its seeds not yet queued."""
    return begin(session, str(session.folder / "study.journal"))


def begin(session, url, terms=None, place=None):
    host = OptunaHost(terms)
    opened = host._open_study(session, HostOptions("tiny", url))
    publish(opened.study, session, place or str(session.folder / "artifacts"))
    return opened


def test_a_worker_elsewhere_needs_nothing_but_the_url(session, began, tmp_path, capsys):
    url = str(session.folder / "study.journal")
    worker_folder = tmp_path / "elsewhere"
    n = OptunaHost().work(url, "tiny", worker_folder, NoProgress())
    assert n == 6
    options = HostOptions("tiny", url, resume=True)
    OptunaHost().check(session.plan, session.folder, options)
    outcome = OptunaHost().run(session, options, NoProgress())
    assert len({t.result.policy for t in outcome.trials}) == len(outcome.trials) == 6
    report = write_outcome(session, outcome, options, started=time.perf_counter())
    assert report.points
    for point in report.points:
        assert (session.folder / point.weights_file).exists()
        assert point.integer_verified


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgresql", "grpc"])
def test_a_run_and_a_worker_share_a_database(kind, database, tmp_path):
    session = prepare(plan(fragile.job(tmp_path, trials=6)), tmp_path / "run")
    url = database.fresh_url()
    with grpc_proxy(url) if kind == "grpc" else nullcontext(url) as address:
        share(session, address, tmp_path)


def share(session, url, tmp_path):
    """The worker's first trial is held until this process has one of the six."""
    harm = tmp_path / "harm"
    (harm / "hold").touch()
    opened = begin(session, url)
    assert opened.has_heartbeats == url.startswith("postgresql")
    command = [sys.executable, "-m", "adq_search.cli", "worker", "--storage", url]
    command += ["--study", "tiny", "--folder", str(tmp_path / "w")]

    def is_one_measured():
        return bool(measuring(opened.study.get_trials(states=FINISHED)))

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        while (harm / "hold").exists():
            assert worker.poll() is None
            time.sleep(0.05)
        with fragile.later(is_one_measured, fragile.released(harm).touch):
            options = HostOptions("tiny", url, resume=True)
            outcome = OptunaHost().run(session, options, NoProgress())
        said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0, said
    assert "has its 6 trials" in said
    assert len({t.result.policy for t in outcome.trials}) == len(outcome.trials) == 6
    assert len({t.worker for t in outcome.trials}) == 2


def test_weights_travel_through_s3(session, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    url = str(tmp_path / "study.journal")
    with object_server() as endpoint:
        opened = begin(session, url, place=f"s3://bucket?endpoint={endpoint}")
        fetched = fetch_session(opened.study, tmp_path / "w")
        assert fetched.seeds == session.seeds
        policy = session.seeds[0].policy
        assert fetched.measure(policy).kl == session.measure(policy).kl


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("code", "is measured by other code than this worker's"),
        ("data", "belongs to another job: data differs"),
        ("weights", "is damaged: its SHA-256 is not that of the file"),
    ],
)
def test_a_worker_with_other_code_data_or_weights_is_refused(part, said, session, began, tmp_path):
    study = began.study
    if part == "code":
        study.set_user_attr(CODE, "0" * 16)
    if part == "data":
        job = study.user_attrs["adq_search.job"]
        study.set_user_attr("adq_search.job", {**job, "task_options": {"seed": 1}})
    if part == "weights":
        found = study.user_attrs["adq_search.files"]["teacher.safetensors"]
        file = session.folder / "artifacts" / found["artifact_id"]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(StorageError, match=said):
        OptunaHost().work(str(session.folder / "study.journal"), "tiny", tmp_path, NoProgress())
    assert study.get_trials() == []


def test_a_run_with_another_teacher_is_refused(session, began):
    other = prepare(session.plan, session.folder.parent / "other")
    next(other.teacher.network.parameters()).data += 1.0
    with pytest.raises(StorageError, match="begun with other weights"):
        publish(began.study, other, str(session.folder))


def test_sqlite_is_refused_with_the_reason(session, tmp_path):
    with pytest.raises(StorageError, match="SQLite locks its whole file"):
        OptunaHost().work(f"sqlite:///{tmp_path}/x.db", "tiny", tmp_path, NoProgress())


def test_a_store_that_is_none_is_refused_before_any_training(planned, tmp_path):
    options = HostOptions("tiny", artifacts="ftp://server/folder")
    with pytest.raises(StorageError, match=r"a folder or to s3://bucket\[\?endpoint=URL\]"):
        OptunaHost().check(planned, tmp_path, options)


def test_a_study_that_is_not_there_is_said(session, began, tmp_path):
    with pytest.raises(StorageError, match="no study 'tinny'. Known: tiny"):
        OptunaHost().work(str(session.folder / "study.journal"), "tinny", tmp_path, NoProgress())
    with pytest.raises(StorageError, match="no journal file at"):
        OptunaHost().status(str(tmp_path / "mistyped.journal"), "tiny")
    assert not (tmp_path / "mistyped.journal").exists()


def dead_trial(study, session, *, with_result=False):
    """Leave a trial behind as a worker of another machine does that vanished."""
    trial = study.ask(PolicyObjective(session).distributions)
    policy = session.plan.space.policy_of(trial.params)
    trial.set_user_attr("policy_hash", policy.hash)
    trial.set_user_attr("worker", "nowhere:1")
    trial.set_user_attr("verdict", "measured")
    trial.set_user_attr("lease", time.time())
    if with_result:
        trial.set_user_attr("result", session.measure(policy).to_json())
    return trial.number, policy


def test_a_lease_that_stands_still_is_over_and_its_policy_queued_again(session, began):
    number, policy = dead_trial(began.study, session)
    sweeper = Sweeper(LeaseTerms(interval_s=0.05, grace_s=0.3), has_heartbeats=False)
    sweeper.sweep(began.study)
    assert began.study.trials[number].state == TrialState.RUNNING
    time.sleep(0.4)
    sweeper.sweep(began.study)
    assert began.study.trials[number].state == TrialState.FAIL
    (again,) = began.study.get_trials(states=(TrialState.WAITING,))
    assert again.user_attrs["policy_hash"] == policy.hash
    assert session.plan.space.policy_of(again.system_attrs["fixed_params"]) == policy


def test_a_lease_that_is_renewed_holds(session, began):
    number, _ = dead_trial(began.study, session)
    storage, trial_id = began.study._storage, began.study.trials[number]._trial_id
    sweeper = Sweeper(LeaseTerms(interval_s=0.05, grace_s=0.3), has_heartbeats=False)
    for beat in range(12):
        storage.set_trial_user_attr(trial_id, "lease", beat)  # a clock of its own will do
        sweeper.sweep(began.study)
        time.sleep(0.05)
    assert began.study.trials[number].state == TrialState.RUNNING


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(session, began):
    number, _ = dead_trial(began.study, session)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name = f"{worker_name().rpartition(':')[0]}:{gone.pid}"
    trial_id = began.study.trials[number]._trial_id
    began.study._storage.set_trial_user_attr(trial_id, "worker", name)
    Sweeper(LeaseTerms(), has_heartbeats=False).sweep(began.study)
    assert began.study.trials[number].state == TrialState.FAIL


def test_heartbeats_say_it_on_a_database(session, database):
    opened = begin(session, database.fresh_url(), LeaseTerms(interval_s=1, grace_s=1))
    number, policy = dead_trial(opened.study, session)
    trial_id = opened.study.trials[number]._trial_id
    opened.study._storage.record_heartbeat(trial_id)
    sweeper = Sweeper(opened.terms, has_heartbeats=True)
    sweeper.sweep(opened.study)
    assert opened.study.trials[number].state == TrialState.RUNNING
    time.sleep(2.1)
    sweeper.sweep(opened.study)
    assert opened.study.trials[number].state == TrialState.FAIL
    (again,) = opened.study.get_trials(states=(TrialState.WAITING,))
    assert again.user_attrs["policy_hash"] == policy.hash


def test_what_was_measured_before_a_worker_died_is_not_trained_again(session, began, monkeypatch):
    number, policy = dead_trial(began.study, session, with_result=True)
    measured = session.result_of(policy)
    requeue(began.study, began.study.trials[number])
    began.study.tell(number, state=TrialState.FAIL)
    monkeypatch.setattr("adq_search.session.Session.measure", None)  # training would fail
    began.study.optimize(PolicyObjective(session), n_trials=1)
    assert result_of(began.study.trials[-1]) == measured
    assert began.study.trials[-1].state == TrialState.COMPLETE


def test_a_policy_that_kills_its_workers_is_let_go(session, began):
    number, _ = dead_trial(began.study, session)
    for _ in range(MAX_RETRIES + 2):
        trial = began.study.trials[-1]
        requeue(began.study, trial)
    assert len(began.study.trials) == 1 + MAX_RETRIES


def test_a_worker_whose_trial_was_given_away_drops_it_and_goes_on(session, began, monkeypatch):
    worker = Worker(began, session, shares=True)
    measure = type(session).measure
    taken = []

    def slow(self, policy, monitor=None, **named):
        if not taken:
            taken.append(policy)
            (mine,) = began.study.get_trials(states=(TrialState.RUNNING,))
            began.study.tell(mine.number, state=TrialState.FAIL)
            requeue(began.study, mine)
        return measure(self, policy, monitor, **named)

    monkeypatch.setattr(type(session), "measure", slow)
    worker.work(NoProgress(), lambda: None)
    measured = measuring(began.study.get_trials(states=FINISHED))
    assert len(measured) == 6
    assert sum(t.user_attrs["policy_hash"] == taken[0].hash for t in measured) == 1


def test_a_queued_policy_counts_before_a_later_draw(session, began):
    """A re-run waits in the queue with a lower number: the later draw is one too many."""
    params = session.plan.space.params_of(session.seeds[0].policy)
    began.study.enqueue_trial(params, user_attrs={"policy_hash": session.seeds[0].policy.hash})
    storage = began.study._storage
    later = storage.create_new_trial(began.study._study_id)
    objective = PolicyObjective(session, n_trials=1)
    with pytest.raises(optuna.TrialPruned, match="number of trials is reached"):
        objective(optuna.Trial(began.study, later))


@pytest.mark.slow
def test_a_database_that_is_restarted_is_waited_for(session, database):
    url = database.fresh_url()
    opened = begin(session, url)
    database.kill()
    back = threading.Timer(2.0, database.start)
    back.start()
    try:
        Worker(opened, session, shares=False).work(NoProgress(), lambda: None)
    finally:
        back.join()
    assert len(measuring(opened.study.get_trials(states=FINISHED))) == 6


@pytest.mark.slow
def test_a_proxy_that_is_restarted_is_waited_for(session, database):
    url = database.fresh_url()
    with grpc_proxy(url) as proxy:
        opened = begin(session, proxy)
    port = int(proxy.rpartition(":")[2])
    answers = []
    asking = threading.Thread(target=lambda: answers.append(opened.study.user_attrs))
    asking.start()
    time.sleep(0.5)
    assert not answers
    with grpc_proxy(url, port):
        asking.join(30)
    assert answers[0]["adq_search.fingerprint"] == session.plan.fingerprint


def test_patience_ends_with_a_sentence():
    def call():
        raise TimeoutError(110, "no answer")

    with pytest.raises(StorageError, match="within 0.3 s, but this one does not: .*no answer"):
        wait_out(call, lambda _: True, patience_s=0.3)
    with pytest.raises(TimeoutError):
        wait_out(call, lambda _: False)


@pytest.mark.slow
def test_a_full_disk_never_leaves_half_a_line(tmp_path):
    """A limit on the file's size stands for a full disk; the writer waits until there is room."""
    file = tmp_path / "study.journal"
    code = (
        "import resource, signal, sys, threading, optuna\n"
        "from pathlib import Path\n"
        "from adq_search.plugins.optuna_journal import open_journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "file = Path(sys.argv[1])\n"
        "study = optuna.create_study(study_name='s', storage=open_journal(file))\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, hard))\n"
        "room = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "threading.Timer(1.0, lambda: (print(file.read_bytes()[-1:] == b'\\n'), room())).start()\n"
        "study.set_user_attr('long', 'x' * 1000)\n"
        "print(len(study.user_attrs['long']))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=ROOT
    )
    assert said.stdout.split() == ["True", "1000"], said.stderr
    assert len(optuna.load_study(study_name="s", storage=open_journal(file)).user_attrs["long"])


@pytest.mark.slow
def test_a_worker_whose_disk_is_full_says_so_and_others_do_its_trials(session, began, tmp_path):
    """A limit on the size of files stands for a full disk: no weights fit, small files do."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from adq_search.plugins.optuna_host import OptunaHost\n"
        "from adq_search.plugins import optuna_worker\n"
        "from adq_search.progress import NoProgress\n"
        "import adq_search.session as sessions\n"
        "save = sessions.save_file\n"
        "def save_on_a_full_disk(state, path):\n"
        "    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))\n"
        "    try:\n"
        "        save(state, path)\n"
        "    finally:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "sessions.save_file = save_on_a_full_disk\n"
        "OptunaHost().work(sys.argv[1], 'tiny', Path(sys.argv[2]), NoProgress())\n"
    )
    url = str(session.folder / "study.journal")
    said = subprocess.run(
        [sys.executable, "-c", code, url, str(tmp_path / "w")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert said.returncode == 1
    assert "A trial needs room for its weights" in said.stderr.splitlines()[-1]
    assert not list((tmp_path / "w").rglob("*.safetensors*")) or not list(
        (tmp_path / "w" / "weights").iterdir()
    )
    (again,) = began.study.get_trials(states=(TrialState.WAITING,))
    assert again.user_attrs["retries"] == 1
    Worker(began, session, shares=True).work(NoProgress(), lambda: None)
    measured = measuring(began.study.get_trials(states=FINISHED))
    assert len(measured) == 6
    assert again.user_attrs["policy_hash"] in {t.user_attrs["policy_hash"] for t in measured}


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_hands_its_trial_back(session, began, tmp_path):
    url = str(session.folder / "study.journal")
    command = [sys.executable, "-m", "adq_search.cli", "worker", "--storage", url]
    with subprocess.Popen(
        [*command, "--study", "tiny"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as worker:
        while not measuring(began.study.get_trials(states=(TrialState.RUNNING,))):
            assert worker.poll() is None
            time.sleep(0.01)
        worker.send_signal(signal.SIGTERM)
        said, _ = worker.communicate(timeout=60)
    assert worker.returncode == 143
    assert "back in the queue" in said
    assert not began.study.get_trials(states=(TrialState.RUNNING,))
    failed = began.study.get_trials(states=(TrialState.FAIL,))
    queued = began.study.get_trials(states=(TrialState.WAITING,))
    assert [t.user_attrs["policy_hash"] for t in queued] == [
        t.user_attrs["policy_hash"] for t in failed if "policy_hash" in t.user_attrs
    ]


def test_weights_that_were_damaged_on_the_way_are_refused(session, tmp_path):
    """The driver takes no half-written weights of a worker elsewhere for whole ones."""
    url = str(tmp_path / "study.journal")
    opened = begin(session, url)
    OptunaHost().work(url, "tiny", tmp_path / "w", NoProgress())
    trials = opened.study.get_trials()
    best = opened.study.best_trials[0]
    file = session.folder / "artifacts" / best.user_attrs["weights"]["artifact_id"]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(StorageError, match="its SHA-256 is not that of the file"):
        OptunaHost().run(session, HostOptions("tiny", url, resume=True), NoProgress())
    assert not session.weights_file(result_of(best).policy).exists()
    assert opened.study.get_trials()[: len(trials)] == trials


def test_a_store_out_of_reach_is_said(session, began, tmp_path):
    (session.folder / "artifacts").rename(tmp_path / "moved")
    with pytest.raises(StorageError, match="Let this machine reach the store of the run"):
        fetch_session(began.study, tmp_path / "w")


def test_the_next_writer_cuts_off_half_a_line_while_others_run(tmp_path):
    file = tmp_path / "study.journal"
    study = optuna.create_study(study_name="s", storage=open_journal(file))
    with file.open("ab") as journal:
        journal.write(b'{"op_code": 5, "worker_id": "' + b"x" * 100_000)
    study.set_user_attr("after", 1)
    assert optuna.load_study(study_name="s", storage=open_journal(file)).user_attrs == {"after": 1}


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_status_says_how_a_study_stands(kind, session, database, monkeypatch, capsys, tmp_path):
    url = database.fresh_url() if kind == "postgresql" else str(tmp_path / "s.journal")
    opened = begin(session, url)
    found = OptunaHost().status(url, "tiny")
    assert (found.n_finished, found.n_trials, found.front) == (0, 6, ())
    assert found.eta_s is None
    outcome = OptunaHost().run(session, HostOptions("tiny", url, resume=True), NoProgress())
    report = write_outcome(session, outcome, HostOptions("tiny", url), started=time.perf_counter())
    running = opened.study.ask()
    running.set_user_attr("worker", "elsewhere:1")
    running.set_user_attr("lease", time.time())
    assert say(monkeypatch, "status", "--storage", url, "--study", "tiny", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"]["complete"] + said["counts"].get("diverged", 0) == 6
    assert said["counts"]["running"] == 1
    assert said["workers"] == ["elsewhere:1"]
    assert said["hypervolume"] == report.hypervolume.share
    assert [p["policy_hash"] for p in said["front"]] == [p.policy_hash for p in report.points]
    assert say(monkeypatch, "status", "--storage", url, "--study", "tiny") == 0
    shown = capsys.readouterr().out
    assert "policies measured 6 of 6" in shown
    assert report.points[0].policy_hash in shown


def test_only_hosts_with_shared_studies_have_workers(monkeypatch, capsys):
    pytest.importorskip("ray")
    words = ["status", "--storage", "x", "--study", "y", "--host", "ray"]
    assert say(monkeypatch, *words) == 2
    assert "cannot be joined or looked at" in capsys.readouterr().err


def say(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["adq-search", *words])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
