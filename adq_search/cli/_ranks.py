"""Processes that `torchrun` started for one command."""

from __future__ import annotations

import atexit
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from adq_search.following import follow
from adq_search.parallel import ALONE, Ranks

#: How long a process waits, in the middle of a trial, for one that is silent.
_PATIENCE = timedelta(minutes=10)


def launched() -> Ranks:
    """Join the processes that `torchrun` started; without it, this one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    atexit.register(dist.destroy_process_group)
    return Ranks.of()


def follow_to_the_end(ranks: Ranks) -> None:
    """Train with the first process until it has no more; what asks to stop asks that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(ranks)


def threads_each() -> int:
    """Return how many threads each process that `torchrun` started here should train with."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
