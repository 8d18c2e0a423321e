"""Search real training with several samplers, and record every policy that was measured.

Usage: python results/search_efficiency/trained.py [--job deep_digits] [--seeds 0 1 2 3 4]
       [--rounds N] [--only SEARCH ...] [--retrain]

The job is `deep_digits.yaml` or `deep_mnist5k.yaml`: 64 dimensions, accuracy and energy. Samplers
run plain, and with the seeds of the job (uniform policies and the prior's proposals) enqueued
first; ours is the job as it stands. Each search seed has its own teacher, prior and order of the
data. All advance in turns of eight trials, so that wherever the run ends, it ends at equal numbers
of trials. The Gaussian process, whose proposals take seconds, comes after all others.

A policy trained before under the same seed is read back, whoever proposed it. Random search and a
generation of NSGA-II are trained eight at once, TPE's and ours four at once (each sees three
trials pending), GP's one by one.

Writes into `trained/`, or `trained_mnist5k/`, at once: `trainings_S.csv`, what each policy
measured; `trials_S.csv`, who asked for it; `prepared_S.json`, seeds and seconds. Run it again to go
on, or several times at once: a search seed is one process's for a turn. `--only` names searches to
advance as the report does ("TPE", "seeds, then TPE", "ours"), and `--rounds` the turns. With
`--retrain`, the policies on found fronts are trained again with fresh seeds at the end.
Seconds on the clock mean something where each process has a core of its own.
`trained_report.py` makes the tables.
"""

import argparse
import csv
import fcntl
import math
import pickle
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import optuna
import torch
from fronts import HERE, JOBS, MARKS, Search, folder_of, front_of, label, read_searches, rows_of
from optuna.trial import TrialState
from samplers import PLAIN
from torch.nn import functional as F

from adq_search.convert import apply_policy_, reestimate_batch_norm_
from adq_search.distill import kl_to_teacher
from adq_search.files import write_atomic, write_json
from adq_search.integer import snap_codebooks_
from adq_search.job import read_job
from adq_search.plan import plan
from adq_search.plugins.optuna_objective import distribution
from adq_search.plugins.optuna_sampler import make_sampler
from adq_search.provenance import provenance
from adq_search.session import prepare
from adq_search.stacking import Stack
from adq_search.training import epoch_losses, training_inputs

TURN = 8
#: Trainings of one pass where policies are known beforehand.
STACK = 8
#: Fresh training seeds of a policy on a front.
N_FRESH = 3

#: Sampler, trials plain, trials after seeds, proposals at a time.
RIVALS = {
    "random": (PLAIN["random"], 400, 240, 8),
    "TPE": (PLAIN["TPE multivariate"], 400, 240, 4),
    "NSGA-II": (PLAIN["NSGA-II"], 400, 240, 8),
    "GP": (PLAIN["GP"], 40, 40, 1),
}
GUIDE_TRIALS, GUIDE_BATCH = 104, 4
#: Every search, as sampler and whether seeds come first, and the trials it goes on to.
SEARCHES = {("guide", True): GUIDE_TRIALS}
SEARCHES |= {(name, False): plain for name, (_, plain, _, _) in RIVALS.items()}
SEARCHES |= {(name, True): seeded for name, (_, _, seeded, _) in RIVALS.items()}


class Watch:
    """Seconds since it was made, on the clock and of this process's threads."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self, share=1):
        """Return both, divided among some trainings of one pass."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"wall_s": wall / share, "cpu_s": cpu / share}


