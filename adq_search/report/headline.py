"""The outcome of a search in a few sentences, each with its numbers."""

from __future__ import annotations

from adq_search.report.front import FrontPoint, FrontReport
from adq_search.report.records import excess_of
from adq_search.report.tables import front_title
from adq_search.report.units import amount, title_of


def headline(report: FrontReport) -> list[str]:
    """Return what the search found, best news first and bad news unhidden.

    The first sentence compares the front's best point with full precision; the next names the
    cheapest point within one percentage point of it; then what the front offers instead of each
    uniform baseline, and its knee.
    """
    if not report.points:
        return [f"{front_title(report)}."]
    on_front = [b for b in report.uniform if _is_on_front(report, b)]
    return [
        _best(report),
        *_within_a_point(report),
        *(_against(report, b) for b in report.uniform if b not in on_front),
        *_unbeaten(report, on_front),
        *_knee(report),
        *_in_integers(report),
        *_seeds_only(report),
        *_prior(report),
        *certainty(report),
    ]


def certainty(report: FrontReport) -> list[str]:
    """Return how sure the front is, and what was stopped before its end; often nothing."""
    return [*_again(report), *_warm(report), *_stopped(report)]


def best_point(report: FrontReport) -> FrontPoint:
    """Return the point of the front that is best in the first measured objective."""
    best = report.points[0]
    for point in report.points:
        if not is_as_good(report, best, point):
            best = point
    return best


def within_budgets(report: FrontReport) -> str:
    """Return the best policy that meets the budgets, with its file, in one sentence."""
    limits = " and ".join(
        f"{title_of(name)} of at most {amount(name, limit)}"
        for name, limit in report.budgets.items()
    )
    if not report.points:
        return f"No policy with {limits} was trained to the end."
    best, (_, quality) = best_point(report), report.axes
    spent = ", ".join(f"{title_of(n)} {amount(n, best.value(n))}" for n in report.budgets)
    return (
        f"The best policy with {limits} is {_named(best)}: {title_of(quality)} "
        f"{amount(quality, best.value(quality))}, {spent} ({best.policy_file})."
    )


def saving_of(report: FrontReport, point: FrontPoint) -> float:
    """Return how many times less a point costs than full precision, by the first cost figure."""
    axis, _ = report.axes
    return report.full_precision.cost[axis] / point.cost[axis]


def is_as_good(report: FrontReport, point: FrontPoint, other: FrontPoint) -> bool:
    """Whether `point` is at least as good as `other` in the first measured objective."""
    _, quality = report.axes
    difference = point.value(quality) - other.value(quality)
    return difference >= 0 if quality == "accuracy" else difference <= 0


def _best(report: FrontReport) -> str:
    axis, quality = report.axes
    best = best_point(report)
    against = report.full_precision
    test = (
        ""
        if best.test_accuracy is None or against.test_accuracy is None
        else f" On the test part it reaches {amount('test_accuracy', best.test_accuracy)} "
        f"(full precision {amount('test_accuracy', against.test_accuracy)})."
    )
    return (
        f"The best policy found ({_named(best)}) has {title_of(quality)} "
        f"{amount(quality, best.value(quality))} (full precision "
        f"{amount(quality, against.value(quality))}) at {saving_of(report, best):.1f}x less "
        f"{title_of(axis)} than full precision: {amount(axis, best.cost[axis])} "
        f"instead of {amount(axis, against.cost[axis])}.{test}"
    )


def _against(report: FrontReport, baseline: FrontPoint) -> str:
    axis, quality = report.axes
    what = f"Uniform {baseline.label} ({amount(quality, baseline.value(quality))})"
    if excess_of(baseline.cost, report.budgets, who=what) > 0.0:
        return f"{what} is over budget."
    matching = [p for p in report.points if is_as_good(report, p, baseline)]
    cheaper = [p for p in matching if p.cost[axis] <= baseline.cost[axis]]
    if not cheaper:
        return (
            f"{what} lies off the front, but no policy found matches it for less {title_of(axis)}."
        )
    point = min(cheaper, key=lambda p: p.cost[axis])
    return (
        f"{what} is matched or beaten by {_named(point)} "
        f"({amount(quality, point.value(quality))}) at "
        f"{baseline.cost[axis] / point.cost[axis]:.2f}x less {title_of(axis)}."
    )


def _unbeaten(report: FrontReport, baselines: list[FrontPoint]) -> list[str]:
    _, quality = report.axes
    if not baselines:
        return []
    names = ", ".join(f"{b.label} ({amount(quality, b.value(quality))})" for b in baselines)
    if len(baselines) == 1:
        return [f"Uniform {names} is on the front itself: no policy found beats it."]
    return [f"Uniform {names} are on the front themselves: no policy found beats them."]


