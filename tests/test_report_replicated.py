"""What a report says of its own certainty: replicates, warm starts, stops."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
from scipy import stats

from adq_search.errors import StorageError
from adq_search.report import Replicate, certainty, headline, read_front, read_trials, rebuild
from tests.test_report import record, records, report_of, write

__all__ = ["records"]  # the fixture


def replicate(seed, accuracy, **more):
    loss = None if accuracy is None else 1.0 - accuracy
    state = "diverged" if accuracy is None else "complete"
    return Replicate(seed, state, accuracy, loss, loss, 3, 0.5, **more)


@pytest.fixture
def again(records):
    """Further trainings of the front: trials 0 (2 pJ), 3 (3 pJ) and 4 (6 pJ)."""
    accuracies = {0: (0.28, 0.32), 3: (0.66, 0.70), 4: (0.60, 0.64)}
    return {
        r.policy_hash: [replicate(s, a) for s, a in enumerate(accuracies[r.number], start=1)]
        for r in records
        if r.number in accuracies
    }


def test_points_have_means_errors_and_probabilities(records, again):
    points = {p.trial: p.replicated for p in report_of(records, replicates=again).points}
    assert [round(points[n].means["accuracy"], 9) for n in (0, 3, 4)] == [0.30, 0.68, 0.62]
    # Each pair differs by 0.04: pooled variance 2 * 0.02^2 each, over two trainings.
    for n in (0, 3, 4):
        assert points[n].errors == {"accuracy": pytest.approx(0.02)}
        assert points[n].n_complete == 2
    assert points[0].probability == 1.0
    behind = (0.68 - 0.62) / (0.02 * 2**0.5)
    assert points[4].probability == pytest.approx(stats.t.cdf(-behind, 3), abs=0.01)


def test_the_retrained_hypervolume_is_that_of_the_means(records, again):
    volume = report_of(records, replicates=again).hypervolume
    # (2, 0.30), (3, 0.68); (6, 0.62) is dominated; reference energy 8.8, accuracy 0.
    assert volume.retrained_share == pytest.approx(((3 - 2) * 0.30 + (8.8 - 3) * 0.68) / 8.8)
    assert report_of(records).hypervolume.retrained_share is None


def test_a_file_says_it_all_again(records, again, tmp_path):
    report = report_of(
        records,
        replicates=again,
        end={"n_trials": 7, "patience": 5, "growth": 0.001, "error": 0.01, "noise": 0.02},
        false_stops={"n_condemned": 3, "n_spared": 1, "n_on_front": 0},
    )
    folder = write(records, tmp_path, report)
    assert read_front(folder) == report
    rows = pd.read_csv(folder / "replicates.csv")
    assert len(rows) == 6
    assert set(rows["policy_hash"]) == set(again)
    page = (folder / "report.html").read_text()
    assert "68.00% ± 2.00%" in page
    assert "2 of 2" in page
    assert (folder / "front.svg").read_text().count('stroke="#CC79A7"') == 3


def test_without_replicates_there_is_no_trace_of_them(records, tmp_path):
    folder = write(records, tmp_path, report_of(records))
    (folder / "replicates.csv").write_text("left by an earlier run")
    rebuild(folder)
    assert not (folder / "replicates.csv").exists()
    assert "trained again" not in (folder / "report.html").read_text()
    assert certainty(read_front(folder)) == []


def test_files_of_earlier_versions_still_load(records, tmp_path):
    folder = write(records, tmp_path, report_of(records))
    front = json.loads((folder / "front.json").read_text())
    for name in ("end", "false_stops"):
        del front[name]
    del front["hypervolume"]["retrained_share"]
    for point in (*front["points"], *front["baselines"], *front["closest"]):
        del point["donor"], point["replicated"]
    (folder / "front.json").write_text(json.dumps(front))
    trials = json.loads((folder / "trials.json").read_text())
    for trial in trials["trials"]:
        del trial["donor"], trial["epochs_before"]
    (folder / "trials.json").write_text(json.dumps(trials))
    assert read_front(folder).points[0].replicated is None
    assert read_trials(folder)[0].donor is None


def test_a_damaged_replicate_is_named(records, again, tmp_path):
    folder = write(records, tmp_path, report_of(records, replicates=again))
    front = json.loads((folder / "front.json").read_text())
    front["points"][0]["replicated"]["probability"] = "high"
    (folder / "front.json").write_text(json.dumps(front))
    with pytest.raises(StorageError, match=r"points\.0\.replicated\.probability"):
        read_front(folder)


def test_diverged_replicates_are_counted(records, again):
    front = next(r for r in records if r.number == 3).policy_hash
    again[front] = [replicate(1, None, reason="the training loss became nan")] * 2
    report = report_of(records, replicates=again)
    point = next(p for p in report.points if p.trial == 3)
    assert (point.replicated.means, point.replicated.probability) == ({}, 0.0)
    sentence = next(s for s in certainty(report) if s.startswith("Each policy"))
    assert "trained again with 2 new seeds: 2 of 3 are on the front" in sentence
    assert "2 of these trainings did not complete" in sentence


def test_a_front_of_warm_and_cold_trials_says_so(records, tmp_path):
    warm = [
        replace(r, donor="0123456789abcdef", epochs_before=4) if r.number == 4 else r
        for r in records
    ]
    report = report_of(warm)
    assert [p.donor for p in report.points] == [None, None, "0123456789abcdef"]
    sentence = next(s for s in headline(report) if "another policy's weights" in s)
    assert sentence.startswith("1 of 3 policies on the front began")
    folder = write(warm, tmp_path, report)
    assert "warm from <code>0123456789abcdef</code>" in (folder / "report.html").read_text()
    rows = pd.read_csv(folder / "trials.csv").set_index("number")
    assert rows.loc[4, "donor"] == "0123456789abcdef"
    assert rows.loc[4, "epochs_before"] == 4


@pytest.mark.parametrize(
    ("stops", "said"),
    [
        (
            (4, 2, 1),
            "condemned 4 trials. 2 of them ran on, to know its errors, and 1 came onto the "
            "front: 50 % false stops.",
        ),
        ((4, 0, 0), "None of them ran on, so its errors are not known."),
    ],
)
def test_false_stops_are_told(records, stops, said):
    names = ("n_condemned", "n_spared", "n_on_front")
    report = report_of(records, false_stops=dict(zip(names, stops, strict=True)))
    assert said in " ".join(certainty(report))


def test_one_trial_with_a_replicate_has_no_error(tmp_path):
    single = [record(0, 0.5, 2.0)]
    runs = {single[0].policy_hash: [replicate(1, 0.4)]}
    point = report_of(single, replicates=runs).points[0]
    assert (point.replicated.means, point.replicated.errors) == ({"accuracy": 0.4}, {})
    folder = write(single, tmp_path, report_of(single, replicates=runs))
    assert read_front(folder).points[0].replicated == point.replicated
