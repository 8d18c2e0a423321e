import pytest
import torch
from torch import nn

from adq_search.convert import apply_policy_
from adq_search.errors import AdqSearchWarning, StorageError
from adq_search.job import Job
from adq_search.plan import check_fingerprint, plan
from adq_search.policy import FLOAT
from adq_search.tasks import Task
from adq_search.training import threads_for


class WithIdleHead(nn.Module):
    """A head that only training uses, as in GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.middle = nn.Linear(5, 5)
        self.last = nn.Linear(5, 2)
        self.helper = nn.Linear(5, 2)

    def forward(self, x):
        hidden = self.middle(self.first(x).relu()).relu()
        return self.last(hidden) + (self.helper(hidden) if self.training else 0.0)


def make():
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    part = (inputs, torch.arange(8) % 2)
    return Task("idle", WithIdleHead, part, part, part, n_classes=2)


RULE = {"weight_bits": [2, 4], "input_bits": [4], "schemes": ["lsq"]}
JOB = Job.model_validate({"task": "tests.test_plan:make", "space": {"default": RULE}})


def test_layers_that_never_run_are_listed_and_left_in_floating_point():
    planned = plan(JOB)
    assert planned.summary.idle == ("helper",)
    for policy in [*planned.space.uniform_policies().values(), planned.full_precision_policy()]:
        assert policy["helper"] == FLOAT
        assert planned.totals(policy)["macs"] == 6 * 5 + 5 * 5 + 5 * 2
        apply_policy_(planned.task.make_network(), policy, planned.task.example())
    some = planned.space.policy_of({"middle.weight_bits": 4})
    assert planned.space.policy_of(planned.space.params_of(some)) == some


def test_fingerprints_name_what_differs():
    ours = plan(JOB).fingerprint
    check_fingerprint(ours, ours, where="study")
    with pytest.raises(StorageError, match="network, data differ"):
        check_fingerprint({**ours, "network": "a", "data": "b"}, ours, where="study")


def test_the_number_of_trials_does_not_make_another_job():
    ours = plan(JOB).fingerprint
    assert plan(JOB.with_search(trials=99)).fingerprint == ours
    assert plan(JOB.with_search(seed=1)).fingerprint["recipe"] != ours["recipe"]
    assert plan(JOB.with_training(epochs=1)).fingerprint["recipe"] != ours["recipe"]


def test_threads_follow_the_size_of_the_job(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert threads_for(200_000, 64, workers=1) == 1
    assert threads_for(40_000_000, 128, workers=1) == 8
    assert threads_for(40_000_000, 128, workers=3) == 2
    assert threads_for(40_000_000, 128, workers=16) == 1


@pytest.mark.parametrize("is_there", [True, False], ids=["there", "not there"])
def test_bfloat16_without_its_arithmetic_is_warned_of(is_there, monkeypatch, recwarn):
    monkeypatch.setattr("adq_search.training.multiplies_bfloat16", lambda: is_there)
    plan(JOB)
    assert not recwarn.list
    plan(JOB.with_training(precision="bfloat16"))
    told = [w for w in recwarn.list if w.category is AdqSearchWarning]
    assert [("reference code" in str(w.message)) for w in told] == ([] if is_there else [True])
