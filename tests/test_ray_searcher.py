"""What Ray is asked and told, without Ray running: proposals, records, refusals."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.samplers import RandomSampler

from adq_search.errors import AdqSearchError, StorageError
from adq_search.hosting import HostOptions
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins._ray_home import Home, Measured, Turn
from adq_search.plugins._ray_records import (
    RayRecord,
    TrialStore,
    false_stops,
    hosted_trials,
    reconcile,
    records_of,
    write_record,
)
from adq_search.plugins.ray_host import RayHost
from adq_search.plugins.ray_scheduler import FrontScheduler
from adq_search.plugins.ray_searcher import PolicySearcher
from adq_search.plugins.ray_trainable import param_space
from adq_search.session import prepare
from adq_search.stopping import FalseStops
from adq_search.trial import TrialResult

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(plan(read_job(TINY)), tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def session(prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path / "session")
    return replace(prepared, folder=tmp_path / "session")


def report_of(session, params, state="complete", **figures):
    policy = session.plan.space.policy_of(params)
    measured = {"accuracy": 0.5, "loss": 1.0, "kl": 0.1} | figures
    return {**session.plan.totals(policy), **measured, "state": state, "train_losses": [0.9, 0.8]}


def draw(searcher, n):
    return {f"t{i}": searcher.suggest(f"t{i}") for i in range(n)}


def policies(session, params):
    return [session.plan.space.policy_of(p) for p in params]


@pytest.mark.parametrize("sampler", [None, RandomSampler(seed=0)], ids=["guide", "optuna"])
def test_seeds_come_first_and_no_policy_comes_twice(session, sampler):
    searcher = PolicySearcher(session, sampler=sampler)
    drawn = policies(session, draw(searcher, 60).values())
    assert drawn[: len(session.seeds)] == [seed.policy for seed in session.seeds]
    assert len(set(drawn)) == 60


def test_draws_follow_the_seed(session):
    assert draw(PolicySearcher(session), 20) == draw(PolicySearcher(session), 20)
    other = draw(PolicySearcher(session, seed=1), 20)
    assert other != draw(PolicySearcher(session), 20)


@pytest.mark.parametrize("name", ["weight_bytes", "energy_pj"])
@pytest.mark.parametrize("sampler", [None, RandomSampler(seed=0)], ids=["guide", "optuna"])
def test_no_trial_is_over_a_budget(session, name, sampler):
    low, high = session.plan.cost_range(name)
    budgets = {name: low + 0.5 * (high - low)}
    within = replace(session, plan=plan(session.plan.job.with_search(budgets=budgets)))
    searcher = PolicySearcher(within, sampler=sampler)
    for policy in policies(session, draw(searcher, 20).values()):
        assert session.plan.totals(policy)[name] <= budgets[name]
    assert searcher.n_rejected > 0  # uniform W8A8 is among the seeds


def test_the_search_ends_when_the_space_is_exhausted(session):
    job = read_job(TINY)
    content = job.to_plain()
    content["space"]["default"] = {"weight_bits": [2, 4], "input_bits": [4], "schemes": ["lsq"]}
    small = replace(session, plan=plan(type(job).model_validate(content)), seeds=())
    searcher = PolicySearcher(
        replace(small, folder=session.folder / "small"), sampler=RandomSampler()
    )
    n = small.plan.space.n_policies
    drawn = [p for p in draw(searcher, n + 3).values() if p != "FINISHED"]
    assert len(drawn) == n == len(set(policies(small, drawn)))


def test_the_guide_learns_from_what_tune_tells(session):
    """Draws follow the seed, so that they differ between two searches by what was told alone."""
    proposed = {}
    for best in ("lsq", "adq"):
        searcher, drawn = PolicySearcher(session), []
        for i in range(24):
            params = searcher.suggest(f"t{i}")
            told = report_of(session, params)
            kl = (0.01 if params["5.scheme"] == best else 0.5) * 1000.0 / told["energy_pj"]
            searcher.on_trial_complete(f"t{i}", {**told, "kl": kl, "accuracy": 1.0 - kl})
            drawn.append(params)
        proposed[best] = drawn
        assert searcher._proposals._guide.n_told == 24
    n_seeds = len(session.seeds)
    assert proposed["lsq"][:n_seeds] == proposed["adq"][:n_seeds]
    assert proposed["lsq"][n_seeds:] != proposed["adq"][n_seeds:]


@pytest.mark.parametrize(
    ("report", "state"),
    [
        ({"state": "running"}, "stopped"),
        ({"state": "running", "accuracy": 0.99}, "stopped"),  # R1, whatever it reported
        ({"state": "diverged", "kl": math.nan}, "diverged"),
        ({"state": "complete", "accuracy": math.nan}, "diverged"),
        ({"state": "over budget"}, "over budget"),
        (None, "failed"),
    ],
    ids=["stopped", "stopped with a score", "diverged", "nan", "over budget", "lost"],
)
@pytest.mark.parametrize("sampler", [None, RandomSampler(seed=0)], ids=["guide", "optuna"])
def test_only_complete_trials_have_values(session, tmp_path, report, state, sampler):
    searcher = PolicySearcher(session, sampler=sampler)
    params = searcher.suggest("a")
    told = None if report is None else report_of(session, params, **report)
    searcher.on_trial_complete("a", told, error=told is None)
    searcher.save(str(tmp_path / "state"))
    kept = json.loads((tmp_path / "state").read_text())["told"]["a"]
    assert (kept["state"], kept["values"]) == (state, None)
    if sampler is not None:
        assert searcher._proposals._study.best_trials == []


@pytest.mark.parametrize("sampler", [False, True], ids=["guide", "optuna"])
def test_a_restored_searcher_goes_on_where_it_was(session, tmp_path, sampler):
    def make():
        return PolicySearcher(session, sampler=RandomSampler(seed=0) if sampler else None)

    searcher = make()
    drawn = draw(searcher, 15)
    for trial_id in list(drawn)[:12]:
        searcher.on_trial_complete(trial_id, report_of(session, drawn[trial_id]))
    searcher.save(str(tmp_path / "state"))
    restored = make()
    restored.restore(str(tmp_path / "state"))
    for trial_id in list(drawn)[12:]:  # trials that Tune goes on with
        restored.on_trial_complete(trial_id, report_of(session, drawn[trial_id]))
    more = [restored.suggest(f"more{i}") for i in range(10)]
    everything = policies(session, [*drawn.values(), *more])
    assert len(set(everything)) == 25  # none twice, before and after
    restored.save(str(tmp_path / "again"))
    state = json.loads((tmp_path / "again").read_text())
    assert set(state["told"]) == set(drawn)
    assert set(state["running"]) == {f"more{i}" for i in range(10)}


def test_nothing_is_proposed_once_the_search_is_over(session):
    answers = iter([False, True])
    searcher = PolicySearcher(session, is_over=lambda: next(answers))
    assert searcher.suggest("a") != "FINISHED"
    assert searcher.suggest("b") == "FINISHED"


def test_a_trial_tried_again_after_it_failed_is_learned_once(session, tmp_path):
    searcher = PolicySearcher(session)
    params = searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    for _ in range(2):
        searcher.on_trial_complete("a", report_of(session, params))
    assert searcher._proposals._guide.n_told == 1


def test_a_state_of_another_version_is_refused(session, tmp_path):
    (tmp_path / "state").write_text('{"schema": "adq_search.searcher/0"}')
    with pytest.raises(StorageError, match="another version"):
        PolicySearcher(session).restore(str(tmp_path / "state"))


def test_every_value_of_the_flat_space_is_a_policy(session):
    space = param_space(session.plan)
    assert set(space) == {p.name for p in session.plan.space.parameters}
    for _ in range(50):
        session.plan.space.policy_of({name: domain.sample() for name, domain in space.items()})


def record_for(session, policy, number=0, **changes):
    params = session.plan.space.params_of(policy)
    kept = {"trial_id": f"id{number}", "place": f"tiny/id{number}", "origin": "sampler"}
    kept |= {"worker": "", "started_at": "2026-01-01T00:00:00+00:00"} | changes
    record = RayRecord(policy.hash, number, parameters=params, **kept)
    write_record(session.folder, record)
    return record


def leave_in_storage(session, policy, place):
    """Measure a policy as a worker does, into a checkpoint of Ray's."""
    folder = session.folder / "ray" / place / "checkpoint_000000"
    return replace(session, folder=folder).measure(policy)


