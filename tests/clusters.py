"""Ray clusters for the tests."""

from contextlib import contextmanager
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

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


def measured_in(folder):
    """Return when each result of a session's folder was written, by the hash of its policy."""
    return {f.stem: f.stat().st_mtime_ns for f in (Path(folder) / "trials").glob("*.json")}
