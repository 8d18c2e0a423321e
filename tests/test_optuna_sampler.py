"""PolicySampler: Optuna's own conformance classes, and what a policy sampler promises beyond."""

import math
import pickle

import numpy as np
import optuna
import pytest
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)

from adq_search.errors import CostError
from adq_search.job import SearchSettings
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_sampler import PolicySampler
from adq_search.simulator import published_problem

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(scope="module")
def problem():
    return published_problem(seed=0)


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class TestConformance(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's contract, on ordinary spaces."""

    @pytest.fixture
    def sampler(self, problem):
        return lambda: PolicySampler(problem.space, seed=0)


def drawn(trial, problem):
    for name, found in distributions(problem).items():
        trial.suggest_int(name, found.low, found.high, step=found.step)
    return problem.space.policy_of({n: trial.params[n] for n in distributions(problem)})


def distributions(problem):
    return {p.name: distribution(p) for p in problem.space.parameters}


def searched(problem, n, *, tell_kl=True, seed=0, extra=None, **options):
    """Run a plain study, as anybody would, and return it with its policies."""
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=PolicySampler(problem.space, seed=seed, **options),
    )
    policies = []

    def objective(trial):
        policy = drawn(trial, problem)
        policies.append(policy)
        found = problem.measure(policy, seed=seed)
        factor = 1.0 if extra is None else extra(trial)
        if tell_kl:
            trial.set_user_attr("kl", found.kl * factor)
        return math.exp(-found.kl * factor), found.cost

    study.optimize(objective, n_trials=n)
    return study, policies


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 0.955),
        ({"tell_kl": False}, 0.945),
        ({"costs": True}, 0.96),
        ({"costs": True, "prior": True}, 0.975),
    ],
    ids=["space alone", "no KL", "known costs", "all known"],
)
def test_fifty_trials_come_near_the_front(problem, options, least):
    known = {}
    if "prior" in options:
        known["prior"] = problem.prior
    if "costs" in options:
        known |= {"costs": {"cost": problem.cost_rows}, "objectives": ("accuracy", "cost")}
    _, policies = searched(problem, 50, tell_kl=options.get("tell_kl", True), **known)
    assert len(set(policies)) == 50
    assert problem.share_of_hypervolume(policies) > least  # TPE: 0.74


@pytest.mark.slow
def test_a_seed_gives_the_same_search_again(problem):
    params = [[t.params for t in searched(problem, 20, seed=5)[0].trials] for _ in range(2)]
    assert params[0] == params[1]
    other = [t.params for t in searched(problem, 20, seed=6)[0].trials]
    assert params[0] != other


def test_nothing_is_kept_outside_the_study(problem, tmp_path):
    """A fresh process, and a sampler that was pickled, propose what the first would have."""
    study, _ = searched(problem, 25)
    fresh = PolicySampler(problem.space, seed=0)
    carried = pickle.loads(pickle.dumps(study.sampler))
    for sampler in (fresh, carried):
        again = optuna.create_study(directions=study.directions, sampler=sampler)
        again.add_trials(study.trials)
        rows = [again.ask(distributions(problem)).params for _ in range(3)]
        assert len({tuple(r.values()) for r in rows}) == 3
        assert all(r not in [t.params for t in study.trials] for r in rows)


def test_sixty_four_trials_asked_at_once_are_different(problem):
    study, _ = searched(problem, 12)
    asked = [study.ask(distributions(problem)) for _ in range(64)]
    assert len({tuple(t.params.values()) for t in asked}) == 64


def test_trials_that_another_process_runs_are_not_proposed(problem):
    study, _ = searched(problem, 12)
    probe = PolicySampler(problem.space, seed=0)
    twin = optuna.create_study(directions=study.directions, sampler=probe)
    twin.add_trials(study.trials)
    expected = twin.ask(distributions(problem)).params
    other = optuna.create_study(
        directions=study.directions, sampler=PolicySampler(problem.space, seed=0)
    )
    other.add_trials(study.trials)
    other.enqueue_trial(expected)
    sampler = other.sampler
    other.sampler = optuna.samplers.RandomSampler()
    assert other.ask(distributions(problem)).params == expected  # runs, proposed by nobody here
    other.sampler = sampler
    assert other.ask(distributions(problem)).params != expected


@pytest.mark.slow
def test_a_learning_rate_beside_the_space_is_learned(problem):
    def factor(trial):
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
        kind = trial.suggest_categorical("optimizer", ["sgd", "adam"])
        return math.exp(math.log10(rate / 1e-2) ** 2) * (1.0 if kind == "sgd" else 2.0)

    study, policies = searched(problem, 60, extra=factor)
    late = study.trials[30:]
    rates = [abs(math.log10(t.params["learning_rate"]) + 2.0) for t in late]
    assert np.median(rates) < 0.35  # drawn at random: 0.83
    assert sum(t.params["optimizer"] == "sgd" for t in late) > 24


def test_conditional_parameters_go_to_the_fallback(problem):
    def factor(trial):
        if trial.suggest_categorical("distil", [True, False]):
            return 1.0 / (1.0 + trial.suggest_float("temperature", 0.0, 1.0))
        return 1.0

    study, policies = searched(problem, 25, extra=factor)
    assert len({(p, t.params["distil"]) for p, t in zip(policies, study.trials)}) == 25
    assert any("temperature" in t.params for t in study.trials)


def test_failed_and_pruned_policies_are_not_proposed_again(problem):
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=PolicySampler(problem.space, seed=0)
    )
    policies = []

    def objective(trial):
        policy = drawn(trial, problem)
        policies.append(policy)
        if trial.number % 3 == 0:
            raise ValueError
        if trial.number % 3 == 1:
            raise optuna.TrialPruned
        found = problem.measure(policy, seed=0)
        return found.accuracy, found.cost

    study.optimize(objective, n_trials=30, catch=ValueError)
    assert len(set(policies)) == 30


def test_a_budget_holds_for_every_proposal(problem):
    study, policies = searched(
        problem,
        25,
        costs={"cost": problem.cost_rows},
        objectives=("accuracy", "cost"),
        budgets={"cost": 0.5},
    )
    assert max(t.values[1] for t in study.trials) <= 0.5 + 1e-9


def test_a_budget_without_a_figure_is_refused(problem):
    with pytest.raises(CostError, match=r"budget on 'energy'.*no such cost figure"):
        PolicySampler(problem.space, budgets={"energy": 1.0})


def test_one_objective_is_searched_too(problem):
    study = optuna.create_study(sampler=PolicySampler(problem.space, seed=0))

    def objective(trial):
        found = problem.measure(drawn(trial, problem), seed=0)
        return found.kl + found.cost

    study.optimize(objective, n_trials=40)
    plain = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    plain.optimize(objective, n_trials=40)
    assert study.best_value < plain.best_value


def test_two_threads_may_share_the_sampler(problem):
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=PolicySampler(problem.space, seed=0)
    )

    def objective(trial):
        found = problem.measure(drawn(trial, problem), seed=0)
        return found.accuracy, found.cost

    study.optimize(objective, n_trials=20, n_jobs=2)
    assert len({tuple(sorted(t.params.items())) for t in study.trials}) == 20


def test_every_sampler_that_a_job_may_name_is_known():
    for name in ("guide", "tpe", "nsga2", "gp", "random"):
        assert SearchSettings(sampler=name).sampler == name
