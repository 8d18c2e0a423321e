"""What stands on the front runs in integers as it was measured, or says why not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adq_search import results
from adq_search.hosting import HostOptions
from adq_search.integer import lower
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.progress import NoProgress
from adq_search.report import read_front
from adq_search.results import INTEGER_SAMPLES, write_outcome
from adq_search.session import prepare

TINY = Path(__file__).parent / "tiny.yaml"
OPTIONS = HostOptions(study="tiny")


@pytest.fixture
def searched(tmp_path):
    """A search that has run and whose outcome is not written yet."""
    session = prepare(plan(read_job(TINY)), tmp_path)
    host = OptunaHost()
    host.check(session.plan, tmp_path, OPTIONS)
    return session, host.run(session, OPTIONS, NoProgress())


def written(session, outcome):
    write_outcome(session, outcome, OPTIONS, started=0.0)
    return read_front(session.folder)


def test_every_policy_of_the_front_is_verified_in_integers(searched):
    session, outcome = searched
    front = written(session, outcome)
    n = min(INTEGER_SAMPLES, len(session.plan.task.validation))
    for point in (*front.points, *front.uniform):
        found = (point.integer_verified, point.integer_samples, point.integer_reason)
        assert found == (True, n, None)
    assert front.full_precision.integer_verified is None


def test_weights_that_were_not_measured_are_not_verified(searched):
    """One weight, one bit: the file no longer holds the network whose accuracy is reported."""
    session, outcome = searched
    chosen = outcome.trials[0].result.policy
    file = session.weights_file(chosen)
    weights = load_file(file)
    weights["0.weight"].view(-1)[0] = weights["0.weight"].view(-1)[0].nextafter(torch.tensor(9.0))
    save_file(weights, file)
    front = written(session, outcome)
    points = {p.policy_hash: p for p in (*front.points, *front.uniform)}
    tampered = points.pop(chosen.hash)
    assert tampered.integer_verified is False
    assert "other weights than were measured" in tampered.integer_reason
    assert all(p.integer_verified for p in points.values())


def test_an_integer_network_that_computes_something_else_is_not_verified(searched, monkeypatch):
    session, outcome = searched

    def lower_another(network, example):
        with torch.no_grad():
            network[0].weight.neg_()
            integer = lower(network, example)
            network[0].weight.neg_()
        return integer

    monkeypatch.setattr(results, "lower", lower_another)
    for point in written(session, outcome).points:
        assert point.integer_verified is False
        assert point.integer_samples > 0
        assert "differ and are no ties" in point.integer_reason


def test_a_network_that_cannot_be_lowered_says_why(searched):
    session, outcome = searched
    made = session.plan.task.make_network

    class Branching(type(made())):
        def forward(self, inputs):
            return super().forward(inputs if inputs.sum() > 0 else inputs + 0.0)

    def make_branching():
        network = made()
        network.__class__ = Branching
        return network

    object.__setattr__(session.plan.task, "make_network", make_branching)
    for point in written(session, outcome).points:
        assert point.integer_verified is None
        assert point.integer_samples == 0
        assert "torch.fx can trace" in point.integer_reason
        assert point.test_accuracy is not None
