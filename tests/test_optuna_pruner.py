"""FrontPruner: it stops what cannot reach the front, keeps scores, and counts its errors."""

import math

import optuna
import pytest
from optuna.trial import TrialState

from adq_search.errors import AdqSearchError
from adq_search.plugins._stopping_rule import StoppingRule
from adq_search.plugins.optuna_pruner import CONDEMNED, SCORES, FrontPruner


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def study_with(n=20, directions=("maximize", "minimize")):
    """Return a study whose finished trials ended exactly as their scores said: 1 - score."""
    study = optuna.create_study(directions=directions)
    for i in range(n):
        score = 0.1 + 0.8 * i / n
        study.add_trial(
            optuna.create_trial(
                values=[1.0 - score, 0.5][: len(directions)],
                user_attrs={SCORES: {"2": score, "4": score}},
            )
        )
    return study


def test_a_trial_below_the_front_at_its_cost_is_stopped():
    study, pruner = study_with(), FrontPruner((2,), spared=0.0)
    assert pruner.should_stop(study.ask(), 2, 0.6, known=[0.5])


@pytest.mark.parametrize(
    ("score", "cost"),
    [(0.6, 0.4), (0.05, 0.5)],
    ids=["cheaper than any", "better than any"],
)
def test_a_trial_that_may_reach_the_front_goes_on(score, cost):
    study, pruner = study_with(), FrontPruner((2,), spared=0.0)
    assert not pruner.should_stop(study.ask(), 2, score, known=[cost])


def test_it_decides_at_rungs_alone_and_keeps_every_score():
    study, pruner = study_with(), FrontPruner((2,), spared=0.0)
    trial = study.ask()
    assert not pruner.should_stop(trial, 1, 0.6, known=[0.5])
    assert pruner.should_stop(trial, 2, 0.6, known=[0.5])
    assert trial.user_attrs[SCORES] == {"1": 0.6, "2": 0.6}
    assert trial.user_attrs[CONDEMNED] == 2


def test_few_finished_trials_stop_nobody():
    study, pruner = study_with(7), FrontPruner((2,), spared=0.0)
    assert not pruner.should_stop(study.ask(), 2, 0.8, known=[0.5])


def test_noisy_curves_call_for_more_than_a_bad_start():
    """The same trial goes on where finished trials ended far from their forecasts."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    for i in range(20):
        score, wobble = 0.1 + 0.04 * i, 0.5 * (-1.0) ** i
        study.add_trial(
            optuna.create_trial(
                values=[1.0 - score + wobble, 0.5], user_attrs={SCORES: {"2": score}}
            )
        )
    assert not FrontPruner((2,), spared=0.0, confidence=0.99).should_stop(
        study.ask(), 2, 0.6, known=[0.5]
    )


def test_scores_may_be_maximized_and_of_another_unit():
    study = optuna.create_study(directions=["minimize", "minimize"])
    for i in range(20):
        score = 50.0 + i
        study.add_trial(
            optuna.create_trial(
                values=[0.5, 10.0 - 0.1 * score], user_attrs={SCORES: {"3": -score}}
            )
        )
    pruner = FrontPruner((3,), measured=1, is_score_maximized=True, spared=0.0)
    assert pruner.should_stop(study.ask(), 3, 55.0, known=[0.5])
    assert not pruner.should_stop(study.ask(), 3, 75.0, known=[0.5])


def test_spared_trials_count_false_stops():
    study, pruner = study_with(), FrontPruner((2,), spared=1.0)
    ends = [(0.2, 0.5), (0.99, 0.5), (0.3, 0.5), (0.1, 0.5)]
    for end in ends:
        trial = study.ask()
        assert not pruner.should_stop(trial, 2, 0.7, known=[0.5])
        assert not pruner.should_stop(trial, 2, 0.7, known=[0.5])
        study.tell(trial, end)
    found = pruner.false_stops(study)
    assert (found.n_condemned, found.n_spared, found.n_on_front) == (4, 4, 1)
    assert found.rate == 0.25


def test_no_spared_trial_means_no_rate():
    assert math.isnan(FrontPruner((2,)).false_stops(study_with()).rate)


def test_the_share_of_spared_trials_is_the_one_asked_for():
    rule = StoppingRule((2,), confidence=0.9, spared=0.2, seed=0)
    assert 150 < sum(rule.is_spared(i) for i in range(1000)) < 250


def test_stopped_trials_are_pruned_and_never_on_the_front():
    study, pruner = study_with(), FrontPruner((2,), spared=0.0)

    def objective(trial):
        trial.suggest_float("x", 0.0, 1.0)
        for epoch in range(1, 5):
            if pruner.should_stop(trial, epoch, 0.5, known=[0.6]):
                raise optuna.TrialPruned
        return 0.5, 0.6

    study.optimize(objective, n_trials=3)
    assert [t.state for t in study.trials[-3:]] == [TrialState.PRUNED] * 3
    assert all(t.number < 20 for t in study.best_trials)


def test_one_objective_works_by_report_and_should_prune():
    study = optuna.create_study(pruner=FrontPruner((2,), spared=0.0))
    ends = {}

    def objective(trial):
        level = trial.suggest_float("level", 0.0, 1.0)
        for epoch in range(1, 5):
            trial.report(level + 1.0 / epoch, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        ends[trial.number] = level
        return level

    for i in range(10):
        study.enqueue_trial({"level": 0.4 + 0.05 * i})
    study.enqueue_trial({"level": 0.95})
    study.enqueue_trial({"level": 0.1})
    study.optimize(objective, n_trials=12)
    assert study.trials[10].state == TrialState.PRUNED
    assert study.trials[11].state == TrialState.COMPLETE


def test_one_objective_works_by_should_stop():
    study = study_with(directions=("maximize",))
    assert FrontPruner((2,), spared=0.0).should_stop(study.ask(), 2, 0.7)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rungs": ()}, "Rungs are rising epochs"),
        ({"rungs": (4, 2)}, "Rungs are rising epochs"),
        ({"rungs": (0, 2)}, "Rungs are rising epochs"),
        ({"rungs": (2,), "confidence": 0.2}, "confidence lies from"),
        ({"rungs": (2,), "spared": 1.5}, "confidence lies from"),
    ],
)
def test_wrong_arguments_are_refused(arguments, text):
    with pytest.raises(AdqSearchError, match=text):
        FrontPruner(**arguments)


def test_every_other_objective_must_be_known():
    with pytest.raises(AdqSearchError, match="2 objectives, of which training measures one, but 0"):
        FrontPruner((2,)).should_stop(study_with().ask(), 2, 0.5)
