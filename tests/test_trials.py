"""The trials in miniature, and what becomes of their rows."""

import itertools
import json
from dataclasses import replace

import pytest

from syncdpo import trials
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.demo import WEIGHTS, DemoConfig
from syncdpo.report import LABELS
from syncdpo.trials import Search, keeps_events, rules_table, tune, weights_table


@pytest.fixture
def config(tmp_path):
    (tmp_path / "clips").mkdir()
    for seed in range(4):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", render_clip(seed))
    return DemoConfig(
        tmp_path / "runs", tmp_path / "clips", 1, samples=4, sampling_steps=4, progress=False
    )


def test_tuning_tries_every_choice_of_weights_and_goes_on_from_its_result(config, monkeypatch):
    monkeypatch.setattr(trials, "LEARNING_RATES", (1e-6,))
    monkeypatch.setattr(trials, "BEGIN", {0: (0,), 16: (0,)})
    monkeypatch.setattr(trials, "keeps_events", lambda row, real: True)
    result = config.output / "tune.json"
    table = tune(config, result, jobs=1)
    found = json.loads(result.read_text())
    methods = ("sft", "syncdpo", "sft-equal-time")
    assert [(row["method"], row["weights"]) for row in found["trials"]] == list(
        itertools.product(methods, WEIGHTS)
    )
    rows = {(row["method"], row["weights"]): row for row in found["trials"]}
    for method, (weights, rate) in found["best"].items():
        assert rate == 1e-6
        if method != "sft":  # it trains what is best at equal time
            errors = [rows[method, w]["onset_error_ms"] for w in WEIGHTS]
            assert rows[method, weights]["onset_error_ms"] == min(errors)
    assert found["best"]["sft"][0] == found["best"]["sft-equal-time"][0]
    assert len(table.splitlines()) == 2 + len(WEIGHTS)
    monkeypatch.setattr(trials.Trial, "run", None)  # whoever runs one again fails
    tune(config, result, jobs=1)
    assert json.loads(result.read_text()) == found


@pytest.mark.parametrize("best", [0, 3, 8, 15])
def test_a_search_ends_with_the_best_between_two_others(best, monkeypatch, tmp_path):
    """Errors that grow with the distance from one place of the ladder, on either side."""

    def measure(asked, folder, jobs):
        places = [trials.LEARNING_RATES.index(t.settings["learning_rate"]) for t in asked]
        return [
            t.settings | {"onset_error_ms": abs(p - best) + 0.1 * (p > best), "events_per_clip": 3}
            for t, p in zip(asked, places, strict=True)
        ]

    monkeypatch.setattr(trials, "run_trials", measure)
    search = Search(None, None, {"events_per_clip": 3}, "sft", "all", 60)
    trials.run_searches([search], tmp_path, 1)
    search.refine()
    trials.run_searches([search], tmp_path, 1)
    assert search.best["learning_rate"] == trials.LEARNING_RATES[best]
    assert {best - 1, best + 1} & set(range(16)) <= set(search.places)


def test_weights_table_has_each_methods_best_rate():
    row = {"f1": 0.5, "events_per_clip": 3.0}
    rows = [
        {"method": method, "weights": weights, "learning_rate": rate, "onset_error_ms": error} | row
        for method, weights in itertools.product(LABELS, WEIGHTS)
        for rate, error in ((1e-3, 50.0), (2e-3, 40.0), (4e-3, 60.0))
    ]
    lines = weights_table(rows, {"events_per_clip": 3.0}).splitlines()
    assert len(lines) == 2 + len(WEIGHTS)
    assert lines[2] == "| all |" + "|".join([" 0.002: 0.50 · 40 ms "] * 3) + "|"


def test_rules_table_has_mean_and_range_over_seeds():
    rows = [
        {"name": f"{rule}-{curriculum}-{matched}", "seed": seed, "rules": rule}
        | {"curriculum": curriculum, "matched": matched}
        | {"f1": 0.5 + 0.1 * seed, "onset_error_ms": 10.0 * (seed + 1)}
        for seed in range(3)
        for rule, curriculum, matched in itertools.product(
            trials.RULES, trials.CURRICULA, trials.MATCHED
        )
    ]
    lines = rules_table(rows).splitlines()
    assert len(lines) == 2 + len(trials.RULES)
    assert lines[0].count("matched 0.5") == lines[0].count("not matched") == 2
    cell = " 0.60 (0.50–0.70) · 20 (10–30) ms "
    assert lines[2] == "| shift |" + "|".join([cell] * 4) + "|"


def test_a_row_serves_no_trial_with_other_settings(config, monkeypatch):
    trial = trials.Trial(config, config.output, "name", "sft", {"steps": 1}, "all")
    config.output.mkdir()
    trials.write_result(config.output / "trials.json", {"trials": [trial.asked | {"f1": 0.5}]})
    assert trials.run_trials([trial], config.output, jobs=1) == [trial.asked | {"f1": 0.5}]
    monkeypatch.setattr(trials.Trial, "run", None)
    for other in (
        replace(trial, settings={"steps": 2}),
        replace(trial, config=replace(config, samples=9)),
    ):
        with pytest.raises(TypeError, match="not callable"):
            trials.run_trials([other], config.output, jobs=1)


def test_falling_silent_does_not_count_as_keeping_time():
    real = {"events_per_clip": 3.0}
    assert keeps_events({"events_per_clip": 2.8}, real)
    assert not keeps_events({"events_per_clip": 2.6}, real)
