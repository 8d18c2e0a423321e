"""The other processes of a search whose trials are data-parallel: they train what the first says.

They need neither study nor folder: job, teacher's weights and policies come from the first process
(`adq_search.leading`).
"""

from __future__ import annotations

from adq_search.distill import Teacher
from adq_search.job import Job
from adq_search.parallel import Ended, Ranks
from adq_search.policy import Policy
from adq_search.tasks import load_task
from adq_search.trial import run_trial


def lead_trial(ranks: Ranks, policy: Policy, *, seed: int) -> None:
    """Have the others begin the trial that this process, the first one, begins next."""
    if ranks.size > 1:
        ranks.tell({"policy": policy.to_json(), "seed": seed})


def follow(ranks: Ranks) -> int:
    """Take part in the trials of the first process until it has no more; return how many.

    Args:
        ranks: This process is not the first of them.

    Raises:
        ParallelError: The first process failed or is gone, or has other data.
        TaskError: The job's task is not to be had here.
    """
    n = 0
    try:
        job = Job.model_validate(ranks.heard())
        task = load_task(job.task, job.task_options)
        ranks.check_same("data set", task.fingerprint())
        network = task.make_network()
        network.load_state_dict(ranks.copied({}))
        teacher = Teacher(network, task)
        while True:
            order = ranks.heard()
            policy = Policy.from_json(order["policy"])
            run_trial(policy, task, teacher, job.training, {}, ranks=ranks, seed=order["seed"])
            n += 1
    except Ended:
        return n
