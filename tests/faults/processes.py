"""What the processes of a campaign do; they are forked from one that has everything imported."""

import contextlib
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from adq_search.cli._app import main
from adq_search.hosting import HostOptions
from adq_search.plugins._code import code_fingerprint
from adq_search.plugins.optuna_host import OptunaHost
from adq_search.plugins.optuna_lease import LeaseTerms
from adq_search.progress import NoProgress
from adq_search.results import write_outcome
from adq_search.session import reopen
from tests.faults.evidence import note_trainings

code_fingerprint("tests.tiny:make")  # of what was imported here, for all that are forked
STUDY = "tiny"
TERMS = LeaseTerms(interval_s=1.0, grace_s=5.0)
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "adq_search.plugins.ray_host"])


def work(url, folder, log):
    """Be a worker elsewhere."""
    _prepare(folder, log)
    OptunaHost(TERMS).work(url, STUDY, Path(folder), NoProgress())


def drive(url, folder, log, resume):
    """Be `adq-search run`, or the same with `--resume`."""
    _prepare(folder, log)
    began = time.perf_counter()
    session = reopen(Path(folder))
    options = HostOptions(STUDY, storage=url, resume=resume)
    host = OptunaHost(TERMS)
    host.check(session.plan, session.folder, options)
    outcome = host.run(session, options, NoProgress())
    write_outcome(session, outcome, options, started=began)


def command(folder, arguments):
    """Be `adq-search` with these arguments."""
    _quiet(folder)
    sys.argv = ["adq-search", *arguments]
    main()


def start(target, *arguments):
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def _prepare(folder, log):
    """Use one thread, keep what is said out of the tests' output, and note every training."""
    _quiet(folder)
    note_trainings(log)


def _quiet(folder):
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    said = (Path(folder) / "said.txt").open("a", buffering=1)
    contextlib.redirect_stderr(said).__enter__()
    contextlib.redirect_stdout(said).__enter__()
