"""The trials in miniature, and what becomes of their rows."""

import itertools
import json
from dataclasses import replace

import pytest

from syncdpo import trials
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.demo import DemoConfig
from syncdpo.trials import keeps_events, rules_table, tune_learning_rates


@pytest.fixture
def config(tmp_path):
    (tmp_path / "clips").mkdir()
    for seed in range(4):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", render_clip(seed))
    return DemoConfig(
        tmp_path / "runs", tmp_path / "clips", 1, samples=4, sampling_steps=4, progress=False
    )


def test_tuning_tries_every_rate_once_and_goes_on_from_its_result(config, monkeypatch):
    monkeypatch.setattr(trials, "LEARNING_RATES", (1e-6,))
    monkeypatch.setattr(trials, "keeps_events", lambda row, real: True)
    result = config.output / "rates.json"
    tune_learning_rates(config, result, jobs=1)
    found = json.loads(result.read_text())
    assert found["best"] == dict.fromkeys(("sft", "syncdpo", "sft-equal-time"), 1e-6)
    assert [row["name"] for row in found["trials"]] == [
        "sft-1e-06",
        "syncdpo-1e-06",
        "sft-equal-time-1e-06",
    ]
    monkeypatch.setattr(trials.Trial, "run", None)  # whoever runs one again fails
    tune_learning_rates(config, result, jobs=1)
    assert json.loads(result.read_text()) == found


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
    trial = trials.Trial(config, config.output, "name", "sft", {"steps": 1})
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
