"""BulkDatabase: it writes what Optuna's own storage writes, in few statements."""

import copy
import threading

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from adq_search.plugins.optuna_database import BulkDatabase
from adq_search.plugins.optuna_storage import open_storage
from tests.servers import Database, grpc_proxy

DISTRIBUTIONS = {
    "width": IntDistribution(2, 8),
    "even": IntDistribution(2, 8, step=2),
    "rate": FloatDistribution(1e-5, 1e-1, log=True),
    "ratio": FloatDistribution(0.0, 1.0),
    "scheme": CategoricalDistribution(("adq", "lsq", None, 4)),
}
PARAMS = {"width": 4, "even": 6, "rate": 1.1e-3, "ratio": 0.1 + 0.2, "scheme": None}
FULL = {
    "params": PARAMS,
    "distributions": DISTRIBUTIONS,
    "user_attrs": {"policy_hash": "ä%s:'", "result": {"layers": [4, 0.9]}, "none": None},
    "system_attrs": {"fixed_params": {"width": 4}},
    "constraints": {"weight_bytes": -12.5, "macs": 3.0},
}
TEMPLATES = {
    "running": {"state": TrialState.RUNNING, **FULL},
    "waiting": {"state": TrialState.WAITING, "system_attrs": {"fixed_params": {"width": 4}}},
    "complete": {"state": TrialState.COMPLETE, "values": [0.5, float("inf")], **FULL},
    "reports": {"state": TrialState.RUNNING, "intermediate_values": {1: 0.5, 4: 0.75}, **FULL},
    "failed": {"state": TrialState.FAIL, "params": {}, "user_attrs": {"why": "diverged"}},
    "empty": {"state": TrialState.RUNNING},
}


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def server():
    found = Database()
    yield found
    found.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh_url(request, tmp_path):
    """Return a function that returns the URL of an empty database."""
    if request.param == "postgresql":
        return request.getfixturevalue("server").fresh_url
    names = iter(range(9))
    return lambda: f"sqlite:///{tmp_path / str(next(names))}.db"


def template_of(content):
    return create_trial(**copy.deepcopy(content))  # it writes constraints into its arguments


def study_in(storage, n_objectives=2):
    return optuna.create_study(
        study_name="a study", storage=storage, directions=["minimize"] * n_objectives
    )


def counting(storage):
    """Return a list that gets every statement which the storage sends."""
    sent = []
    sqlalchemy.event.listen(
        storage.engine, "before_cursor_execute", lambda *call: sent.append(call[2])
    )
    return sent


def rows_of(storage):
    """Return what the tables about trials hold, in the order of their keys."""
    tables = optuna.storages._rdb.models.BaseModel.metadata.tables
    with storage.engine.connect() as connection:
        return {
            name: [tuple(row) for row in connection.execute(sqlalchemy.select(t).order_by(*t.c))]
            for name, t in tables.items()
            if name.startswith("trial")
        }


@pytest.mark.parametrize("content", TEMPLATES.values(), ids=TEMPLATES)
def test_every_row_is_what_optuna_writes(fresh_url, content):
    template = template_of(content)
    template.datetime_start = template.datetime_start and template.datetime_start.replace(year=2020)
    theirs, ours = RDBStorage(fresh_url()), BulkDatabase(fresh_url())
    for storage in theirs, ours:
        study = study_in(storage)
        for _ in range(3):  # nothing known, known from the database, remembered
            study.add_trial(template)
    assert rows_of(ours) == rows_of(theirs)
    reader = RDBStorage(ours.url).get_all_trials(1)
    assert reader == RDBStorage(theirs.url).get_all_trials(1)
    assert [t.number for t in reader] == [0, 1, 2]
    assert {t.state for t in reader} == {template.state}
    assert reader[2].params == template.params
    assert list(reader[2].params) == list(template.params)
    assert reader[2].distributions == template.distributions
    assert reader[2].user_attrs == template.user_attrs
    assert reader[2].constraints == template.constraints
    assert reader[2].values == template.values


def test_what_is_queued_is_run_and_told(fresh_url):
    url = fresh_url()
    study = study_in(open_storage(url))
    study.enqueue_trial({"width": 7}, user_attrs={"seed": 3})
    trial = study.ask({"width": DISTRIBUTIONS["width"]})
    assert (trial.params, trial.user_attrs) == ({"width": 7}, {"seed": 3})
    trial.set_user_attr("seed", 4)
    study.tell(trial, [0.5, 0.25])
    (read,) = RDBStorage(url).get_all_trials(study._study_id)
    assert (read.state, read.values) == (TrialState.COMPLETE, [0.5, 0.25])
    assert (read.params, read.user_attrs) == ({"width": 7}, {"seed": 4})


def test_the_patient_storage_and_optunas_cache_write_in_bulk(fresh_url):
    storage = open_storage(fresh_url())
    study, sent = study_in(storage), counting(storage)
    study.add_trial(template_of(TEMPLATES["running"]))
    assert len([s for s in sent if s.startswith("INSERT INTO trial_params")]) == 1


def test_trials_come_through_optunas_proxy(server):
    url = server.fresh_url()
    study_in(BulkDatabase(url))
    template = template_of(TEMPLATES["running"])
    with grpc_proxy(url, is_ours=True) as proxy:
        study = optuna.load_study(study_name="a study", storage=open_storage(proxy))
        study.add_trial(template)
        (read,) = RDBStorage(url).get_all_trials(1)
        other = create_trial(
            state=TrialState.RUNNING,
            params={"width": 0.5},
            distributions={"width": FloatDistribution(0, 1)},
        )
        with pytest.raises(Exception, match="distribution kind"):
            study.add_trial(other)
    assert (read.params, read.distributions) == (PARAMS, DISTRIBUTIONS)
    assert (read.user_attrs, read.constraints) == (template.user_attrs, template.constraints)
    assert len(RDBStorage(url).get_all_trials(1)) == 1


