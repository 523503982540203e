"""The trials in miniature, and what becomes of their rows."""

import itertools
import json
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import pytest

from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.demo import search, trials
from syncdpo.demo.demonstration import WEIGHTS, DemoConfig
from syncdpo.demo.search import (
    KEPT,
    LEARNING_RATES,
    Bench,
    keeps_events,
    mean_row,
    worth,
    write_result,
)
from syncdpo.demo.trials import WeightsSearch, rules_table, tune, weights_table


@pytest.fixture
def config(tmp_path):
    (tmp_path / "clips").mkdir()
    for seed in range(4):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", render_clip(seed))
    return DemoConfig(
        tmp_path / "runs", tmp_path / "clips", 1, samples=4, sampling_steps=4, progress=False
    )


def test_tuning_tries_every_choice_of_weights_and_goes_on_from_its_result(config, monkeypatch):
    monkeypatch.setattr(search, "LEARNING_RATES", (1e-6,))
    monkeypatch.setattr(search, "BEGIN", (0,))
    monkeypatch.setattr(trials, "SEEDS", 2)
    monkeypatch.setattr(trials, "keeps_events", lambda row, real: True)
    result = config.output / "tune.json"
    table = tune(config, result, jobs=1)
    found = json.loads(result.read_text())
    rows = {(row["method"], row["weights"], row["seed"]): row for row in found["trials"]}
    assert len(rows) == len(found["trials"]) == 3 * (len(WEIGHTS) + 1)
    for method, (weights, rate) in found["best"].items():
        assert rate == 1e-6
        assert {seed for m, w, seed in rows if (m, w) == (method, weights)} == {0, 1}
        if method != "sft":  # it trains what is best at equal time
            errors = {w: worth(rows[method, w, 0]) for w in WEIGHTS}
            assert errors[weights] == min(errors.values())
        mean = sum(rows[method, weights, seed]["onset_error_ms"] for seed in (0, 1)) / 2
        assert found["settled"][method][0]["onset_error_ms"] == pytest.approx(mean)
    assert found["best"]["sft"][0] == found["best"]["sft-equal-time"][0]
    assert len(table.splitlines()) == 2 + len(WEIGHTS)
    assert table.count("**") == 2 * 3
    monkeypatch.setattr(trials.Trial, "run", None)  # whoever runs one again fails
    tune(config, result, jobs=1)
    assert json.loads(result.read_text()) == found


class Measured(Bench):
    """A bench on whose trials `error(place in LEARNING_RATES, seed)` is measured."""

    def __init__(self, error):
        super().__init__(Path(), None)
        object.__setattr__(self, "error", error)

    def run(self, trials):
        return [self.row(trial, trial.settings["learning_rate"]) for trial in trials]

    def row(self, trial, rate):
        seed = trial.ground.config.seed
        error = self.error(LEARNING_RATES.index(rate), seed)
        row = {"name": trial.name, "seed": seed, "onset_error_ms": error, "learning_rate": rate}
        row |= {"f1": 0.5, "own_f1": 0.4, "own_onset_error_ms": 70, "keeps_events": True}
        return row | {"events_per_clip": 3, "own_events_per_clip": 3}


def sft_search(method="sft", weights="all") -> WeightsSearch:
    return WeightsSearch(grounds(0), method, weights, 60)


def grounds(*seeds: int) -> list:
    return [trials.Ground(DemoConfig(seed=seed), None, None) for seed in seeds]


@pytest.mark.parametrize("best", [0, 3, 8, 15])
def test_a_search_ends_with_the_best_between_two_others(best):
    """Errors that grow with the distance from one place of the ladder, on either side."""
    tried = sft_search()
    bench = Measured(lambda p, seed: abs(p - best) + 0.1 * (p > best))
    bench.search([tried])
    tried.settle(tried.grounds)
    bench.search([tried])
    assert tried.best["learning_rate"] == LEARNING_RATES[best]
    assert {best - 1, best + 1} & set(range(16)) <= set(tried.places)


