"""Processes of one group that run a test's functions: started once, since that takes seconds."""

import multiprocessing
import os
import socket
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from adq_search.parallel import Ranks


class Processes:
    """Some processes with a gloo group over all of them, and one over the first two.

    `run(function, *args)` calls `function(ranks, *args)` in each and returns what each returned,
    the exception where it raised one.
    """

    def __init__(self, n):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.pipes, self.processes = [], []
        for index in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, index, n, address), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, n=2):
        for pipe in self.pipes[:n]:
            pipe.send((function, n, args))
        return [_answer(pipe) for pipe in self.pipes[:n]]

    def stop(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


def _answer(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None


def _serve(pipe, index, n, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=index, world_size=n)
    two = dist.new_group([0, 1])
    ranks = {n: Ranks.of()}
    if n > 2 and index < 2:
        ranks[2] = Ranks.of(two)
    while True:
        try:
            function, size, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(ranks[size], *args))
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(error)


def die(ranks):
    """Have the last process end without a word while the others wait for it."""
    if ranks.index == ranks.size - 1:
        os._exit(9)
    ranks.total(torch.ones(3))


def impatient(ranks, seconds):
    """Return the processes with a group of their own that waits for so long only."""
    group = dist.new_group(list(range(ranks.size)), backend="gloo")
    dist.barrier(group)  # connecting may take longer
    _set_pg_timeout(timedelta(seconds=seconds), group)
    return Ranks.of(group)
