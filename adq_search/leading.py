"""The first process of a search whose trials are data-parallel: it says what the others train.

It runs the search as always, alone with study, folder and terminal.

Example:
    >>> # torchrun --nproc-per-node 2 my_search.py
    >>> # torch.distributed.init_process_group("gloo")
    >>> # ranks = Ranks.of()
    >>> # if ranks.is_first:
    >>> #     with leading(prepare(plan(job), folder), ranks) as session:
    >>> #         study.optimize(PolicyObjective(session), n_trials=20)
    >>> # else:
    >>> #     follow(ranks)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from adq_search.errors import ParallelError
from adq_search.parallel import Ranks
from adq_search.session import Session


@contextmanager
def leading(session: Session, ranks: Ranks) -> Iterator[Session]:
    """Yield a session whose trials all processes train together; let the others go at the end.

    After an error nothing is sent: some may be in the middle of a trial, where nobody listens. They
    notice the end of this process.

    Args:
        session: Prepared in this process alone.
        ranks: This process is the first of them, the others `follow`; alone, nothing changes.

    Raises:
        ParallelError: The job trains several networks a pass, or the others have other data.
    """
    if ranks.size == 1:
        yield session
        return
    planned = session.plan
    if planned.job.training.networks_per_pass > 1:
        msg = (
            f"{ranks.size} processes train one network together, but the job asks for "
            f"{planned.job.training.networks_per_pass} networks a pass. Set networks_per_pass to "
            "1, or start one process."
        )
        raise ParallelError(msg)
    ranks.tell(planned.job.to_plain())
    ranks.check_same("data set", planned.task.fingerprint())
    ranks.copied(session.teacher.network.state_dict())
    yield replace(session, ranks=ranks)
    ranks.tell_end()
