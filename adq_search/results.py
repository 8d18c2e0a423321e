"""From what a host ran to the results folder: test accuracy of the front, policies, report."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from adq_search.files import write_json
from adq_search.hosting import HostedTrial, HostOptions, HostOutcome
from adq_search.pareto import Objective
from adq_search.policy import Policy, save_policy
from adq_search.provenance import provenance
from adq_search.report import (
    FrontPoint,
    FrontReport,
    TrialRecord,
    make_front_report,
    select_front,
    write_results,
)
from adq_search.session import Session
from adq_search.store import load_quantized
from adq_search.training import evaluate

BASELINE = "uniform"
