"""A task whose trials come to harm when a file says so, and blows that wait for their moment."""

import functools
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from adq_search.job import Job, read_job
from tests import tiny

TINY = Path(__file__).parent / "tiny.yaml"


def job(folder, *, trials, **training):
    """Return the tiny job on this task; files in `folder / "harm"` harm its trials."""
    (folder / "harm").mkdir()
    content = read_job(TINY).to_plain()
    content["task"] = "tests.fragile:make"
    content["task_options"] = {"harm": str(folder / "harm")}
    found = Job.model_validate(content).with_search(trials=trials, prior=None)
    return found.with_training(**training)


def make(harm, epochs=0):
    """Return the tiny task; a trial that finds a file in the folder `harm` does what it is called.

    Each file harms once: who removes it has to suffer.
    """
    task = tiny.make(epochs=epochs)
    return replace(task, augment=functools.partial(_suffer, Path(harm)))


def released(harm):
    """Return the file that lets those go on who were held."""
    return Path(harm).with_name("released")


def _suffer(harm, inputs, generator):
    for file in sorted(harm.glob("*")):
        try:
            file.unlink()
        except FileNotFoundError:
            continue
        what = file.name.split("-")[0]
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "full":  # the disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif what == "memory":
            raise MemoryError
        elif what == "error":
            msg = "this task is broken"
            raise ValueError(msg)
        elif what == "wait":
            time.sleep(float(file.name.split("-")[1]))
        elif what == "hold":
            while not released(harm).exists():
                time.sleep(0.02)
    return inputs


@contextmanager
def later(condition, blow, *, timeout_s=600.0):
    """Do something once a condition holds, beside the block; fail if it never held."""
    done = threading.Event()
    ended = threading.Event()

    def watch():
        deadline = time.monotonic() + timeout_s
        while not ended.is_set() and time.monotonic() < deadline:
            if condition():
                blow()
                done.set()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert done.is_set(), "the condition never held"