class Bench:
    """One search seed: a prepared session, and a table of what its policies measured.

    Args:
        job: Name of the job file.
        seed: Of the teacher, the prior, the order of the data and the samplers.
        folder: Where tables are kept.
        cache: Where what only this machine needs is kept.
    """

    def __init__(self, job, seed, folder, cache):
        job = read_job(HERE / f"{job}.yaml").with_search(seed=seed)
        self.seed = seed
        self.cache = cache / f"seed_{seed}"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.files = {
            what: folder / f"{what}_{seed}.csv" for what in ("trainings", "trials", "retrained")
        }
        with self.alone():
            self._prepare(job, folder)
        self._answers = {}

    def _prepare(self, job, folder):
        is_new = not (self.cache / "session.json").exists()
        watch = Watch()
        self.session = prepare(plan(job), self.cache)
        seconds = watch.seconds()
        self.plan = self.session.plan
        self.space = self.plan.space
        self._index = [{p: i for i, p in enumerate(g.choices)} for g in self.space.groups]
        if is_new:
            write_json(
                folder / f"prepared_{self.seed}.json",
                {
                    **seconds,
                    "full_precision": self.session.full_precision.accuracy,
                    "energy_range_pj": list(self.plan.cost_range("energy_pj")),
                    "n_dimensions": len(self.space.parameters),
                    "seeds": [
                        {"origin": s.origin, "policy": self.code(s.policy)}
                        for s in self.session.seeds
                    ],
                    "job": job.to_plain(),
                    **provenance(seed=self.seed),
                },
            )

    @contextmanager
    def alone(self, *, waits=True):
        """Hold the seed's lock; yield whether it was to be had."""
        with (self.cache / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            self.known = {row["policy"]: row for row in rows_of(self.files["trainings"])}
            yield True

    def code(self, policy):
        """Return a policy as text: the index of each group's choice."""
        found = zip(self._index, self.space.groups, strict=True)
        return " ".join(str(index[policy[group.layers[0]]]) for index, group in found)

    def policy(self, code):
        """Return the policy of a code."""
        chosen = zip(self.space.groups, map(int, code.split()), strict=True)
        return self.space.policy_from({g.name: g.choices[i] for g, i in chosen})

    def measure(self, codes):
        """Return what policies measured, training the new ones in one pass."""
        new = [c for c in dict.fromkeys(codes) if c not in self.known]
        if new:
            for row in self.trained(new, self.seed):
                self.known[row["policy"]] = row
                append(self.files["trainings"], row)
        return [self.known[c] for c in codes]

    def trained(self, codes, seed):
        """Yield what each policy measures after training them as one, as `run_trials` does."""
        task, settings = self.plan.task, self.plan.job.training
        policies = [self.policy(code) for code in codes]
        watch = Watch()
        networks = [self._student(policy, seed) for policy in policies]
        stack = Stack(networks)
        teacher = self.session.teacher
        losses = list(epoch_losses(stack, task, settings, teacher=teacher, seed=seed))
        stack.unstack_()
        for network in networks:
            snap_codebooks_(network)
        stack = Stack(networks)
        reestimate_batch_norm_(stack, training_inputs(stack, task, settings, seed=seed))
        found = self._evaluate(stack.eval())
        seconds = watch.seconds(share=len(codes))
        for k, (code, policy) in enumerate(zip(codes, policies, strict=True)):
            curve = {f"train_loss_{e}": means[k] for e, means in enumerate(losses, start=1)}
            energy = self.plan.totals(policy)["energy_pj"]
            yield {
                "policy": code,
                "energy_pj": energy,
                **found[k],
                **curve,
                **seconds,
                "stacked": len(codes),
            }

    def _student(self, policy, seed):
        task, settings = self.plan.task, self.plan.job.training
        torch.manual_seed(seed)
        network = task.make_network()
        network.load_state_dict(self.session.teacher.network.state_dict())
        calibration = task.calibration(settings.calibration_samples, seed=seed)
        return apply_policy_(network, policy, calibration)

    @torch.no_grad()
    def _evaluate(self, stack):
        out = [{} for _ in range(stack.n_slots)]
        for part in ("validation", "test"):
            (batch,) = getattr(self.plan.task, part).batches(4096)
            if part not in self._answers:
                self._answers[part] = self.session.teacher.answer(batch.inputs)
            for row, logits in zip(out, stack(batch.inputs), strict=True):
                right = (logits.argmax(dim=-1) == batch.targets).float().mean()
                row["accuracy" if part == "validation" else "test_accuracy"] = float(right)
                if part == "validation":
                    row["kl"] = float(kl_to_teacher(logits, self._answers[part]))
                    row["loss"] = float(F.cross_entropy(logits, batch.targets))
        return out


class Arm:
    """One sampler on one bench, plain or after the seeds; saved after each turn."""

    def __init__(self, bench, name, *, is_seeded):
        self.bench, self.search = bench, Search(name, is_seeded, bench.seed)
        self.file = bench.cache / f"{name}{' seeded' if is_seeded else ''}.pickle"
        self.n_trials = SEARCHES[name, is_seeded]
        self.batch = GUIDE_BATCH if name == "guide" else RIVALS[name][3]
        self.space = {p.name: distribution(p) for p in bench.space.parameters}
        if self.file.exists():
            self.study = pickle.loads(self.file.read_bytes())
        else:
            self.study = self._begin()

    @property
    def n_done(self):
        """Trials finished."""
        states = (TrialState.COMPLETE,)
        return len(self.study.get_trials(deepcopy=False, states=states))

    def _begin(self):
        if self.search.sampler == "guide":
            sampler = make_sampler(self.bench.session, seed=self.bench.seed)
        else:
            sampler = RIVALS[self.search.sampler][0](self.bench, self.bench.seed)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        if self.search.is_seeded:
            for seed in self.bench.session.seeds:
                study.enqueue_trial(self.bench.space.params_of(seed.policy))
        return study

    def advance(self, n_more):
        """Measure some trials, and save the study."""
        end = min(self.n_done + n_more, self.n_trials)
        while (first := self.n_done) < end:
            asked, seconds = [], []
            for _ in range(min(self.batch, end - first)):
                watch = Watch()
                asked.append(self.study.ask(self.space))
                seconds.append(watch.seconds())
            codes = [self.bench.code(self.bench.space.policy_of(t.params)) for t in asked]
            found = self.bench.measure(codes)
            for trial, row, spent in zip(asked, found, seconds, strict=True):
                trial.set_user_attr("kl", float(row["kl"]))
                watch = Watch()
                self.study.tell(trial, (float(row["accuracy"]), float(row["energy_pj"])))
                told = watch.seconds()
                append(
                    self.bench.files["trials"],
                    {
                        "sampler": self.search.sampler,
                        "seeded": int(self.search.is_seeded),
                        "trial": trial.number,
                        "policy": row["policy"],
                        **{f"suggest_{k}": spent[k] + told[k] for k in spent},
                    },
                )
        write_atomic(self.file, lambda path: path.write_bytes(pickle.dumps(self.study)))


def arms_of(bench):
    """Return the searches of one seed."""
    arms = [Arm(bench, name, is_seeded=is_seeded) for name, is_seeded in SEARCHES]
    _drop_unsaved(bench, arms)
    return arms


def _drop_unsaved(bench, arms):
    """Take out trials that were written after their study was saved last."""
    n_saved = {(a.search.sampler, int(a.search.is_seeded)): a.n_done for a in arms}
    rows = rows_of(bench.files["trials"])
    kept = [r for r in rows if int(r["trial"]) < n_saved[r["sampler"], int(r["seeded"])]]
    if len(kept) < len(rows):
        bench.files["trials"].unlink()
        for row in kept:
            append(bench.files["trials"], row)


def retrain(bench, folder, fresh):
    """Train the policies on the fronts found by each mark again, with a fresh seed."""
    searches = [s for s in read_searches(folder) if s.search.seed == bench.seed]
    wanted = {}
    for found in searches:
        for mark in MARKS:
            if mark <= len(found.points):
                wanted |= dict.fromkeys(found.policies[i] for i in front_of(found.points[:mark]))
    done = {
        row["policy"]
        for row in rows_of(bench.files["retrained"])
        if int(row["training_seed"]) == fresh
    }
    rest = [code for code in wanted if code not in done]
    for i in range(0, len(rest), STACK):
        for row in bench.trained(rest[i : i + STACK], fresh):
            append(bench.files["retrained"], {"training_seed": fresh, **row})


def append(file, row):
    """Add a row to a CSV file."""
    is_new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})