def _within_a_point(report: FrontReport) -> list[str]:
    axis, quality = report.axes
    if quality != "accuracy":
        return []
    bound = report.full_precision.value(quality) - 0.01
    near = [p for p in report.points if p.value(quality) >= bound]
    if not near:
        return ["No policy found comes within one percentage point of full precision."]
    point = min(near, key=lambda p: p.cost[axis])
    return [
        f"The cheapest within one percentage point of full precision is {_named(point)}: "
        f"{amount(quality, point.value(quality))} at {saving_of(report, point):.1f}x less."
    ]


def _is_on_front(report: FrontReport, baseline: FrontPoint) -> bool:
    return any(p.policy_hash == baseline.policy_hash for p in report.points)


def _named(point: FrontPoint) -> str:
    return f"trial {point.trial}, {point.origin}" if point.is_uniform else f"trial {point.trial}"


def _knee(report: FrontReport) -> list[str]:
    axis, quality = report.axes
    return [
        f"The knee of the front, where accuracy begins to cost most, is {_named(p)}: "
        f"{amount(quality, p.value(quality))} at {amount(axis, p.cost[axis])}, "
        f"{saving_of(report, p):.1f}x less than full precision."
        for p in report.points
        if p.policy_hash == report.knee
    ]


def _in_integers(report: FrontReport) -> list[str]:
    """Say how much of the front runs in integers as measured; nothing where none was tried."""
    tried = [p for p in report.points if p.integer_verified is not None]
    if not tried:
        return []
    n_verified = sum(p.integer_verified is True for p in tried)
    samples = min((p.integer_samples for p in tried if p.integer_verified), default=0)
    said = f"{n_verified} of {len(report.points)} policies on the front run in integers"
    if n_verified == 0:
        return [f"{said} as they were measured."]
    return [f"{said} with the same codes (but ties) and classes, on {samples} validation samples."]


def _again(report: FrontReport) -> list[str]:
    """Say what is left of the front after it was trained again with new seeds."""
    sums = [p.replicated for p in report.points if p.replicated is not None]
    volume = report.hypervolume
    if not sums:
        return []
    n_likely = sum(s.probability >= 0.5 for s in sums)
    shares = (
        ""
        if volume is None or volume.retrained_share is None
        else f" Its hypervolume is {volume.retrained_share:.4f} by their means, "
        f"{volume.share:.4f} as found."
    )
    lost = sum(len(s.replicates) - s.n_complete for s in sums)
    return [
        f"Each policy of the front was trained again with {len(sums[0].replicates)} new seeds: "
        f"{n_likely} of {len(sums)} are on the front with a probability of at least one half."
        f"{shares}" + (f" {lost} of these trainings did not complete." if lost else "")
    ]


def _warm(report: FrontReport) -> list[str]:
    """Warn where the front mixes training of different length."""
    n_warm = sum(p.donor is not None for p in report.points)
    if n_warm == 0:
        return []
    return [
        f"{n_warm} of {len(report.points)} policies on the front began from another policy's "
        "weights, and so had more training than their epochs tell: compare them with each other, "
        "not with those that began from full precision."
    ]


def _stopped(report: FrontReport) -> list[str]:
    """Say what was stopped: hopeless trials, and the search itself."""
    out = []
    stops, end = report.false_stops, report.end
    if stops is not None and stops["n_condemned"]:
        n_spared, n_wrong = stops["n_spared"], stops["n_on_front"]
        errors = (
            f"{n_spared} of them ran on, to know its errors, and {n_wrong} came onto the front: "
            f"{100.0 * n_wrong / n_spared:.0f} % false stops."
            if n_spared
            else "None of them ran on, so its errors are not known."
        )
        out.append(f"The pruner condemned {stops['n_condemned']} trials. {errors}")
    if end is not None:
        out.append(
            f"The search ended after {end['n_trials']} trials: over the last {end['patience']} its "
            f"hypervolume grew by {100.0 * end['growth']:.2f} %, less than its standard error of "
            f"{100.0 * end['error']:.2f} %."
        )
    return out


def _seeds_only(report: FrontReport) -> list[str]:
    """Say what the search added to what was known before it."""
    volume = report.hypervolume
    if volume is None or volume.seeds_share is None:
        return []
    return [
        f"Seeds and baselines alone reach a hypervolume of {volume.seeds_share:.4f}; with the "
        f"sampler's trials it is {volume.share:.4f}."
    ]


def _prior(report: FrontReport) -> list[str]:
    """Say how well the prior ranked what was measured."""
    prior = report.prior or {}
    overall = prior.get("rank_correlation")
    if overall is None:
        return []
    said = f"The prior ({prior['estimator']}) ranks the {prior['n_measured']} measured policies"
    known = {g: r for g, r in (prior.get("by_group") or {}).items() if r is not None}
    if not known:
        return [f"{said} with a correlation of {overall:.2f}."]
    worst = min(known, key=lambda group: known[group])
    return [
        f"{said} with a correlation of {overall:.2f}; by group, the others held, from "
        f"{known[worst]:.2f} ({worst}) to {max(known.values()):.2f}."
    ]
