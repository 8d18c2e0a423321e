"""Time what a trial's page in optuna-dashboard costs its worker, in studies of growing size.

Usage: python results/scaling/pages.py [--trials N [N ...]] [--repeats N]

A page is a note, a policy's file in a folder, and the reading and writing around them. The study
lies in a journal file and in PostgreSQL; it holds as many trials with pages already as the table
says. Processor time of the worker alone, since the machine may be shared. Writes pages.csv,
pages.md and pages.json. Needs the extra `dev`.
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import optuna

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from adq_search.job import read_job  # noqa: E402
from adq_search.plan import plan  # noqa: E402
from adq_search.plugins.optuna_artifacts import publish  # noqa: E402
from adq_search.plugins.optuna_objective import directions  # noqa: E402
from adq_search.plugins.optuna_storage import open_storage  # noqa: E402
from adq_search.plugins.optuna_study_page import begin_pages  # noqa: E402
from adq_search.plugins.optuna_trial_pages import TrialPages  # noqa: E402
from adq_search.provenance import provenance  # noqa: E402
from adq_search.session import prepare  # noqa: E402
from tests.servers import Database  # noqa: E402

TARGET_MS = 20.0


def page_ms(url, session, sizes, repeats):
    """Yield the size of the study and the milliseconds of one page, for each page that is timed."""
    study = optuna.create_study(
        study_name="pages", storage=open_storage(url), directions=directions(session.plan)
    )
    publish(study, session, str(session.folder / "artifacts"))
    begin_pages(study, session, asked=True)
    pages = TrialPages(study, session, has_weights=True)
    result = session.measure(session.seeds[0].policy)
    for n in range(max(sizes) + repeats + 1):
        trial = study.ask()
        start = time.process_time()
        pages.write(trial, result)
        spent = 1e3 * (time.process_time() - start)
        study.tell(trial, session.plan.values(result))
        # The first page of a process asks git for the commit.
        for size in sizes:
            if size < n <= size + repeats:
                yield size, spent


def main(trials, repeats):
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database, rows = Database(), []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            session = prepare(plan(read_job(HERE.parents[1] / "tests/tiny.yaml")), Path(scratch))
            for kind, url in (
                ("journal file", f"{scratch}/study.journal"),
                ("PostgreSQL", database.fresh_url()),
            ):
                for size, spent in page_ms(url, session, trials, repeats):
                    rows.append({"storage": kind, "pages before": size, "cpu_ms": spent})
    finally:
        database.stop()
    with (HERE / "pages.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows({**row, "cpu_ms": f"{row['cpu_ms']:.3f}"} for row in rows)
    lines = ["| storage | pages before | ms a page, median | min | max |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for kind, size in dict.fromkeys((r["storage"], r["pages before"]) for r in rows):
        here = [r["cpu_ms"] for r in rows if (r["storage"], r["pages before"]) == (kind, size)]
        cells = [f"{f(here):.1f}" for f in (statistics.median, min, max)]
        lines.append(f"| {kind} | {size} | {' | '.join(cells)} |")
    lines += ["", f"Target: {TARGET_MS:g} ms of processor time a page; a network of four layers."]
    (HERE / "pages.md").write_text("\n".join(lines) + "\n")
    (HERE / "pages.json").write_text(json.dumps(provenance(seed=0), indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, nargs="+", default=[0, 100, 400])
    parser.add_argument("--repeats", type=int, default=10)
    main(**vars(parser.parse_args()))