def test_a_search_settles_by_the_mean_of_all_seeds():
    """Seed 0 is best at place 8, where another fails: the mean is best two half octaves lower."""
    tried = sft_search()
    bench = Measured(lambda p, seed: abs(p - 8) if seed == 0 else 3 * abs(p - 6))
    bench.search([tried])
    assert tried.best["learning_rate"] == LEARNING_RATES[8]
    tried.settle(grounds(0, 1))
    bench.search([tried])
    assert tried.best["learning_rate"] == LEARNING_RATES[6]
    assert tried.best["onset_error_ms"] == 1
    assert sorted(tried.places) == [5, 6, 7, 8, 9]


def test_weights_table_has_each_methods_best_rate():
    found = []
    for method, weights in itertools.product(("sft", "sft-equal-time", "syncdpo"), WEIGHTS):
        tried = sft_search(method, weights)
        Measured(lambda p, seed: 40 + abs(p - 8)).search([tried])
        found.append(tried)
    lines = weights_table(found).splitlines()
    assert len(lines) == 2 + len(WEIGHTS)
    assert lines[2] == "| all |" + "|".join([" 0.016: 0.50, 40 ms; 0.40, 70 ms "] * 3) + "|"


def test_what_was_not_measured_on_every_seed_has_no_mean():
    rows = [{"seed": n, "f1": 0.2, "events_per_clip": n, "steps": 60} for n in range(3)]
    mean = mean_row([row | {"onset_error_ms": row["events_per_clip"] or None} for row in rows])
    assert mean == {
        "f1": pytest.approx(0.2),
        "events_per_clip": 1,
        "onset_error_ms": None,
        "steps": 60,
        "keeps_events": True,
    }


def test_who_loses_sounds_on_one_seed_is_behind_who_keeps_them_on_all():
    def measured(given, own, kept=True):
        return {"onset_error_ms": given, "own_onset_error_ms": own, "keeps_events": kept}

    lost = mean_row([measured(10, 10, kept) for kept in (True, False)])
    assert worth(measured(90, 90)) < worth(lost) < worth(lost | {"own_onset_error_ms": None})
    assert worth(measured(20, 60)) < worth(measured(41, 41))  # by the mean of both


def test_rules_table_has_mean_and_range_over_seeds():
    rows = [
        {"name": f"{rule}-{curriculum}-{matched}", "seed": seed, "rules": rule}
        | {"curriculum": curriculum, "matched": matched}
        | {"own_f1": 0.5 + 0.1 * seed, "own_onset_error_ms": 10.0 * (seed + 1)}
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


def test_a_row_serves_no_trial_with_other_settings(config):
    ground = trials.Ground(config, None, None)
    trial = trials.Trial(ground, "name", "sft", {"steps": 1}, "all")
    asked = []
    bench = Bench(config.output, Asked(asked), line=lambda row: "")
    row = trial.asked | {"f1": 0.5}
    write_result(config.output / KEPT, {"trials": [row]})
    assert bench.run([trial]) == [row]
    others = [
        replace(trial, settings={"steps": 2}),
        replace(trial, ground=ground._replace(config=replace(config, samples=9))),
    ]
    assert bench.run([*others, trial, others[0]])[2] == row
    assert asked == [other.asked for other in others]  # each once
    assert bench.run(others) == asked
    assert len(asked) == 2


class Asked(Executor):
    """Measures nothing: a row is what it was asked for."""

    def __init__(self, asked: list[dict]):
        self.asked = asked

    def submit(self, run):
        self.asked.append(run.__self__.asked)
        future = Future()
        future.set_result(run.__self__.asked)
        return future


def test_falling_silent_does_not_count_as_keeping_time():
    real = {"events_per_clip": 3.0}
    assert keeps_events({"events_per_clip": 2.8, "own_events_per_clip": 3.2}, real)
    assert not keeps_events({"events_per_clip": 2.6, "own_events_per_clip": 3.0}, real)
    assert not keeps_events({"events_per_clip": 3.0, "own_events_per_clip": 3.4}, real)
