"""The simulated workers of `storage.py`: what each does with the study again and again."""

import itertools
import multiprocessing
import threading
import time
import warnings

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from adq_search.plugins.optuna_storage import open_storage

NAME = "storage"
RESULT = {"state": "complete", "layers": {f"layer{i}": [4, 4, "adq", 0.9] for i in range(24)}}
CONSTRAINT = -12.5


def space(n):
    return {f"layer{i}.bits": IntDistribution(2, 8) for i in range(n)}


class Asking:
    """A worker's trials by `Study.ask` and `Study.tell`."""

    def __init__(self, storage, number, n_parameters):
        sampler = optuna.samplers.RandomSampler(seed=number)
        self._study = optuna.load_study(study_name=NAME, storage=storage, sampler=sampler)
        self._space = space(n_parameters)

    def begin(self, attributes):
        trial = self._study.ask(self._space)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        trial.set_constraint("weight_bytes", CONSTRAINT)
        return trial

    def end(self, trial, values):
        trial.set_user_attr("result", RESULT)
        self._study.tell(trial, values)
        return {
            "number": trial.number,
            "params": trial.params,
            "seed": trial.user_attrs.get("seed"),
        }


class Writing:
    """A worker's trials by the storage, each begun in one transaction."""

    def __init__(self, storage, number, n_parameters):
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(NAME)
        self._space = space(n_parameters)
        self._rng = np.random.default_rng([1, number])

    def _template(self, attributes):
        return optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={n: int(self._rng.integers(d.low, d.high + 1)) for n, d in self._space.items()},
            distributions=self._space,
            user_attrs=attributes,
            constraints={"weight_bytes": CONSTRAINT},
        )

    def begin(self, attributes):
        template = self._template(attributes)
        return self._storage.create_new_trial(self._study_id, template), template.params

    def end(self, trial, values):
        trial_id, params = trial
        self._storage.set_trial_user_attr(trial_id, "result", RESULT)
        self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)
        return {"id": trial_id, "params": params, "seed": None}


class WritingParts(Writing):
    """A worker's trials by the storage, each parameter and attribute in its own transaction."""

    def begin(self, attributes):
        template = self._template(attributes)
        trial_id = self._storage.create_new_trial(self._study_id)
        for name, found in self._space.items():
            value = found.to_internal_repr(template.params[name])
            self._storage.set_trial_param(trial_id, name, value, found)
        for key, value in template.user_attrs.items():
            self._storage.set_trial_user_attr(trial_id, key, value)
        for key, value in template.system_attrs.items():
            self._storage.set_trial_system_attr(trial_id, key, value)
        return trial_id, template.params


KINDS = {"ask": Asking, "template": Writing, "parts": WritingParts}


def work(url, number, options, begin, told):
    """Run trials until the time is up; append what was told of each to `told`."""
    rng = np.random.default_rng([0, number])
    trials = KINDS[options.by](open_storage(url), number, options.parameters)
    mean_s = options.workers / options.rate
    begin.wait()
    end = time.monotonic() + options.seconds
    time.sleep(rng.uniform(0.0, mean_s))  # as workers that have been running for long
    for turn in itertools.count():
        began = time.monotonic()
        if began > end:
            return
        token = f"{number}:{turn}"
        attributes = {"policy_hash": token, "worker": f"w{number}", "verdict": "measured"}
        trial = trials.begin(attributes)
        asked_s = time.monotonic() - began
        time.sleep(max(0.0, mean_s * rng.uniform(0.5, 1.5) - asked_s))
        began = time.monotonic()
        values = list(map(float, rng.uniform(size=2)))
        found = trials.end(trial, values)
        now = time.monotonic()
        told.append(
            {
                **found,
                "token": token,
                "values": values,
                "at": now,
                "storage_s": asked_s + now - began,
            }
        )


def work_many(urls, numbers, options, begin, out):
    """Be a process of workers."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    told, errors = [], []

    def one(number):
        try:
            work(urls[number % len(urls)], number, options, begin, told)
        except Exception as error:  # told to the parent, which fails
            errors.append(f"worker {number}: {error!r}")
            begin.abort()

    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.put((told, errors))


def launch(urls, options, begin, out):
    """Fork the processes of workers from one that has imported all they need.

    A storage opened here loads what Optuna and SQLAlchemy load when used: 90 MB that each worker
    would have of its own. gRPC cannot be used before a fork, and needs no such thing.
    """
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if "grpc" not in urls[0]:
        storage = open_storage(urls[0])
        storage.get_all_studies()
        storage.engine.dispose()
    context = multiprocessing.get_context("fork")
    shares = [range(i, options.workers, options.processes) for i in range(options.processes)]
    processes = [
        context.Process(target=work_many, args=(urls, numbers, options, begin, out))
        for numbers in shares
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
