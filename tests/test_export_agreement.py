"""Differences of an exported form, told apart: ties, what follows from them, and errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from adq_search.convert import apply_policy_, quantized_layers
from adq_search.errors import StorageError
from adq_search.export import Outcome, compare, int8_banks
from adq_search.policy import LayerPrecision, Policy


class Twice(nn.Module):
    """A layer called twice between two others; registered in another order than they run."""

    def __init__(self):
        super().__init__()
        self.last, self.shared, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.shared(self.shared(x)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = Twice()
    policy = Policy.of(dict.fromkeys(("first", "shared", "last"), LayerPrecision(4, 4, "lsq")))
    apply_policy_(model, policy, torch.randn(50, 4))
    with torch.no_grad():
        model.first.input_quantizer.step.fill_(0.5)
    return model.eval()


#: Steps of 0.5: the first value of sample 0 lies on the boundary of codes 1 and 2.
INPUTS = torch.tensor([[0.75, 0.1, -0.4, 1.1], [0.6, 0.1, -0.4, 1.1], [0.0, 1.0, 0.5, -1.0]])


def outcome_of(network):
    """What the network itself computes, as a form would give it."""
    codes: dict[str, list[torch.Tensor]] = {}

    def look(name, layer, args):
        codes.setdefault(name, []).append(layer.input_quantizer.codes(args[0]))

    layers = quantized_layers(network)
    handles = [q.register_forward_pre_hook(partial(look, name)) for name, q in layers.items()]
    with torch.no_grad():
        outputs = network(INPUTS)
    for handle in handles:
        handle.remove()
    return Outcome(codes, outputs)


def counts(agreement):
    return {
        name: (layer.ties, layer.downstream, layer.unexplained)
        for name, layer in agreement.codes.layers.items()
    }


def test_the_network_agrees_with_itself(network):
    outcome = outcome_of(network)
    agreement = compare(network, lambda _: outcome, [INPUTS])
    assert agreement.is_verified
    assert set(counts(agreement).values()) == {(0, 0, 0)}
    sizes = [(name, layer.codes) for name, layer in agreement.codes.layers.items()]
    assert sizes == [("first", 12), ("shared", 24), ("last", 12)]  # in order of execution


def test_a_code_on_a_boundary_is_a_tie_and_what_follows_is_downstream(network):
    outcome = outcome_of(network)
    assert outcome.codes["first"][0][0, 0] == 2  # 1.5 rounds to even
    outcome.codes["first"][0][0, 0] = 1
    outcome.codes["shared"][1][0, 2] += 3
    outcome.codes["last"][0][0] += 1
    outcome.outputs[0] += 0.01
    agreement = compare(network, lambda _: outcome, [INPUTS])
    assert counts(agreement) == {"first": (1, 0, 0), "shared": (0, 1, 0), "last": (0, 4, 0)}
    assert agreement.codes.tied_samples == 1
    assert agreement.codes.largest_logit_error == 0.0  # of the samples without a tie
    assert agreement.is_verified


@pytest.mark.parametrize(
    ("sample", "value", "change"),
    [(1, 0, 1), (0, 0, -2), (0, 1, 1)],
    ids=["no boundary", "two codes off", "another value's boundary"],
)
def test_other_differences_are_unexplained(network, sample, value, change):
    outcome = outcome_of(network)
    outcome.codes["first"][0][sample, value] += change
    agreement = compare(network, lambda _: outcome, [INPUTS])
    assert counts(agreement)["first"] == (0, 0, 1)
    assert not agreement.is_verified


def test_an_earlier_tie_of_one_sample_excuses_no_other(network):
    outcome = outcome_of(network)
    outcome.codes["first"][0][0, 0] = 1
    outcome.codes["last"][0][2, 1] += 2
    agreement = compare(network, lambda _: outcome, [INPUTS])
    assert counts(agreement)["last"] == (0, 0, 1)


def test_a_class_that_differs_is_an_error_though_codes_agree(network):
    outcome = outcome_of(network)
    flipped = Outcome(outcome.codes, outcome.outputs.flip(1))
    agreement = compare(network, lambda _: flipped, [INPUTS])
    assert agreement.codes.other_classes == 3
    assert not agreement.is_verified


def test_a_sum_that_is_off_by_one_is_an_error(network):
    outcome = outcome_of(network)
    words = {name: int8_banks(layer)[0][0] for name, layer in quantized_layers(network).items()}
    sums = {name: [[c @ words[name].T] for c in calls] for name, calls in outcome.codes.items()}
    exact = Outcome(outcome.codes, outcome.outputs, sums)
    assert compare(network, lambda _: exact, [INPUTS]).is_verified
    sums["shared"][1][0][2, 3] += 1
    agreement = compare(network, lambda _: exact, [INPUTS])
    assert {n: (s.sums, s.different) for n, s in agreement.sums.items()} == {
        "first": (12, 0),
        "shared": (24, 1),
        "last": (6, 0),
    }
    assert not agreement.is_verified


def test_forms_of_other_networks_are_refused(network):
    outcome = outcome_of(network)
    fewer = Outcome({**outcome.codes, "shared": outcome.codes["shared"][:1]}, outcome.outputs)
    with pytest.raises(
        StorageError, match="Layer 'shared' has input codes of shapes .* but the export"
    ):
        compare(network, lambda _: fewer, [INPUTS])
    other = Outcome({**outcome.codes, "more": []}, outcome.outputs)
    with pytest.raises(StorageError, match="has a layer 'more', which the network has not"):
        compare(network, lambda _: other, [INPUTS])
    wider = Outcome(outcome.codes, torch.zeros(3, 7))
    with pytest.raises(StorageError, match=r"shape \(3, 2\), but the export's \(3, 7\)"):
        compare(network, lambda _: wider, [INPUTS])
    banks = {"first": [[torch.zeros(3, 4), torch.zeros(3, 4)]]}
    doubled = Outcome(outcome.codes, outcome.outputs, banks)
    with pytest.raises(StorageError, match="sums of layer 'first' are not in its 1 banks"):
        compare(network, lambda _: doubled, [INPUTS])