INCOMPATIBLE = {
    "kind": ("width", 4.0, FloatDistribution(2, 8), "distribution kind"),
    "log": ("rate", 0.01, FloatDistribution(1e-5, 1e-1), "log configuration"),
    "choices": ("scheme", "adq", CategoricalDistribution(("adq",)), "dynamic value space"),
}


@pytest.mark.parametrize(("name", "value", "other", "why"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
@pytest.mark.parametrize("is_remembered", [True, False], ids=["remembered", "read"])
def test_another_distribution_is_refused_and_leaves_nothing(
    fresh_url, name, value, other, why, is_remembered
):
    url = fresh_url()
    storage = BulkDatabase(url)
    study = study_in(storage)
    study_in_another_id = optuna.create_study(study_name="another", storage=storage)
    for _ in range(2):
        study.add_trial(template_of(TEMPLATES["running"]))
    if not is_remembered:
        storage = BulkDatabase(url)
    wrong = create_trial(
        state=TrialState.RUNNING,
        params={"new": 2, name: value},
        distributions={"new": IntDistribution(1, 3), name: other},
        user_attrs={"key": 1},
    )
    before = rows_of(storage)
    for kind in RDBStorage(url), storage:
        with pytest.raises(ValueError, match=why):
            kind.create_new_trial(study._study_id, wrong)
        assert rows_of(storage) == before
    study.add_trial(template_of(TEMPLATES["running"]))
    assert [t.number for t in study.trials] == [0, 1, 2]
    study_in_another_id.add_trial(wrong)  # a study's distributions are its own


def test_what_was_rolled_back_is_not_remembered(fresh_url):
    url = fresh_url()
    storage = BulkDatabase(url)
    study = study_in(storage)
    unwritable = create_trial(
        state=TrialState.RUNNING,
        params={"width": 4},
        distributions={"width": IntDistribution(2, 8)},
        user_attrs={"key": {1, 2}},
    )
    with pytest.raises(TypeError):
        study.add_trial(unwritable)
    other = {"params": {"width": 0.5}, "distributions": {"width": FloatDistribution(0, 1)}}
    for writer in RDBStorage(url), storage:
        writer.create_new_trial(study._study_id, create_trial(state=TrialState.RUNNING, **other))
    assert [t.params for t in study.trials] == [{"width": 0.5}] * 2


def test_a_deleted_study_is_forgotten(fresh_url):
    storage = BulkDatabase(fresh_url())
    for distribution in IntDistribution(0, 1), FloatDistribution(0, 1):
        study = study_in(storage)
        for _ in range(2):
            study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params={"width": 1},
                    distributions={"width": distribution},
                )
            )
        optuna.delete_study(study_name="a study", storage=storage)


def n_statements(storage, n_parameters):
    """Return how many statements the third of three templates takes."""
    distributions = {f"layer{i}.bits": IntDistribution(2, 8) for i in range(n_parameters)}
    template = create_trial(
        state=TrialState.RUNNING,
        params=dict.fromkeys(distributions, 4),
        distributions=distributions,
        user_attrs={"policy_hash": "0", "worker": "w", "verdict": "measured"},
        constraints={"weight_bytes": -12.5},
    )
    study_id = study_in(storage)._study_id
    for _ in range(2):
        storage.create_new_trial(study_id, template)
    sent = counting(storage)
    storage.create_new_trial(study_id, template)
    return len(sent)


def test_the_number_of_statements_does_not_grow_with_the_parameters(fresh_url):
    few, many = (n_statements(BulkDatabase(fresh_url()), n) for n in (2, 19))
    assert few == many <= 8
    theirs_few, theirs_many = (n_statements(RDBStorage(fresh_url()), n) for n in (2, 19))
    assert theirs_many - theirs_few >= 17 * 2
    assert theirs_many > 50


def test_names_are_looked_up_in_parts(fresh_url, monkeypatch):
    monkeypatch.setattr("adq_search.plugins.optuna_database._NAMES_A_QUERY", 2)
    storage = BulkDatabase(fresh_url())
    study = study_in(storage)
    template = template_of(TEMPLATES["running"])
    study.add_trial(template)
    sent = counting(storage)
    study.add_trial(template)
    assert len([s for s in sent if "distribution_json" in s and s.startswith("SELECT")]) == 3
    assert storage._distributions[study._study_id] == DISTRIBUTIONS


def test_two_writers_number_trials_one_after_the_other(fresh_url):
    url = fresh_url()
    study_id = study_in(BulkDatabase(url))._study_id
    storages = BulkDatabase(url), BulkDatabase(url)
    begin, errors = threading.Barrier(len(storages)), []

    def write(writer):
        template = template_of({**TEMPLATES["running"], "user_attrs": {"writer": writer}})
        begin.wait()
        try:
            for _ in range(15):
                storages[writer].create_new_trial(study_id, template)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(len(storages))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    trials = RDBStorage(url).get_all_trials(study_id)
    assert [t.number for t in trials] == list(range(30))
    assert sorted(t.user_attrs["writer"] for t in trials) == [0] * 15 + [1] * 15
    assert {tuple(t.params.items()) for t in trials} == {tuple(PARAMS.items())}
