"""What a search by Ray tells of itself while it runs: the records in its folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from adq_search.hosting import is_at_work
from adq_search.plugins._ray_records import hosted_trials, records_of
from adq_search.session import reopen
from adq_search.status import StudyStatus, study_status
from adq_search.stopping import settled


def read_status(folder: Path) -> StudyStatus:
    """Look at the search in a folder without touching it.

    Trials without a result are running while a run holds the folder; otherwise `--resume` goes on
    with them.

    Raises:
        StorageError: The folder holds no search, or is damaged.
    """
    session = reopen(folder)
    finished = hosted_trials(session)
    done = {trial.result.policy.hash for trial in finished}
    begun = [record for record in records_of(folder) if record.policy_hash not in done]
    counts = Counter[str](trial.result.state for trial in finished)
    is_running = is_at_work(folder)
    if begun:
        counts["running" if is_running else "interrupted"] = len(begun)
    workers = {record.worker or f"trial {record.trial_id}" for record in begun}
    return study_status(
        folder.name,
        session.plan.job,
        finished,
        counts=counts,
        workers=sorted(workers) if is_running else (),
        is_over=settled(session.plan, [trial.result for trial in finished]) is not None,
    )
