"""The results folder: what a run writes, and the report made again from it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from adq_search.errors import StorageError
from adq_search.files import read_json, write_json, write_text
from adq_search.report._read import StrictFile
from adq_search.report.front import FrontReport
from adq_search.report.layer_figures import Costs
from adq_search.report.page import render_page
from adq_search.report.records import TrialRecord, trials_from_json, trials_to_json
from adq_search.report.replicated import write_replicates_csv
from adq_search.report.svg import front_svg
from adq_search.report.tables import write_trials_csv
from adq_search.validation import validated

COSTS_SCHEMA = "adq_search.costs/1"
RUN_SCHEMA = "adq_search.run/1"


class _CostsFile(StrictFile):
    schema_: Literal["adq_search.costs/1"] = Field(alias="schema")
    policies: dict[str, dict[str, Any]]


def write_results(
    folder: Path,
    report: FrontReport,
    records: Sequence[TrialRecord],
    *,
    costs: Costs,
    run: Mapping[str, Any],
) -> Path:
    """Write everything a report is made from, then the report.

    `front.json`, `trials.json`, `costs.json`, `run.json`; `trials.csv`, `replicates.csv` where
    there are any, `front.svg`, `report.html`. Policies and weights are the caller's.

    Args:
        folder: The results folder; made where it is missing.
        report: The outcome in numbers.
        records: All trials.
        costs: Per-layer costs by policy hash (`CostReport.to_json`), of every policy in `report`.
        run: How it was made: command, versions, seeds, commit, fingerprints.

    Returns:
        The path of `report.html`.
    """
    write_json(folder / "trials.json", trials_to_json(records))
    write_json(folder / "costs.json", {"schema": COSTS_SCHEMA, "policies": dict(costs)})
    write_json(folder / "run.json", {"schema": RUN_SCHEMA, **run})
    write_json(folder / "front.json", report.to_json())
    return rebuild(folder)


def rebuild(folder: Path) -> Path:
    """Make the CSV files, `front.svg` and `report.html` again from the JSON files of a folder.

    Returns:
        The path of `report.html`.

    Raises:
        StorageError: A file is missing or damaged, with the field at fault.
    """
    report = read_front(folder)
    records = read_trials(folder)
    costs = _read(folder / "costs.json", "costs")
    form = validated(_CostsFile, costs, StorageError, what="the file costs.json")
    run = _read(folder / "run.json", "run")
    _check_belong(report, records)
    write_trials_csv(records, folder / "trials.csv")
    again = {str(p.policy_hash): p.replicated for p in report.points if p.replicated is not None}
    write_replicates_csv(again, folder / "replicates.csv")
    write_text(folder / "front.svg", front_svg(report))
    page = folder / "report.html"
    write_text(page, render_page(report, records, form.policies, run))
    return page


def read_front(folder: Path) -> FrontReport:
    """Read `front.json`.

    Raises:
        StorageError: It is missing or damaged, with the field at fault.
    """
    return FrontReport.from_json(_read(folder / "front.json", "front"))


def read_trials(folder: Path) -> list[TrialRecord]:
    """Read `trials.json`.

    Raises:
        StorageError: It is missing or damaged, with the field at fault.
    """
    return trials_from_json(_read(folder / "trials.json", "trials"))


def _read(path: Path, what: str) -> Any:
    return read_json(path, StorageError, what=what)


def _check_belong(report: FrontReport, records: Sequence[TrialRecord]) -> None:
    """Refuse a front whose policies are not among the trials."""
    known = {r.policy_hash for r in records}
    strange = [p.label for p in (*report.points, *report.closest) if p.policy_hash not in known]
    if strange:
        msg = (
            f"trials.json does not hold the policies of {', '.join(strange)} that front.json "
            "names: the two files are of different runs. Restore them from one source."
        )
        raise StorageError(msg)
