"""What was known before the search, as a baseline of every report: seeds only, and the prior."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from adq_search.cli._app import app
from adq_search.errors import AdqSearchWarning, SensitivityError
from adq_search.hosting import HostedTrial, HostOptions, HostOutcome
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.report import headline, read_front, within_budgets
from adq_search.results import write_outcome
from adq_search.session import SENSITIVITY_FILE, measure_sensitivity, prepare, reopen
from tests.test_hosts import TINY
from tests.test_report import record, records, report_of, write

__all__ = ["records"]  # the fixture


def test_hypervolume_of_seeds_only_by_hand(records):
    volume = report_of(records).hypervolume
    # Seeds and baselines: (2, 0.3), (3, 0.7), (8, 0.8); reference energy 8.8, accuracy 0.
    value = (3 - 2) * 0.3 + (8 - 3) * 0.7 + (8.8 - 8) * 0.8
    assert volume.seeds_share == pytest.approx(value / 8.8)
    assert volume.seeds_share < volume.share
    sentence = next(s for s in headline(report_of(records)) if s.startswith("Seeds"))
    assert f"{volume.seeds_share:.4f}" in sentence
    assert f"{volume.share:.4f}" in sentence


def test_without_seeds_there_is_no_such_baseline():
    report = report_of([record(0, 0.5, 2.0), record(1, 0.6, 3.0)])
    assert report.hypervolume.seeds_share is None
    assert not any(s.startswith("Seeds") for s in headline(report))


def test_seeds_over_budget_do_not_count(records):
    volume = report_of(records, budgets={"energy_pj": 2.5}).hypervolume
    assert volume.seeds_share == pytest.approx((8.8 - 2) * 0.3 / 8.8)


def test_a_front_file_of_an_earlier_version_still_loads(records, tmp_path):
    folder = write(records, tmp_path, report_of(records))
    content = json.loads((folder / "front.json").read_text())
    del content["hypervolume"]["seeds_share"]
    (folder / "front.json").write_text(json.dumps(content))
    assert read_front(folder).hypervolume.seeds_share is None


def test_the_report_names_the_best_policy_within_the_budgets(records):
    budgets = {"energy_pj": 5.0, "weight_bytes": 40.0}
    sentence = within_budgets(report_of(records, budgets=budgets))
    assert "energy per inference of at most 5.00 pJ and weight memory of at most 40.0 B" in sentence
    assert "is trial 3: validation accuracy 70.00%" in sentence
    policy = next(r for r in records if r.number == 3).policy_hash
    assert f"policies/{policy}.json" in sentence
    nothing = within_budgets(report_of(records, budgets={"energy_pj": 0.5}))
    assert nothing.startswith("No policy with energy per inference of at most 0.500 pJ")


def test_the_sentence_on_the_prior_names_the_group_it_fails_on(records):
    prior = {
        "estimator": "kl",
        "n_measured": 5,
        "rank_correlation": 0.731,
        "by_group": {"stem": 0.91, "head": -0.2, "middle": None},
    }
    sentence = next(s for s in headline(report_of(records, prior=prior)) if "prior" in s)
    assert "(kl) ranks the 5 measured policies with a correlation of 0.73" in sentence
    assert "from -0.20 (head) to 0.91" in sentence


@pytest.fixture
def session(tmp_path):
    return prepare(plan(read_job(TINY)), tmp_path)


def outcome_of(session, n):
    policies = [seed.policy for seed in session.seeds][:n]
    trials = [
        HostedTrial(i, session.plan.space.params_of(p), session.measure(p), session.origin_of(p))
        for i, p in enumerate(policies)
    ]
    return HostOutcome(tuple(trials))


@pytest.mark.parametrize("n", [3, 5])
def test_the_prior_is_judged_by_all_trials_that_a_report_has(session, n):
    write_outcome(session, outcome_of(session, n), HostOptions(study="tiny"), started=0.0)
    prior = read_front(session.folder).prior
    assert (prior["estimator"], prior["n_measured"]) == ("fisher", n)
    assert -1.0 <= prior["rank_correlation"] <= 1.0
    assert set(prior["by_group"]) == {"3", "5"}
    page = (session.folder / "report.html").read_text()
    assert "Rank correlation of predicted loss" in page


def test_a_report_does_not_fail_for_sensitivities_of_another_version(session):
    outcome = outcome_of(session, 2)
    file = session.folder / SENSITIVITY_FILE
    content = json.loads(file.read_text())
    content["signature"]["code"] = "0.0.1"
    file.write_text(json.dumps(content))
    with pytest.warns(AdqSearchWarning, match="The prior is not judged.*code 0.0.1"):
        report = write_outcome(session, outcome, HostOptions(study="tiny"), started=0.0)
    assert report.prior is None


def test_a_session_reads_its_sensitivities_back(session, monkeypatch):
    known = reopen(session.folder).sensitivity()
    assert known == measure_sensitivity(session.plan, session.teacher)
    monkeypatch.setattr(  # what is kept is not estimated again
        "adq_search.sensitivity.fisher.FisherEstimator.sample", lambda *_: pytest.fail("measured")
    )
    assert session.sensitivity() == known
    for seed in session.seeds:
        if seed.predicted is not None:
            assert known.predict(seed.policy) == seed.predicted


def test_the_jobs_time_budget_bounds_the_prior(session):
    planned = plan(session.plan.job.with_search(prior_budget_s=1e-6))
    with pytest.raises(SensitivityError, match="the time budget is 1e-06 s"):
        measure_sensitivity(planned, session.teacher)
    assert measure_sensitivity(planned, session.teacher, budget_s=1e6)  # the caller's counts


def test_one_budget_mode_from_the_command_line(tmp_path):
    budgets = ["--budget", "weight_bytes=0.25KiB", "--budget", "energy_pj=2nJ"]
    result = CliRunner().invoke(
        app, ["run", str(TINY), "--out", str(tmp_path), *budgets, "--trials", "4"]
    )
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "weight_bytes from 171 to 360, at most 256" in said
    assert "The best policy with weight memory of at most 256 B and energy" in said
    front = read_front(tmp_path)
    assert front.points
    for point in front.points:
        assert point.cost["weight_bytes"] <= 256
        assert point.cost["energy_pj"] <= 2000
