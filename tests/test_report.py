"""Results of a run: the front, the files, and what a reader sees."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from rich.console import Console

from adq_search.errors import CostError, StorageError
from adq_search.pareto import Objective
from adq_search.policy import FLOAT, LayerPrecision, Policy
from adq_search.report import (
    FrontReport,
    IntegerCheck,
    TrialRecord,
    front_svg,
    front_table,
    full_precision_point,
    headline,
    hypervolume_history,
    least_violating,
    make_front_report,
    read_front,
    read_trials,
    rebuild,
    select_front,
    trials_frame,
    write_results,
)
from adq_search.report.indicators import knee_index
from adq_search.report.units import amount

AXES = (Objective("accuracy", "maximize"), Objective("energy_pj", "minimize"))
NAMES = ("stem", "</script><b>body", "head")
FILES = {
    "front.json",
    "trials.json",
    "costs.json",
    "run.json",
    "trials.csv",
    "front.svg",
    "report.html",
}


def policy_of(code):
    """A different policy for each code below 7^3."""
    bits = [2 + code // 7**i % 7 for i in range(3)]
    return Policy.of({n: LayerPrecision(b, b, "lsq") for n, b in zip(NAMES, bits, strict=True)})


def record(number, accuracy, energy_pj, *, code=None, **more):
    policy = policy_of(number if code is None else code)
    loss, kl = (None, None) if accuracy is None else (1.0 - accuracy, 0.5 - accuracy / 2)
    measured = {"accuracy": accuracy, "loss": loss, "kl": kl}
    about = {"parameters": {}, "state": "complete", "origin": "sampler", **measured, **more}
    cost = {"energy_pj": energy_pj, "weight_bytes": 10.0 * energy_pj}
    return TrialRecord(number, policy, cost=cost, **about)


def layer_rows(policy):
    figures = {"macs": 10, "weight_bytes": 2.0, "bops": 40.0, "energy_pj": 3.0}
    return {"hardware": "toy", "layers": [{"name": n, **figures} for n in policy.names]}


def report_of(records, *, budgets=None, objectives=AXES, **more):
    return make_front_report(
        "toy",
        objectives=objectives,
        budgets=budgets or {},
        records=records,
        full_precision=full_precision_point(
            accuracy=0.95,
            test_accuracy=0.94,
            loss=0.05,
            cost={"energy_pj": 64.0, "weight_bytes": 640.0},
        ),
        test_accuracies={r.policy_hash: 0.5 for r in records},
        kept_weights={r.policy_hash for r in records if r.is_complete},
        **more,
    )


@pytest.fixture
def records():
    return [
        record(0, 0.30, 2.0, origin="uniform W2A2"),
        record(1, 0.80, 8.0, origin="uniform W4A4"),
        record(2, None, 1.0, state="diverged", reason="the training loss became nan in epoch 2"),
        record(
            3, 0.70, 3.0, origin="prior fisher 1/1", parameters={"bits.stem": 3, "scheme": "lsq"}
        ),
        record(4, 0.85, 6.0, parameters={"bits.stem": 4}, health={"dead_levels": 2, "layers": {}}),
        record(5, 0.99, 1.0, state="stopped", reason="stopped by the monitor"),
        record(6, 0.85, 6.0, code=4),
    ]


@pytest.fixture
def written(records, tmp_path):
    return write(records, tmp_path, report_of(records, n_rejected=2, seconds={"run": 1.5}))


def write(records, folder, report):
    costs = {r.policy_hash: layer_rows(r.policy) for r in records}
    run = {"command": "adq-search run", "seed": 0, "job": {"task": "my net.py:make"}}
    write_results(folder, report, records, costs=costs, run=run)
    return folder


def test_only_complete_trials_are_on_the_front_and_each_policy_once(records):
    assert [r.number for r in select_front(records, AXES, {})] == [0, 3, 4]


def test_the_first_trial_of_a_policy_counts_not_the_luckiest():
    twice = [record(0, 0.5, 1.0), record(1, 0.9, 1.0, code=0)]
    assert [r.number for r in select_front(twice, AXES, {})] == [0]


def test_different_policies_with_equal_values_both_stay():
    ties = [record(0, 0.5, 1.0), record(1, 0.5, 1.0), record(2, 0.5, 2.0), record(3, 0.4, 1.0)]
    assert [r.number for r in select_front(ties, AXES, {})] == [0, 1]


@pytest.mark.parametrize(("limit", "numbers"), [(6.0, [0, 3, 4]), (5.9, [0, 3]), (1.0, [])])
def test_a_budget_includes_its_limit(records, limit, numbers):
    assert [r.number for r in select_front(records, AXES, {"energy_pj": limit})] == numbers


def test_least_violating_orders_by_the_share_of_the_excess(records):
    budgets = {"energy_pj": 1.5, "weight_bytes": 25.0}
    # 0: 0.5/1.5; 3: 1.5/1.5 + 5/25; 4: 4.5/1.5 + 35/25; 1: 6.5/1.5 + 55/25
    assert [r.number for r in least_violating(records, budgets, 3)] == [0, 3, 4]


trial_values = st.tuples(
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(0, 9),
    st.sampled_from(["complete", "diverged"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(trial_values, max_size=12), st.integers(1, 5))
def test_the_front_is_that_of_brute_force(rows, limit):
    trials = [
        record(i, accuracy / 4, float(energy), code=code, state=state)
        for i, (accuracy, energy, code, state) in enumerate(rows)
    ]
    eligible = {}
    for trial in trials:
        if trial.state == "complete":
            eligible.setdefault(trial.policy_hash, trial)
    alive = [t for t in eligible.values() if t.cost["energy_pj"] <= limit]
    expected = {
        t.number
        for t in alive
        if not any(
            (o.accuracy > t.accuracy and o.cost["energy_pj"] <= t.cost["energy_pj"])
            or (o.accuracy >= t.accuracy and o.cost["energy_pj"] < t.cost["energy_pj"])
            for o in alive
        )
    }
    front = select_front(trials, AXES, {"energy_pj": float(limit)})
    assert {t.number for t in front} == expected
    energies = [t.cost["energy_pj"] for t in front]
    assert energies == sorted(energies)


@pytest.mark.parametrize("bad", [None, float("nan")], ids=["missing", "nan"])
def test_a_missing_metric_raises_and_has_no_default(records, bad):
    damaged = [*records, replace(record(9, 0.5, 1.0), accuracy=bad)]
    with pytest.raises(StorageError, match=r"Trial 9 counts as complete, but its accuracy is"):
        select_front(damaged, AXES, {})


def test_an_unknown_objective_or_budget_raises(records):
    with pytest.raises(CostError, match="Did you mean 'energy_pj'"):
        select_front(records, [AXES[0], Objective("energy_nj", "minimize")], {})
    with pytest.raises(CostError, match="no figure 'bytes'"):
        select_front(records, AXES, {"bytes": 1.0})


def test_a_front_policy_without_test_accuracy_is_refused(records):
    with pytest.raises(StorageError, match=r"trials \[0, 3, 4\] are not"):
        make_front_report(
            "toy",
            objectives=AXES,
            budgets={},
            records=records,
            full_precision=report_of(records).full_precision,
            test_accuracies={},
            kept_weights=(),
        )


def test_hypervolume_by_hand(records):
    report = report_of(records)
    # Reference: accuracy 0, energy 1.1 x 8. Front (2, 0.3), (3, 0.7), (6, 0.85), as three strips.
    value = (3 - 2) * 0.3 + (6 - 3) * 0.7 + (8.8 - 6) * 0.85
    assert report.hypervolume.reference == pytest.approx({"accuracy": 0.0, "energy_pj": 8.8})
    assert report.hypervolume.value == pytest.approx(value)
    assert report.hypervolume.share == pytest.approx(value / 8.8)


def test_hypervolume_history_never_falls_and_ends_at_the_front(records):
    report = report_of(records)
    history = hypervolume_history(records, AXES, {}, report.hypervolume.reference)
    shares = [share for _, share in history]
    assert [number for number, _ in history] == list(range(7))
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx((8.8 - 2) * 0.3 / 8.8)
    assert shares[2] == shares[1]  # a diverged trial adds nothing
    assert shares[-1] == pytest.approx(report.hypervolume.share)


def test_the_knee_lies_farthest_below_the_chord():
    points = [(0.0, 0.0), (0.8, 1.0), (0.9, 3.0), (1.0, 10.0)]
    # Distance below the chord, up to a factor: accuracy - cost / 10.
    assert knee_index(points, ["maximize", "minimize"]) == 1
    assert knee_index(points[:2], ["maximize", "minimize"]) is None


def test_report_round_trip(records):
    prior = {"estimator": "fisher", "n_measured": 4, "rank_correlation": 0.5}
    report = report_of(records, prior=prior, n_repeated=1)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert FrontReport.from_json(content) == report
    assert content["schema"] == "adq_search.front/1"
    assert content["objectives"] == [
        {"name": "accuracy", "direction": "maximize"},
        {"name": "energy_pj", "direction": "minimize"},
    ]
    assert content["counts"] == {
        "complete": 5, "diverged": 1, "stopped": 1, "rejected": 0, "repeated": 1,
    }  # fmt: skip
    asked = {
        "trial",
        "policy_hash",
        "accuracy",
        "test_accuracy",
        "cost",
        "policy_file",
        "weights_file",
    }
    assert all(asked <= row.keys() for row in [*content["points"], *content["baselines"]])
    assert [row["origin"] for row in content["baselines"]] == [
        "uniform W2A2", "uniform W4A4", "full precision",
    ]  # fmt: skip


def test_a_diverged_baseline_is_listed_as_such(records):
    records[1] = replace(records[1], state="diverged", accuracy=None, loss=None, kl=None)
    report = FrontReport.from_json(report_of(records).to_json())
    assert [p.label for p in report.uniform] == ["W2A2"]
    assert [(p.label, p.state) for p in report.baselines][1] == ("W4A4", "diverged")
    assert report.hypervolume.reference["energy_pj"] == pytest.approx(8.8)


def test_record_round_trip(records):
    for one in records:
        assert TrialRecord.from_json(json.loads(json.dumps(one.to_json()))) == one


def _without(content, *path):
    *parents, last = path
    for part in parents:
        content = content[part]
    del content[last]


def _with(content, value, *path):
    *parents, last = path
    for part in parents:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda c: _without(c, "points", 1, "accuracy"), r"points\.1\.accuracy"),
        (lambda c: _with(c, None, "points", 0, "accuracy"), r"points\.0\.accuracy"),
        (
            lambda c: _with(c, "much", "points", 0, "cost", "energy_pj"),
            r"points\.0\.cost\.energy_pj",
        ),
        (lambda c: _without(c, "points", 2, "cost", "energy_pj"), r"points\.2\.cost\.energy_pj"),
        (lambda c: _with(c, float("nan"), "baselines", 0, "loss"), r"baselines\.0\.loss"),
        (lambda c: _with(c, "upwards", "objectives", 0, "direction"), r"objectives\.0\.direction"),
        (lambda c: _with(c, "adq_search.front/2", "schema"), "schema"),
        (lambda c: _with(c, 1, "extra"), "unknown key 'extra'"),
        (lambda c: _without(c, "baselines", -1), "full precision .* must stand once"),
    ],
    ids=[
        "missing",
        "null",
        "text",
        "objective",
        "nan",
        "direction",
        "schema",
        "unknown",
        "baseline",
    ],
)
def test_a_damaged_front_names_the_field(written, damage, field):
    content = json.loads((written / "front.json").read_text())
    damage(content)
    (written / "front.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match=field):
        read_front(written)


@pytest.mark.parametrize("name", ["front.json", "trials.json", "costs.json", "run.json"])
def test_rebuild_refuses_a_half_written_or_missing_file(written, name):
    file = written / name
    file.write_text(file.read_text()[:-20])
    with pytest.raises(StorageError, match=f"{name} is damaged: line"):
        rebuild(written)
    file.unlink()
    with pytest.raises(StorageError, match=f"There is no .* file at .*{name}"):
        rebuild(written)


def test_rebuild_refuses_files_of_different_runs(written):
    content = json.loads((written / "trials.json").read_text())
    content["trials"] = content["trials"][:2]
    (written / "trials.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match="trials.json does not hold the policies of #3, #4"):
        rebuild(written)


def test_a_damaged_trial_names_its_field(written):
    content = json.loads((written / "trials.json").read_text())
    content["trials"][0]["policy"]["layers"]["stem"]["weight_bits"] = 99
    (written / "trials.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"trial 0 is damaged.*layers\.stem\.weight_bits"):
        read_trials(written)


def test_rebuild_needs_the_json_files_alone_and_changes_nothing(written, records):
    before = {name: (written / name).read_bytes() for name in FILES}
    for made in ("trials.csv", "front.svg", "report.html"):
        (written / made).unlink()
    assert rebuild(written) == written / "report.html"
    assert {f.name for f in written.iterdir()} == FILES
    assert {name: (written / name).read_bytes() for name in FILES} == before
    assert shown(front_table(read_front(written))) == shown(
        front_table(report_of(records, n_rejected=2))
    )


def shown(table):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    return console.export_text()


def test_front_table_shows_every_point_and_the_baselines_last(records):
    lines = [line.split() for line in shown(front_table(report_of(records))).splitlines()]
    rows = [line for line in lines if "%" in " ".join(line)]
    hashes = [policy_of(code).hash for code in (0, 3, 4, 0, 1)]
    assert [row[0] for row in rows] == [*hashes, "–"]
    assert rows[2][1:] == ["–", "85.00%", "50.00%", "6.00", "pJ", "60.0", "B", "10.7x", "sampler"]


def test_trials_csv_has_every_trial_and_no_defaults(written, records):
    frame = pd.read_csv(written / "trials.csv")
    assert list(frame["number"]) == list(range(7))
    assert list(frame["policy_hash"]) == [r.policy_hash for r in records]
    assert list(frame["cost.energy_pj"]) == [r.cost["energy_pj"] for r in records]
    assert frame["accuracy"].isna().tolist() == [r.accuracy is None for r in records]
    assert frame["health.dead_levels"].dropna().tolist() == [2]
    assert "health.layers" not in frame
    assert frame.loc[2, "reason"] == "the training loss became nan in epoch 2"
    text = (written / "trials.csv").read_text().splitlines()
    assert text[0].endswith("param.bits.stem,param.scheme")
    assert text[4].endswith(",3,lsq")  # an integer stays one beside missing values
    assert text[1].endswith(",,")
    assert trials_frame(records)["param.bits.stem"].dtype == "Int64"


@pytest.mark.parametrize("n_records", [0, 1])
def test_a_search_without_a_front_says_so(tmp_path, n_records):
    lost = [record(i, None, 1.0, state="diverged", reason="nan") for i in range(n_records)]
    folder = write(lost, tmp_path, report_of(lost))
    assert headline(read_front(folder)) == ["toy: no trial completed."]
    assert "no trial completed" in (folder / "report.html").read_text()


def test_a_budget_nobody_meets_shows_the_nearest(records, tmp_path):
    report = report_of(records, budgets={"energy_pj": 0.5})
    assert [p.trial for p in report.closest] == [0, 3, 4, 1]
    assert [p.policy_file for p in report.closest] == [None] * 4
    page = (write(records, tmp_path, report) / "report.html").read_text()
    assert "no trial meets energy per inference &lt;= 0.500 pJ" in page
    assert "over budget" in page


def test_headline_says_what_is_better_and_what_is_not(records):
    sentences = headline(report_of(records))
    assert sentences[0].startswith(
        "The best policy found (trial 4) has validation accuracy 85.00% (full precision 95.00%) at "
        "10.7x less energy per inference than full precision: 6.00 pJ instead of 64.0 pJ."
    )
    assert sentences[1:4] == [
        "No policy found comes within one percentage point of full precision.",
        "Uniform W4A4 (80.00%) is matched or beaten by trial 4 (85.00%) at 1.33x less energy per "
        "inference.",
        "Uniform W2A2 (30.00%) is on the front itself: no policy found beats it.",
    ]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("energy_pj", 1234.5, "1.23 nJ"),
        ("energy_pj", 0.5, "0.500 pJ"),
        ("energy_pj", 999.96, "1,000 pJ"),
        ("weight_bytes", 1023.0, "1,023 B"),
        ("weight_bytes", 3 * 1024.0**2, "3.00 MiB"),
        ("bops", 4.16e7, "41.6 M"),
        ("average_bits_weighted", 4.0, "4.00"),
        ("latency", 12345.6, "12,346"),
    ],
)
def test_amounts_are_readable(name, value, text):
    assert amount(name, value) == text


class TestPage:
    def test_it_loads_nothing_from_the_network(self, written):
        page = (written / "report.html").read_text()
        body = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
        assert len(page) - len(body) > 1_000_000  # plotly.js is inside
        assert re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:|//)[^\"'>]*", body) == []
        assert re.findall(r"@import|url\(|<link|<iframe|<img", body) == []
        assert "https://" not in body

    def test_names_cannot_become_markup(self, written):
        page = (written / "report.html").read_text()
        assert "</script><b>" not in page
        assert r"script\u003e\u003cb\u003ebody" in page

    def test_it_holds_every_part(self, written):
        page = (written / "report.html").read_text()
        for part in ("front", "hypervolume", "bits", "shares"):
            assert f'id="figure-{part}"' in page
        for told in (
            "simulated quantization",
            "the training loss became nan in epoch 2",
            "draws over budget, not trained",
            f"adq-search train --policy policies/{policy_of(3).hash}.json --task &#39;my net.py",
            "1 trial without a finite",
            "job.task",
        ):
            assert told in page

    @pytest.mark.parametrize(
        "objectives",
        [
            (*AXES, Objective("weight_bytes", "minimize")),
            (Objective("loss", "minimize"), AXES[1]),
            (AXES[0], Objective("weight_bytes", "minimize")),
        ],
        ids=["three", "loss", "weight bytes"],
    )
    def test_other_objectives_work(self, records, tmp_path, objectives):
        folder = write(records, tmp_path, report_of(records, objectives=objectives))
        assert {f.name for f in folder.iterdir()} == FILES
        assert read_front(folder).hypervolume.share > 0.0

    def test_layers_in_floating_point_are_shown(self, tmp_path):
        one = record(0, 0.9, 2.0)
        mixed = Policy.of({**dict(one.policy.layers), "head": FLOAT})
        one = replace(one, policy=mixed)
        page = (write([one], tmp_path, report_of([one])) / "report.html").read_text()
        assert "floating point" in page


class TestPicture:
    def test_it_is_svg_with_every_point(self, records):
        root = ET.fromstring(front_svg(report_of(records)))
        tag = "{http://www.w3.org/2000/svg}"
        texts = [t.text for t in root.iter(f"{tag}text")]
        assert len(list(root.iter(f"{tag}circle"))) == 3
        assert {"W2A2", "W4A4", "full precision", "energy per inference (pJ)"} <= set(texts)

    def test_places_follow_the_values(self, records):
        root = ET.fromstring(front_svg(report_of(records)))
        dots = [c.attrib for c in root.iter("{http://www.w3.org/2000/svg}circle")]
        xs, ys = [float(d["cx"]) for d in dots], [float(d["cy"]) for d in dots]
        # Energies 2, 3, 6 on a logarithmic axis; accuracies 0.30, 0.70, 0.85 upwards.
        assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(0.36907, abs=1e-3)
        assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(0.40 / 0.55, abs=1e-3)


def test_every_report_says_which_policies_run_in_integers(records, tmp_path):
    reason = "Layer 'stem' is in floating point."
    names = {number: records[number].policy_hash for number in (0, 3, 4)}
    checks = {
        names[0]: IntegerCheck(True, 100),
        names[3]: IntegerCheck(False, 100, "Of 9 codes 2 differ."),
        names[4]: IntegerCheck(None, 0, reason),
    }
    report = report_of(records, integer_checks=checks)
    assert FrontReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    rows = {row["policy_hash"]: row for row in report.to_json()["points"]}
    kept = [(rows[n]["integer_verified"], rows[n]["integer_samples"]) for n in names.values()]
    assert kept == [(True, 100), (False, 100), (None, 0)]
    assert rows[names[4]]["integer_reason"] == reason
    words = [line.split() for line in shown(front_table(report)).splitlines()]
    marks = {row[0]: row[1] for row in words if row and row[0] in names.values()}
    assert marks == {names[0]: "✓", names[3]: "✗", names[4]: "–"}
    page = (write(records, tmp_path, report) / "report.html").read_text()
    for text in ("verified on 100 validation samples", "Of 9 codes 2 differ.", escape(reason)):
        assert f'<td title="{text}">' in page
    assert "1 of 3 policies on the front run in integers" in " ".join(headline(report))


def test_a_front_of_a_version_without_integers_is_read(written):
    content = json.loads((written / "front.json").read_text())
    for point in [*content["points"], *content["baselines"]]:
        for name in ("integer_verified", "integer_samples", "integer_reason"):
            del point[name]
    (written / "front.json").write_text(json.dumps(content))
    assert {p.integer_verified for p in read_front(written).points} == {None}
