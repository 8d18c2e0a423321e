"""A trial and a study in words: Markdown for the pages of dashboards, as they run.

Tables are GitHub's (GFM). Everything here is said while the search runs, so nothing of it is of
the test part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adq_search.pareto import Objective
from adq_search.policy import LayerPrecision
from adq_search.report.indicators import hypervolume_of
from adq_search.report.records import TrialRecord, select_front
from adq_search.report.units import amount, short_title_of, title_of
from adq_search.sensitivity import SensitivityTable

#: Cost figures that are told beside the objectives, where there are any of them.
_TOLD = ("energy_pj", "weight_bytes", "bops", "average_bits_weighted")


def trial_note(record: TrialRecord, objectives: Sequence[Objective]) -> str:
    """Return what a trial was and what it measured.

    Args:
        record: The trial.
        objectives: The axes of the search; they are told first.
    """
    state = record.state if record.reason is None else f"{record.state}: {record.reason}"
    measured = {"accuracy": record.accuracy, "kl": record.kl, "loss": record.loss, **record.cost}
    told = [o.name for o in objectives]
    told += ["accuracy", "kl", "loss", *(n for n in _TOLD if n in record.cost)]
    figures = [(title_of(n), amount(n, measured[n])) for n in dict.fromkeys(told)]
    figures += [("epochs", str(record.epochs)), ("seconds", f"{record.wall_s:.3g}")]
    layers = [(f"`{name}`", *_cells(precision)) for name, precision in record.policy]
    return "\n\n".join(
        [
            f"**Policy `{record.policy_hash}`**, proposed by {record.origin}; {state}.",
            _table(("figure", "value"), figures, n_texts=1),
            _table(("layer", "quantizer", "weight bits", "input bits", "momentum"), layers, 2),
            _health_in_words(record),
        ]
    )


def study_note(
    study: str,
    task: str,
    *,
    records: Sequence[TrialRecord],
    n_trials: int,
    objectives: Sequence[Objective],
    budgets: Mapping[str, float],
    sensitivity: SensitivityTable | None = None,
) -> str:
    """Return how a search stands, its front so far, how to repeat it, and what its prior says.

    Args:
        study: Its name.
        task: What is trained.
        records: The trials so far.
        n_trials: Policies that were asked for.
        objectives: The axes of the search.
        budgets: Upper limits on cost figures.
        sensitivity: What the prior predicts; None without one.
    """
    front = select_front(records, objectives, budgets)
    volume = hypervolume_of(records, objectives, budgets)
    share = "" if volume is None else f", hypervolume {100.0 * volume.share:.2f} % of the box"
    names = [o.name for o in objectives]
    rows = [
        (f"`{r.policy_hash}`", r.origin, str(r.number), *(amount(n, r.value(n)) for n in names))
        for r in front
    ]
    limits = ", ".join(f"{title_of(k)} <= {amount(k, v)}" for k, v in budgets.items())
    parts = [
        f"Quantization policies of `{task}`: {len(records)} of {n_trials} measured{share}"
        + (f"; within {limits}." if limits else "."),
        "### Front so far",
        _table(("policy", "proposed by", "trial", *map(short_title_of, names)), rows, n_texts=2),
        "### Repeat it",
        "`job.json`, an artifact of this study, is the whole job. With the same version of "
        "adq_search and the same data:",
        f"```sh\nadq-search run job.json --study {study}\n"
        f"adq-search train --policy policy.json --task {task} --out one_policy  # of a trial\n```",
    ]
    if sensitivity is not None:
        parts += [
            "### Predicted loss increase",
            f"In nats, by `{sensitivity.estimator}`, of one layer quantized alone: to choose by "
            "before any trial.",
            *_sensitivity_tables(sensitivity),
        ]
    return "\n\n".join(parts)


def _cells(precision: LayerPrecision) -> tuple[str, ...]:
    if precision.is_float:
        return "floating point", "–", "–", "–"
    bits = (precision.weight_bits, precision.input_bits, precision.ema_momentum)
    return precision.scheme, *("–" if b is None else f"{b:g}" for b in bits)


def _health_in_words(record: TrialRecord) -> str:
    """Say what went wrong in the quantizers, all layers together."""
    health = record.health
    if not health:
        return "Health: not measured."
    saturated = health.get("max_saturated")
    said = (
        f"Health: {health.get('wrong_sign_steps', 0)} of {health.get('n_steps', 0)} steps of wrong "
        f"sign, {health.get('dead_levels', 0)} of {health.get('n_levels', 0)} levels dead"
    )
    return said + ("." if saturated is None else f", at most {saturated:.1%} of a layer saturated.")


def _sensitivity_tables(table: SensitivityTable) -> Iterable[str]:
    """One table for the weights and one for the inputs: a row a layer, a column a quantizer."""
    for what, scores in (("weights", table.weights), ("inputs", table.inputs)):
        columns = sorted({key[1:] for key in scores})
        heads = (f"layer, {what}", *(f"{scheme} {bits}" for scheme, bits in columns))
        layers = dict.fromkeys(layer for layer, _, _ in scores)
        rows = [
            (f"`{layer}`", *(_score(scores.get((layer, *column))) for column in columns))
            for layer in layers
        ]
        if rows:
            yield _table(heads, rows, n_texts=1)


def _score(nats: float | None) -> str:
    return "" if nats is None else f"{nats:.1e}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], n_texts: int) -> str:
    """Return a table whose first `n_texts` columns are texts, the others numbers."""
    rules = ["---"] * n_texts + ["---:"] * (len(heads) - n_texts)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rules, *rows))