def test_a_result_that_nobody_brought_home_is_brought(session):
    """The driver died after the trial had finished and before it heard of it."""
    policy = session.seeds[0].policy
    record_for(session, policy)
    result = leave_in_storage(session, policy, "tiny/id0")
    assert hosted_trials(session) == ()
    assert reconcile(session, TrialStore(str(session.folder / "ray"))) == {}
    (hosted,) = hosted_trials(session)
    assert hosted.result == result
    assert session.weights_file(policy).exists()


@pytest.mark.parametrize("damage", ["result cut", "weights cut", "weights of another"])
def test_a_half_written_result_is_not_brought_home(session, damage):
    policy, other = session.seeds[0].policy, session.seeds[1].policy
    record_for(session, policy)
    leave_in_storage(session, policy, "tiny/id0")
    folder = session.folder / "ray" / "tiny" / "id0" / "checkpoint_000000"
    weights = folder / "weights" / f"{policy.hash}.safetensors"
    if damage == "result cut":
        file = folder / "trials" / f"{policy.hash}.json"
        file.write_text(file.read_text()[:100])
    elif damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        replace(session, folder=folder).measure(other)
        shutil.copy(folder / "weights" / f"{other.hash}.safetensors", weights)
    found = reconcile(session, TrialStore(str(session.folder / "ray")))
    assert set(found) == {policy.hash}  # tried again, from there if it can be
    assert hosted_trials(session) == ()
    assert not session.weights_file(policy).exists()


def test_results_of_the_other_host_get_records(session):
    """A search that Optuna began goes on with Ray: its results count."""
    policy = session.seeds[2].policy
    session.measure(policy)
    reconcile(session, TrialStore(str(session.folder / "ray")))
    (hosted,) = hosted_trials(session)
    assert hosted.result.policy == policy
    assert hosted.origin == session.seeds[2].origin


