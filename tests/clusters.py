"""Ray clusters for the tests, and a task whose trials come to harm when a file says so."""

import functools
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests import tiny

_SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


def start_here(n_cpus=2, n_gpus=0):
    """Start Ray on this machine afresh; what this process ran on it before is gone."""
    ray.shutdown()
    ray.init("local", num_cpus=n_cpus, num_gpus=n_gpus, log_to_driver=False, **_SMALL)


@contextmanager
def nodes(n, n_cpus=1):
    """Yield a cluster of `n` nodes on this machine; the first one is its head."""
    cluster = Cluster()
    try:
        for _ in range(n):
            _add_node(cluster, n_cpus)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _add_node(cluster, n_cpus):
    """Add a node; Ray gives it half a minute to start, which a busy machine may not keep."""
    for is_last in (False, False, True):
        try:
            return cluster.add_node(num_cpus=n_cpus, **_SMALL)
        except Exception as error:  # Ray raises nothing more specific
            if is_last or "timed out during startup" not in str(error):
                raise
    return None


def replace_node(cluster, node):
    """Kill a worker node with all its processes, and start another in its place."""
    cluster.remove_node(node, allow_graceful=False)
    _add_node(cluster, 1)


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


def measured_in(folder):
    """Return when each result of a session's folder was written, by the hash of its policy."""
    return {f.stem: f.stat().st_mtime_ns for f in (Path(folder) / "trials").glob("*.json")}


def fragile(harm, epochs=0):
    """Return the tiny task; a trial that finds a file in the folder `harm` does what it is called.

    Each file harms once: who removes it has to suffer.
    """
    task = tiny.make(epochs=epochs)
    return replace(task, augment=functools.partial(_suffer, Path(harm)))


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
    return inputs
