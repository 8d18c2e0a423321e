"""What a campaign judges by: every training noted wherever it runs, and a front held to trials."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from adq_search import session as sessions
from adq_search.pareto import front_indices
from adq_search.session import reopen
from adq_search.store import load_quantized
from adq_search.trial import fingerprint_of, weights_of
from tests import fragile

_PAUSE_S = 0.05


class Training(NamedTuple):
    """A training that began, whatever became of it; `began_at` in seconds since 1970."""

    policy_hash: str
    began_at: float


def note_trainings(log):
    """Have this process add a line to `log` for every training that it begins."""
    train = sessions.run_trial

    def noted(policy, *arguments, **named):
        with Path(log).open("a") as file:
            file.write(f"{policy.hash} {time.time()}\n")
        return train(policy, *arguments, **named)

    sessions.run_trial = noted


def trainings(log):
    """Return every training in a log."""
    lines = Path(log).read_text().splitlines() if Path(log).exists() else []
    return [Training(name, float(at)) for name, at in (line.split() for line in lines)]


def noted_task(harm, log):
    """Return `fragile.make`, slowed; processes that it is sent to note their trainings."""
    task = fragile.make(harm, epochs=4)
    return replace(task, augment=_Noted(task.augment, log))


class _Noted:
    """An augmentation that comes to harm or changes nothing, in its own time."""

    def __init__(self, suffer, log):
        self._suffer = suffer
        self._log = log

    def __call__(self, inputs, generator):
        time.sleep(_PAUSE_S)  # blows hit trials in their training, however fast the machine is
        return self._suffer(inputs, generator)

    def __setstate__(self, state):
        self.__dict__.update(state)
        note_trainings(self._log)


def judge_front(folder, results):
    """Hold `front.json` to the front of the results, and its weights to what was measured.

    Args:
        folder: Where a run ended.
        results: Its trials' results, of any state.
    """
    planned = reopen(folder).plan
    complete = [result for result in results if result.state == "complete"]
    directions = [axis.direction for axis in planned.job.search.axes]
    expected = front_indices([planned.values(result) for result in complete], directions)
    points = json.loads((folder / "front.json").read_text())["points"]
    by_hash = {complete[i].policy.hash: complete[i] for i in expected}
    assert points
    assert sorted(p["policy_hash"] for p in points) == sorted(by_hash)
    for point in points:
        assert point["state"] == "complete"
        result = by_hash[point["policy_hash"]]
        network = load_quantized(planned.task, result.policy, folder / point["weights_file"])
        assert fingerprint_of(weights_of(network)) == result.weights_fingerprint