def test_trials_are_told_what_is_measured_with_its_curve(session):
    first, second = (seed.policy for seed in session.seeds[:2])
    home = Home(str(session.folder))
    record_for(session, first, train_losses=(0.9, 0.8))
    assert home.measured(first.hash, "a") is Turn.OURS  # it has begun
    result = session.measure(first)
    assert home.measured(first.hash, "a") == Measured(result, (0.9, 0.8))
    assert home.measured(second.hash, "a") is Turn.OURS
    session.measure(second)  # by another host: without a record
    assert home.measured(second.hash, "a").train_losses == ()


def test_a_policy_is_one_trials_turn_until_that_is_over(session):
    policy = session.seeds[0].policy
    home = Home(str(session.folder))
    home.give(policy.hash, "a")
    assert home.measured(policy.hash, "a") is Turn.OURS
    assert home.measured(policy.hash, "b") is Turn.OTHERS
    home.give(policy.hash, "b")
    assert home.measured(policy.hash, "a") is Turn.OTHERS
    result = session.measure(policy)
    assert home.measured(policy.hash, "a") == home.measured(policy.hash, "b")
    assert home.measured(policy.hash, "b").result == result
    home.give("another", "b")
    home.give_back()
    assert home.measured("another", "a") is Turn.OURS


def test_trials_are_told_one_donor_whatever_finishes_meanwhile(session):
    first, second, third = (seed.policy for seed in session.seeds[:3])
    home = Home(str(session.folder))
    assert home.donor(first) is None
    session.measure(second)
    found = home.donor(third)
    assert found.policy_hash == second.hash
    assert found.weights == session.weights_file(second).read_bytes()
    session.measure(first)
    assert home.donor(third) == found
    assert home.donor(first) is None
    session.weights_file(second).unlink()
    with pytest.raises(StorageError, match="has lost them"):
        home.donor(third)


def test_condemned_trials_are_followed_to_their_end(session):
    """Three condemned: one stopped, one spared in vain, one spared and on the front."""
    job = session.plan.job.with_search(pruner="front").with_training(epochs=4)
    pruned = replace(session, plan=plan(job))
    accuracies = {0: None, 1: 0.1, 2: 0.9, 3: 0.5}
    for i, accuracy in accuracies.items():
        policy = session.seeds[i].policy
        record_for(pruned, policy, i, condemned=i < 3)
        cost = {"energy_pj": 1.0 if i == 2 else 2.0 + i}
        state = "stopped" if accuracy is None else "complete"
        pruned.adopt(TrialResult(policy, state, accuracy, 1.0, 0.1, cost, 4, 1.0, 1.0))
    assert false_stops(pruned) == FalseStops(n_condemned=3, n_spared=2, n_on_front=1)
    assert false_stops(session) is None  # without a pruner nobody is condemned


def test_a_damaged_record_is_told(session):
    record_for(session, session.seeds[0].policy)
    (file,) = (session.folder / "ray_trials").glob("*.json")
    file.write_text('{"number": 0}')
    with pytest.raises(StorageError, match="another version"):
        records_of(session.folder)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"storage": "sqlite:///x.db"}, "Leave --storage out"),
        ({"gpus_per_trial": 1.5}, "part of one GPU or whole ones"),
        ({"gpus_per_trial": -0.5}, "part of one GPU or whole ones"),
        ({"cpus_per_trial": 0.0}, "needs a processor"),
        ({"address": "ray://head:10001"}, "--address auto"),
        ({"artifacts": "nosuch://bucket"}, "cannot reach the storage"),
        ({"resume": True}, "nothing to resume"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_impossible_wishes_are_refused_before_training(session, tmp_path, options, match):
    with pytest.raises(StorageError, match=match):
        RayHost().check(session.plan, tmp_path / "new", HostOptions("tiny", **options))


def test_a_folder_is_continued_only_when_asked_and_only_its_own_job(session):
    with pytest.raises(StorageError, match="Give --resume"):
        RayHost().check(session.plan, session.folder, HostOptions("tiny"))
    RayHost().check(session.plan, session.folder, HostOptions("tiny", resume=True))
    other = plan(session.plan.job.with_training(epochs=1))
    with pytest.raises(StorageError, match="another job"):
        RayHost().check(other, session.folder, HostOptions("tiny", resume=True))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rungs": ()}, "rising epochs"),
        ({"rungs": (1,), "confidence": 0.2}, "confidence"),
        ({"rungs": (1,), "measured": "acuracy"}, "Did you mean 'accuracy'"),
    ],
    ids=["rungs", "confidence", "measured"],
)
def test_a_scheduler_says_what_is_wrong_with_it(arguments, match):
    objectives = {"accuracy": "max", "energy_pj": "min"}
    asked = {"measured": "accuracy"} | arguments
    with pytest.raises(AdqSearchError, match=match):
        FrontScheduler(asked.pop("rungs"), objectives=objectives, **asked)