def main(job, seeds, rounds, only, folder, cache, is_retraining):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = folder or folder_of(job)
    folder.mkdir(parents=True, exist_ok=True)
    cache = cache or HERE.parent.parent / "build" / folder.name
    benches = [Bench(job, seed, folder, cache) for seed in seeds]
    fast = [k for k in SEARCHES if k[0] != "GP"]
    for keys in (fast, [k for k in SEARCHES if k[0] == "GP"]):
        wanted = [k for k in keys if only is None or label(k) in only]
        most = max((SEARCHES[k] for k in wanted), default=0)
        for turn in range(1, min(rounds, math.ceil(most / TURN)) + 1):
            each(benches, lambda bench, turn=turn, wanted=wanted: take_turn(bench, turn, wanted))
            names = ", ".join(map(label, wanted))
            print(f"turn {turn} of {names}: {time.process_time():.0f} s of processor", flush=True)
    for fresh in range(1000, 1000 + N_FRESH) if is_retraining else ():
        each(benches, lambda bench, fresh=fresh: retrain(bench, folder, fresh))
        print(f"trained again, {fresh}: {time.process_time():.0f} s of processor", flush=True)


def take_turn(bench, turn, wanted):
    """Bring some searches of one seed to the end of a turn."""
    for arm in arms_of(bench):
        key = (arm.search.sampler, arm.search.is_seeded)
        if key in wanted and arm.n_done < min(TURN * turn, arm.n_trials):
            arm.advance(TURN * turn - arm.n_done)


def each(benches, work):
    """Do a piece of work for each bench, those first that no other process holds."""
    rest = list(benches)
    while rest:
        for bench in list(rest):
            with bench.alone(waits=False) as is_ours:
                if is_ours:
                    work(bench)
                    rest.remove(bench)
        if rest:
            time.sleep(1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", choices=JOBS, default=JOBS[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=list(map(label, SEARCHES)))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--retrain", dest="is_retraining", action="store_true")
    main(**vars(parser.parse_args()))
