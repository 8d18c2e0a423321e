"""A Ray cluster for the length of a search, and quiet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adq_search.errors import StorageError
from adq_search.hosting import HostOptions
from adq_search.plugins._ray_installed import ray

#: Tune's own output, which would break the progress bar; its answer to Ctrl-C, which would end the
#: search as if it were complete; and its files of every report, which nothing here reads.
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def check_cluster(options: HostOptions) -> None:
    """Refuse what no cluster can be asked for, before anything is trained.

    Raises:
        StorageError: A trial's share is impossible, or the driver would not see its own folder.
    """
    cpus, gpus = options.cpus_per_trial, options.gpus_per_trial
    if not cpus > 0.0:
        msg = f"A trial needs a processor or a part of one, but --cpus-per-trial is {cpus:g}."
        raise StorageError(msg)
    if gpus < 0.0 or (gpus > 1.0 and gpus != int(gpus)):
        msg = (
            f"A trial takes a part of one GPU or whole ones, but --gpus-per-trial is {gpus:g}. "
            "Give a number up to 1, or a whole one."
        )
        raise StorageError(msg)
    if (options.address or "").startswith("ray://"):
        msg = (
            f"A search must run inside its cluster, but {options.address} reaches it from outside. "
            "Start it on a node with --address auto, or by `ray job submit`."
        )
        raise StorageError(msg)


@contextmanager
def cluster(options: HostOptions) -> Iterator[None]:
    """Join the cluster, or start one on this machine; one that this process is in already is used.

    Raises:
        StorageError: There is no cluster at the address, or this machine lacks a trial's share.
    """
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    was_running = ray.is_initialized()
    try:
        if not was_running:
            _start(options)
        if options.address is None:
            _check_room(options)
        yield
    finally:
        if not was_running:
            ray.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(options: HostOptions) -> None:
    quiet: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if options.address is None:
        n_cpus = max(1, options.workers) * max(1, round(options.cpus_per_trial))
        ray.init("local", num_cpus=n_cpus, **quiet)
        return
    try:
        ray.init(address=options.address, **quiet)
    except ConnectionError as error:
        msg = (
            f"There is no Ray cluster at {options.address}: {error}. Start one with `ray start "
            "--head`, and give its address."
        )
        raise StorageError(msg) from error


def _check_room(options: HostOptions) -> None:
    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, asked in (("CPU", options.cpus_per_trial), ("GPU", options.gpus_per_trial)):
        if asked > has.get(name, 0.0):
            msg = (
                f"A trial asks for {asked:g} {name}, but this machine has {has.get(name, 0.0):g}. "
                f"Ask for less, or give the --address of a cluster that has them."
            )
            raise StorageError(msg)
