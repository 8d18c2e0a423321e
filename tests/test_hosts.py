"""Both hosts over the same job: same trials, same results code; and what survives interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from adq_search.errors import BudgetError, StorageError
from adq_search.hosting import HostOptions
from adq_search.job import Job, read_job
from adq_search.plan import plan
from adq_search.plugins._interrupts import remembered
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_journal import open_journal
from adq_search.plugins.optuna_objective import PolicyObjective, Verdict, measuring
from adq_search.progress import NoProgress
from adq_search.session import prepare, reopen
from adq_search.trial import TrialResult

TINY = Path(__file__).parent / "tiny.yaml"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def job():
    return read_job(TINY)


@pytest.fixture(scope="module")
def planned(job):
    return plan(job)


@pytest.fixture
def session(planned, tmp_path):
    return prepare(planned, tmp_path)


def run(session, **options):
    host, asked = OptunaHost(), HostOptions(study="tiny", **options)
    host.check(session.plan, session.folder, asked)
    return host.run(session, asked, NoProgress())


def study_in(folder):
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.load_study(study_name="tiny", storage=optuna.storages.JournalStorage(backend))


def test_a_search_measures_as_many_distinct_policies_as_asked(session):
    outcome = run(session)
    assert len(outcome.trials) == 6
    assert len({t.result.policy for t in outcome.trials}) == 6
    origins = [t.origin for t in outcome.trials]
    assert "uniform W4A4" in origins
    assert any(o.startswith("prior fisher") for o in origins)
    for trial in outcome.trials:
        assert session.plan.space.policy_of(trial.parameters) == trial.result.policy
        assert session.result_of(trial.result.policy) == trial.result
        assert session.weights_file(trial.result.policy).exists()


def test_reopened_session_is_the_prepared_one(session):
    again = reopen(session.folder)
    assert again.seeds == session.seeds
    assert again.full_precision == session.full_precision
    policy = session.seeds[0].policy
    assert again.measure(policy).kl == session.measure(policy).kl


def test_same_seed_same_search(planned, tmp_path):
    outcomes = [run(prepare(planned, tmp_path / name)) for name in ("a", "b")]
    policies = [[t.result.policy.hash for t in o.trials] for o in outcomes]
    assert policies[0] == policies[1]
    assert [t.result.kl for t in outcomes[0].trials] == [t.result.kl for t in outcomes[1].trials]


@pytest.mark.slow
def test_two_workers_share_the_study_and_measure_exactly_as_many(session):
    outcome = run(session, workers=2)
    assert len(outcome.trials) == 6
    assert len({t.result.policy for t in outcome.trials}) == 6


def test_resuming_a_finished_study_trains_nothing(session):
    first = run(session)
    times = {f: f.stat().st_mtime_ns for f in (session.folder / "trials").iterdir()}
    second = run(session, resume=True)
    assert {f: f.stat().st_mtime_ns for f in (session.folder / "trials").iterdir()} == times
    assert second.trials == first.trials


def test_an_existing_study_is_not_taken_unasked(session):
    run(session)
    with pytest.raises(StorageError, match="exists, with 6 measured trials. Give --resume"):
        run(session)


def test_nothing_to_resume_is_said(session):
    with pytest.raises(StorageError, match="nothing to resume"):
        run(session, resume=True)


def test_a_study_of_another_job_is_refused(session, job):
    run(session)
    other = plan(job.with_training(epochs=1))
    with pytest.raises(StorageError, match="belongs to another job: recipe differs"):
        OptunaHost().check(other, session.folder, HostOptions("tiny", resume=True))
    with pytest.raises(StorageError, match="belongs to another job: recipe differs"):
        prepare(other, session.folder)


def test_a_study_that_is_not_ours_is_refused(session):
    url = f"sqlite:///{session.folder}/foreign.db"
    optuna.create_study(study_name="tiny", storage=url, directions=["maximize", "minimize"])
    with pytest.raises(StorageError, match="not made by adq_search"):
        run(session, storage=url, resume=True)


def test_any_optuna_url_will_do_but_sqlite_for_one_worker_only(session):
    url = f"sqlite:///{session.folder}/study.db"
    with pytest.raises(StorageError, match="SQLite locks its whole file"):
        run(session, storage=url, workers=2)
    assert len(run(session, storage=url).trials) == 6


def test_a_storage_that_cannot_be_opened_is_one_sentence(session):
    with pytest.raises(StorageError, match="cannot be opened"):
        run(session, storage="nosuchdb://host/db")


def test_a_half_written_line_of_a_killed_writer_is_cut_off(session):
    first = run(session)
    with (session.folder / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code": 5, "worker_id": "x')
    second = run(session, resume=True)
    assert second.trials == first.trials
    assert run(session, resume=True).trials == first.trials


def test_a_measured_policy_is_never_trained_again(session, monkeypatch):
    """Results on disk outlive a storage that lost them."""
    run(session)
    (session.folder / "study.journal").unlink()
    monkeypatch.setattr("adq_search.session.run_trial", None)  # training would fail
    again = run(session)
    assert {t.result.policy for t in again.trials if t.origin != "sampler"}


def test_budgets_are_native_constraints_checked_before_training(job, tmp_path):
    low, high = plan(job).cost_range("weight_bytes")
    limit = low + 0.4 * (high - low)
    session = prepare(plan(job.with_search(budgets={"weight_bytes": limit})), tmp_path)
    outcome = run(session)
    assert len(outcome.trials) == 6
    assert all(t.result.cost["weight_bytes"] <= limit for t in outcome.trials)
    trials = study_in(tmp_path).get_trials()
    over = [t for t in trials if t.user_attrs.get("verdict") == Verdict.OVER_BUDGET]
    assert len(over) == outcome.n_rejected > 0  # uniform W8A8 is among the seeds
    assert all(t.constraints["weight_bytes"] > 0 for t in over)
    assert all(t.constraints["weight_bytes"] <= 0 for t in measuring(trials))
    assert not any("result" in t.user_attrs for t in over)


def test_impossible_budgets_are_refused_with_what_is_reachable(job):
    with pytest.raises(BudgetError, match=r"reaches from \S+ to \S+\. Raise the budget") as caught:
        plan(job.with_search(budgets={"weight_bytes": 1.0}))
    low, high = caught.value.reachable
    assert 1.0 < low < high


def test_budgets_impossible_together_are_refused(job):
    """Least memory wants codebooks (no step per channel), least energy wants none of them."""
    content = job.to_plain()
    content["space"]["default"] |= {"weight_bits": [2], "schemes": ["lsq", "adq+lsq"]}
    job = Job.model_validate(content)
    planned = plan(job)
    budgets = {name: planned.cost_range(name)[0] for name in ("memory_bytes", "energy_pj")}
    for name, limit in budgets.items():
        plan(job.with_search(budgets={name: limit}))  # each alone can be met
    with pytest.raises(BudgetError, match="together with"):
        plan(job.with_search(budgets=budgets))


def test_the_objective_works_with_plain_optimize_and_ask_tell(session):
    objective = PolicyObjective(session)
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.optimize(objective, n_trials=2)
    trial = study.ask(objective.distributions)
    study.tell(trial, objective(trial))
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3
    assert all("result" in t.user_attrs for t in measuring(study.trials))


def test_a_repeated_policy_returns_the_stored_values(session):
    objective = PolicyObjective(session)
    study = optuna.create_study(directions=["maximize", "minimize"])
    params = session.plan.space.params_of(session.seeds[0].policy)
    study.enqueue_trial(params)
    study.enqueue_trial(params)
    study.optimize(objective, n_trials=2)
    first, second = study.trials
    assert first.values == second.values
    assert second.user_attrs["repeat_of"] == first.number
    assert [t.number for t in measuring(study.trials)] == [0]


def test_a_diverged_trial_is_pruned_with_its_reason(job, tmp_path):
    session = prepare(plan(job.with_training(learning_rate=1e30).with_search(trials=2)), tmp_path)
    outcome = run(session)
    assert [t.result.state for t in outcome.trials] == ["diverged"] * 2
    study = study_in(tmp_path)
    assert study.best_trials == []
    assert all(t.user_attrs["result"]["reason"] for t in measuring(study.trials))


COMMAND = [sys.executable, "-m", "adq_search.cli", "run", str(TINY), "--study", "tiny"]


def start(folder, *more, trials=12):
    command = [*COMMAND, "--out", str(folder), "--trials", str(trials), *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def measured_in(folder):
    return {f.stem: f.stat().st_mtime_ns for f in (folder / "trials").glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "workers"),
    [
        pytest.param(signal.SIGKILL, 1, id="kill"),
        pytest.param(signal.SIGINT, 1, id="ctrl-c"),
        pytest.param(signal.SIGKILL, 2, id="kill-2-workers"),
        pytest.param(signal.SIGINT, 2, id="ctrl-c-2-workers"),
    ],
)
def test_an_interrupted_search_goes_on_and_loses_nothing(tmp_path, blow, workers):
    with start(tmp_path, "--workers", str(workers)) as process:
        deadline = time.monotonic() + 120
        while len(measured_in(tmp_path)) < 3:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, blow)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == (-9 if blow == signal.SIGKILL else 130), said
        assert ("with --resume goes on" in said) == (blow == signal.SIGINT)
    time.sleep(2.0 if workers > 1 else 0.0)  # a worker left behind ends with its trial
    before = measured_in(tmp_path)
    with start(tmp_path, "--resume", "--workers", str(workers)) as process:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    after = measured_in(tmp_path)
    assert {name: after[name] for name in before} == before  # none lost, none trained again
    front = json.loads((tmp_path / "front.json").read_text())
    assert front["schema"] == "adq_search.front/1"
    trials = measuring(
        study_in(tmp_path).get_trials(
            states=[optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
        )
    )
    assert len(trials) == 12
    hashes = [TrialResult.from_json(t.user_attrs["result"]).policy.hash for t in trials]
    assert len(set(hashes)) == 12
    assert set(before) <= set(hashes)


@pytest.mark.slow
def test_two_runs_in_one_folder_do_not_take_each_other_for_dead(tmp_path):
    with start(tmp_path, trials=200) as first:
        while len(measured_in(tmp_path)) < 1:
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.05)
        with start(tmp_path, "--resume") as second:
            said, _ = second.communicate(timeout=60)
        first.kill()
    assert second.returncode == 2
    assert "Another run is at work" in said


@pytest.mark.slow
def test_ray_runs_the_same_job_through_the_same_code(tmp_path):
    pytest.importorskip("ray")
    with start(tmp_path, "--host", "ray", "--workers", "2", trials=5) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    front = json.loads((tmp_path / "front.json").read_text())
    assert front["counts"]["complete"] == 5
    assert front["points"]
    assert front["baselines"]
    for point in front["points"]:
        assert (tmp_path / point["weights_file"]).exists()
    before = measured_in(tmp_path)
    assert len(before) == 5
    with start(tmp_path, "--host", "ray", "--resume", trials=7) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    after = measured_in(tmp_path)
    assert len(after) == 7
    assert {name: after[name] for name in before} == before


def test_ctrl_c_during_an_append_waits_for_the_line(tmp_path, monkeypatch):
    """The interrupt comes after the line is whole and the lock is free."""
    synchronise = os.fsync

    def interrupted(file):
        os.kill(os.getpid(), signal.SIGINT)
        synchronise(file)

    storage = open_journal(tmp_path / "study.journal")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optuna.create_study(study_name="tiny", storage=storage)
    monkeypatch.undo()
    lines = (tmp_path / "study.journal").read_text().splitlines(keepends=True)
    assert lines
    assert all(line.endswith("\n") and json.loads(line) for line in lines)
    assert not list(tmp_path.glob("*.lock*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_is_raised_again():
    class Interrupting:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    with remembered() as check:
        check()
        thing = Interrupting()
        del thing  # the interrupt is raised inside the destructor, where Python ignores it
        with pytest.raises(KeyboardInterrupt):
            check()
