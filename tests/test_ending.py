"""How a search ends: hopeless trials stopped, quiet searches ended, fronts replicated."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from adq_search.hosting import HostOptions
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_ending import Replicates, is_stopped
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_objective import (
    REPLICATE_SEED,
    PolicyObjective,
    Verdict,
    measuring,
    result_of,
)
from adq_search.plugins.optuna_pruner import SCORES, FrontPruner, make_pruner
from adq_search.progress import NoProgress
from adq_search.report import read_front, read_trials
from adq_search.results import write_outcome
from adq_search.session import prepare
from tests.test_hosts import study_in

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def job():
    return read_job(TINY).with_training(epochs=1)


@pytest.fixture(scope="module")
def prepared(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(plan(job), folder)
    return folder


@pytest.fixture
def ready(job, prepared, tmp_path):
    """Return a session under further search settings, in a folder of its own."""

    def make(**search):
        if not (tmp_path / "run").exists():
            shutil.copytree(prepared, tmp_path / "run")
        return prepare(plan(job.with_search(**search)), tmp_path / "run")

    return make


def run(session, **options):
    host, asked = OptunaHost(), HostOptions(study="tiny", **options)
    host.check(session.plan, session.folder, asked)
    return host.run(session, asked, NoProgress())


def report_of(session, outcome):
    write_outcome(session, outcome, HostOptions(study="tiny"), started=0.0)
    return read_front(session.folder)


def replicates_in(study):
    return [t for t in study.get_trials() if REPLICATE_SEED in t.user_attrs]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_front_is_trained_again_with_new_seeds(ready, workers):
    session = ready(replicates=2)
    outcome = run(session, workers=workers)
    assert len(outcome.trials) == session.plan.job.search.trials
    front = {p.policy_hash for p in report_of(session, outcome).points}
    trials = replicates_in(study_in(session.folder))
    keys = {(t.user_attrs["policy_hash"], t.user_attrs[REPLICATE_SEED]) for t in trials}
    assert keys == {(name, seed) for name in front for seed in (1, 2)}
    for name, seed in keys:
        again, first = (session.result_of_hash(name, seed=s) for s in (seed, None))
        assert (again.seed, first.seed) == (seed, 0)
        assert again.weights_fingerprint != first.weights_fingerprint
        assert again.policy == first.policy
    assert {f.stem for f in (session.folder / "weights").iterdir()} >= front
    assert not list((session.folder / "weights").glob("*-*"))
    status = OptunaHost().status(str(session.folder / "study.journal"), "tiny")
    assert status.counts["replicates"] == len(keys)
    assert status.n_finished == session.plan.job.search.trials


def test_replicates_are_reported(ready):
    session = ready(replicates=2)
    report = report_of(session, run(session))
    for point in report.points:
        again = point.replicated
        assert [r.seed for r in again.replicates] == [1, 2]
        mean = sum(r.accuracy for r in again.replicates) / 2
        assert again.means["accuracy"] == pytest.approx(mean)
        assert 0.0 <= again.probability <= 1.0
    assert report.points[0].replicated.probability > 0.0
    assert 0.0 < report.hypervolume.retrained_share < 1.0
    rows = (session.folder / "replicates.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(report.points)
    assert json.loads((session.folder / "front.json").read_text())["points"][0]["replicated"]
    page = (session.folder / "report.html").read_text()
    assert "The front trained again" in page
    assert "trained again: mean and standard error" in page
    assert 'stroke="#CC79A7"' in (session.folder / "front.svg").read_text()
    assert len(read_trials(session.folder)) == session.plan.job.search.trials


def test_resuming_asks_for_more_replicates_and_repeats_none(ready):
    run(ready(replicates=2))
    session = ready(replicates=3)
    done = {f: f.stat().st_mtime_ns for f in (session.folder / "replicates").iterdir()}
    outcome = run(session, resume=True)
    after = {f: f.stat().st_mtime_ns for f in (session.folder / "replicates").iterdir()}
    assert len(after) == len(done) // 2 * 3
    assert {f: after[f] for f in done} == done
    assert len(report_of(session, outcome).points[0].replicated.replicates) == 3


def test_resuming_with_more_trials_measures_policies_not_replicates(ready):
    first = run(ready(replicates=2))
    session = ready(replicates=2, trials=9)
    outcome = run(session, resume=True)
    assert len(outcome.trials) == 9
    assert outcome.trials[: len(first.trials)] == first.trials
    assert all(t.result.seed == 0 for t in outcome.trials)


def test_a_lost_replicate_is_trained_again_and_a_double_one_is_not(ready):
    session = ready(replicates=2)
    run(ready(replicates=0))
    study = study_in(session.folder)
    phase = Replicates(study, session)
    ran = []
    assert not phase.advance(NoProgress(), lambda: ran.append(1))
    queued = replicates_in(study)
    lost = study.ask()
    study.tell(lost.number, state=TrialState.FAIL)
    study.enqueue_trial(queued[1].system_attrs["fixed_params"], user_attrs=queued[1].user_attrs)
    outcome = run(session, resume=True)
    trials = replicates_in(study_in(session.folder))
    keys = [
        (t.user_attrs["policy_hash"], t.user_attrs[REPLICATE_SEED])
        for t in trials
        if t.state == TrialState.COMPLETE
    ]
    assert len(keys) == len(set(keys)) == 2 * len(report_of(session, outcome).points)
    assert [t.state for t in trials].count(TrialState.PRUNED) == 1


def test_a_host_without_replicates_gets_them_in_the_report(ready):
    """`write_outcome` trains what no host did, so every host has replicates."""
    session = ready(replicates=2)
    outcome = run(ready(replicates=0))
    assert not (session.folder / "replicates").exists()
    assert all(p.replicated is not None for p in report_of(session, outcome).points)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_quiet_search_ends_before_its_last_trial(ready, workers):
    session = ready(trials=200, stop={"patience": 5, "errors": 1e6, "noise": 0.1})
    outcome = run(session, workers=workers)
    assert outcome.end is not None
    assert 10 <= len(outcome.trials) < 20
    assert outcome.end.n_trials <= len(outcome.trials)
    study = study_in(session.folder)
    assert is_stopped(study)
    assert not study.get_trials(states=(TrialState.RUNNING,))
    report = report_of(session, outcome)
    assert report.end == outcome.end.to_json()
    assert "The search ended after" in (session.folder / "report.html").read_text()


def test_a_stopped_search_goes_on_without_the_rule_and_stays_stopped_with_it(ready):
    rule = {"patience": 5, "errors": 1e6, "noise": 0.1}
    first = run(ready(trials=14, stop=rule))
    again = run(ready(trials=14, stop=rule), resume=True)
    assert again.trials == first.trials
    assert again.end == first.end
    freed = run(ready(trials=14), resume=True)
    assert len(freed.trials) == 14
    assert freed.end is None


def test_a_stopped_study_measures_nothing_more(ready):
    session = ready(trials=50, stop={"patience": 5, "errors": 1e6, "noise": 0.1})
    run(session)
    study = study_in(session.folder)
    n = len(measuring(study.get_trials()))
    study.optimize(PolicyObjective(session), n_trials=2)
    assert len(measuring(study.get_trials())) == n
    assert study.get_trials()[-1].user_attrs["verdict"] == Verdict.SURPLUS


class Strict(FrontPruner):
    """Condemns every trial at the first rung, and spares none."""

    def should_stop(self, trial, epoch, score, *, known=()):
        super().should_stop(trial, epoch, score, known=known)
        return True


def test_a_stopped_trial_keeps_its_scores_and_is_never_on_the_front(job, tmp_path):
    session = prepare(plan(job.with_training(epochs=3)), tmp_path / "pruned")
    study = optuna.create_study(directions=["maximize", "minimize"])
    seeds = [seed.policy for seed in session.seeds[:2]]
    others = [session.plan.space.policy_of(drawn) for drawn in drawn_parameters(session, n=2)]
    for policy in (*seeds, *others):
        study.enqueue_trial(session.plan.space.params_of(policy))
    study.optimize(PolicyObjective(session, pruner=Strict((1,))), n_trials=4)
    complete, stopped = study.trials[:2], study.trials[2:]
    assert [t.state for t in complete] == [TrialState.COMPLETE] * 2  # seeds always finish
    assert [t.state for t in stopped] == [TrialState.PRUNED] * 2
    for trial in stopped:
        assert list(trial.user_attrs[SCORES]) == ["1"]
        result = result_of(trial)
        assert (result.state, result.epochs) == ("stopped", 1)
        assert session.result_of(result.policy) == result
        assert not session.weights_file(result.policy).exists()
    assert {t.number for t in study.best_trials} <= {0, 1}
    assert list(complete[0].user_attrs[SCORES]) == ["1", "2", "3"]


def drawn_parameters(session, n):
    """Return parameters of policies that are no seeds, from a study of their own."""
    objective = PolicyObjective(session)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seeds = {seed.policy for seed in session.seeds}
    drawn = (study.ask(objective.distributions).params for _ in range(20))
    return [p for p in drawn if session.plan.space.policy_of(p) not in seeds][:n]


def test_a_job_with_a_pruner_reports_its_errors(ready, job, tmp_path):
    asked = job.with_training(epochs=4).with_search(pruner="front", trials=12)
    session = prepare(plan(asked), tmp_path / "front")
    outcome = run(session)
    assert len(outcome.trials) == 12
    stops = outcome.false_stops
    n_stopped = sum(t.result.state == "stopped" for t in outcome.trials)
    assert n_stopped + stops.n_spared <= stops.n_condemned
    report = report_of(session, outcome)
    assert report.false_stops == {
        "n_condemned": stops.n_condemned,
        "n_spared": stops.n_spared,
        "n_on_front": stops.n_on_front,
    }
    assert all(p.state == "complete" for p in report.points)
    pruned = replace(outcome, false_stops=replace(stops, n_condemned=9, n_spared=4, n_on_front=1))
    report_of(session, pruned)
    page = (session.folder / "report.html").read_text()
    assert "condemned 9 trials. 4 of them ran on" in page
    assert "25 % false stops" in page


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(1, None), (2, (1,)), (8, (2, 3, 4, 5, 6, 7)), (30, tuple(range(7, 30)))]
)
def test_a_jobs_rungs_begin_after_a_quarter_of_its_epochs(job, epochs, rungs):
    asked = plan(job.with_training(epochs=epochs).with_search(pruner="front"))
    pruner = make_pruner(asked)
    assert (None if pruner is None else pruner._rule.rungs) == rungs
    assert make_pruner(plan(job)) is None


def test_one_objective_besides_cost_may_be_a_loss(job, tmp_path):
    asked = job.with_training(epochs=2).with_search(
        objectives=["energy_pj", "kl"], pruner="front", trials=9
    )
    outcome = run(prepare(plan(asked), tmp_path / "kl"))
    assert len(outcome.trials) == 9
    assert any(t.result.state == "complete" for t in outcome.trials)
