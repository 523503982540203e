"""The watchdog: each way to fail is named, with the setting to change; a healthy run never is."""

import math
import re
from dataclasses import replace

import pytest
import torch
from micro import micro_model, random_latents

from syncdpo.train import train
from syncdpo.training.checkpoint import read_rows
from syncdpo.training.config import TrainConfig, TrainingDiverged
from syncdpo.training.watchdog import CHECKS, FILE, Watchdog, silent, warnings_of

CONFIG = TrainConfig(steps=100, batch_size=16)


def healthy(steps=100, validate_every=10):
    """The log of a run that goes well, as the demonstration's do: errors rise and come down."""
    rows = []
    for step in range(steps + 1):
        done = step / steps
        rise = 1 + 4 * math.sin(math.pi * min(1, 2 * done)) if done < 0.5 else 1 + 2 * (1 - done)
        if step % validate_every == 0:
            levels = {"accuracy_0": 0.5 + done * 0.4, "accuracy_0.5": 0.5 + done * 0.4}
            levels |= {"accuracy_1": 0.5 + done * 0.3, "margin_0": 2 * done, "margin_1": done}
            known = {
                "winner_ratio": rise,
                "winner_ratio_least": rise,
                "sft_loss": 0.3 * rise,
                "valid": 1.0,
                "clips": 32,
            }
            rows.append({"step": step, "validation": known | levels})
        if step % 20 == 0:
            rows.append({"step": step, "samples": {"events_per_clip": 3.3 + done / 5}})
        if step < steps:
            rows.append(
                {
                    "step": step,
                    "loss": 1.3,
                    "implicit_accuracy": 0.5 if done < 0.15 else 0.75,
                    "margin": 1.5 * (-1) ** step,
                    "video_error_win": 0.2,
                    "audio_error_win": 0.3 * rise,
                    "video_reference_win": 0.2,
                    "audio_reference_win": 0.3,
                    "valid": 0.95,
                    "skipped": 0,
                }
            )
    return rows


def changed(rows, since, **figures):
    """The same rows with other figures from a step on, in whatever kind of row has them."""
    for row in rows:
        for part in (row, *(row[kind] for kind in ("validation", "samples") if kind in row)):
            if row["step"] >= since:
                part |= {name: value for name, value in figures.items() if name in part}
    return rows


def without(rows, kind):
    return [row for row in rows if kind not in row]


def names(rows, config=CONFIG, clips=256):
    return list(warnings_of(rows, config, clips))


def step_of(sentence):
    return int(sentence.removeprefix("step ").partition(":")[0])


def test_a_healthy_log_is_not_named():
    assert not names(healthy())
    assert not names(without(healthy(), "validation"))


FAILING = {
    "winners_forgotten": {
        "winner_ratio": 33.0,
        "winner_ratio_least": 30.0,
        "audio_error_win": 9.0,
    },
    "margins_run_away": {"margin": -25.0, "margin_0": 40.0},
    "steps_skipped": {"skipped": 1},
    "pairs_alike": {"valid": 0.1},
    "falls_silent": {"events_per_clip": 1.3},
}


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("name", FAILING)
def test_what_fails_is_named_within_thirty_steps(name, held_out):
    rows = changed(healthy(), 40, **FAILING[name])
    if not held_out:
        rows = without(rows, "validation")
    found = warnings_of(rows, CONFIG, 256)
    assert list(found) == [name]
    assert 40 <= step_of(found[name]) <= 70


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("winners_forgotten", "lower learning_rate or beta_audio, or raise sft_weight"),
        ("margins_run_away", r"lower beta_audio \(10\), or learning_rate"),
        ("steps_skipped", "lower learning_rate, or leave out the clip"),
        ("pairs_alike", "set data to clips that have sounds"),
        ("falls_silent", "lower learning_rate or beta_audio, or raise sft_weight"),
    ],
)
def test_a_sentence_says_which_setting_to_change(name, settings):
    (sentence,) = warnings_of(changed(healthy(), 40, **FAILING[name]), CONFIG, 256).values()
    assert sentence.count("\n") == 0
    assert re.search(settings, sentence), sentence


def test_winners_that_do_not_come_back_are_forgotten_in_the_end():
    """By the bound that the best step is chosen by; training's own rows are allowed more."""
    rows = changed(healthy(), 60, winner_ratio=4.0, winner_ratio_least=3.1)
    found = warnings_of(rows, CONFIG, 256)
    assert step_of(found["winners_forgotten"]) == 90
    assert not names(rows, replace(CONFIG, winner_bound=3.2))
    blind = without(changed(healthy(), 60, audio_error_win=1.2), "validation")  # 4 times 0.3
    assert not names(blind)
    assert names(blind, replace(CONFIG, winner_bound=2.5)) == ["winners_forgotten"]
    assert not names(changed(rows, 0, clips=15))  # too few to say so, against training's own rows
    by_chance = changed(healthy(), 60, winner_ratio=4.0, winner_ratio_least=2.9)  # of few clips
    assert not names(by_chance)


def test_sft_is_measured_against_its_own_beginning():
    config = replace(CONFIG, method="sft")
    rows = [
        {"step": s, "loss": 0.5, "video_error": 0.2, "audio_error": 0.3, "skipped": 0}
        for s in range(100)
    ]
    assert not names(rows, config)
    exploded = changed(rows, 2, audio_error=30.0)
    found = warnings_of(exploded, config, 256)
    assert list(found) == ["winners_forgotten"]
    assert step_of(found["winners_forgotten"]) <= 10
    assert "what it was; lower learning_rate" in found["winners_forgotten"]
    assert "beta" not in found["winners_forgotten"]


def test_accuracy_at_a_half_is_named_when_three_quarters_are_over():
    found = warnings_of(changed(healthy(), 0, implicit_accuracy=0.52), CONFIG, 256)
    assert list(found) == ["accuracy_stuck"]
    assert step_of(found["accuracy_stuck"]) == 75 - 1
    assert "0.52 over the last 410 pairs" in found["accuracy_stuck"]
    long = replace(CONFIG, steps=10_000)
    assert not names(changed(healthy(), 0, implicit_accuracy=0.52), long)  # nor need it, by then
    few_pairs = replace(CONFIG, batch_size=1)
    assert not names(changed(healthy(), 0, implicit_accuracy=0.52), few_pairs)


def test_few_clips_are_named_once_they_were_seen_often():
    found = warnings_of(healthy(), CONFIG, 8)
    assert step_of(found["too_few_clips"]) == 10  # 22 times; after ten steps it was 20
    assert "8 clips, each seen 22 times" in found["too_few_clips"]
    assert not names(healthy(), clips=32)
    assert names(healthy(), replace(CONFIG, accumulation=4), clips=31) == ["too_few_clips"]


def test_held_out_figures_that_fall_alone_are_memorising():
    rows = changed(healthy(), 60, accuracy_0=0.4, **{"accuracy_0.5": 0.4, "accuracy_1": 0.4})
    found = warnings_of(rows, CONFIG, 256)
    assert list(found) == ["memorised"]
    assert step_of(found["memorised"]) == 70  # twice in a row
    # Where training falls too, as when difficulty rises, it is something else.
    assert not names(changed(rows, 45, implicit_accuracy=0.6))


def test_a_held_out_error_that_rises_alone_is_memorising():
    rows = changed(healthy(), 60, sft_loss=1.0, audio_error_win=0.3)
    assert names(rows) == ["memorised"]
    assert "error rose while that of training fell" in warnings_of(rows, CONFIG, 256)["memorised"]
    assert not names(changed(healthy(), 60, sft_loss=1.0, audio_error_win=0.9))


@pytest.mark.parametrize(
    ("sounds", "expected", "named"),
    [(1.3, 3.5, True), (1.8, 3.5, False), (0.0, 0.0, False), (0.0, 2.0, True), (None, 2.0, False)],
)
def test_silence_is_half_of_the_sounds(sounds, expected, named):
    sentence = silent(sounds, expected)
    assert bool(sentence) == named
    if named:
        assert f"{sounds:.2f} sounds per clip, {expected:.2f} in the data" in sentence


def test_every_check_was_tried():
    tried = {*FAILING, "accuracy_stuck", "too_few_clips", "memorised"}
    assert tried == {check.__name__ for check in CHECKS}


def test_rows_in_pieces_find_what_they_find_at_once(tmp_path, capsys):
    """A run that goes on says nothing twice, and knows what was said."""
    config = replace(CONFIG, output=str(tmp_path))
    rows = changed(changed(healthy(), 40, margin=-25.0), 60, skipped=2)
    whole = Watchdog(config, 256, 1)
    for row in rows:
        whole(row, True)
    said = capsys.readouterr().err
    assert said.count("warning: step") == 2
    assert (tmp_path / FILE).read_text().splitlines() == whole.said
    later = Watchdog(config, 256, 1)
    for row in rows:
        later(row, row["step"] >= 55)
    said = capsys.readouterr().err
    assert later.said == whole.said
    assert said.count("warning: step") == 1
    assert "without a finite" in said


# --- real runs, small ones ------------------------------------------------------------------------

HEALTHY = {
    "steps": 80, "batch_size": 8, "learning_rate": 5e-3, "beta_audio": 100.0, "rules": "shift",
    "matched": 0.0, "curriculum": "constant",
}  # fmt: skip


def follow(folder, data, capsys, **settings):
    """→ what `train` returned, and the warnings by their checks."""
    config = TrainConfig(output=str(folder), **HEALTHY | settings)
    result = train(config, micro_model(), data, progress=False)
    clips = len(data) - max((r["validation"]["clips"] for r in named(folder)), default=0)
    found = warnings_of(read_rows(folder), config, clips)
    assert result["warnings"] == list(found.values())
    said = capsys.readouterr().err
    assert all(f"warning: {sentence}" in said for sentence in found.values())
    written = folder / FILE
    assert found == {} or written.read_text().splitlines() == result["warnings"]
    assert written.exists() == bool(found)
    return result, found


def named(folder):
    return [row for row in read_rows(folder) if "validation" in row]


def silence(count):
    return [clip | {"audio": torch.zeros_like(clip["audio"])} for clip in random_latents(count)]


@pytest.fixture(scope="module")
def clips():
    return random_latents(80)


def test_a_healthy_run_is_not_named(tmp_path, clips, capsys):
    """It learns, and is told nothing."""
    _, found = follow(tmp_path, clips, capsys, validation=0.2, validate_every=10)
    assert not found
    accuracy = [row["implicit_accuracy"] for row in read_rows(tmp_path) if "loss" in row]
    assert sum(accuracy[-20:]) / 20 > 0.65
    assert [row["step"] for row in named(tmp_path)] == list(range(0, 81, 10))


@pytest.mark.parametrize("held_out", [0.0, 0.2])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"beta_audio": 10_000.0}, "margins_run_away"),
        ({"learning_rate": 0.5}, "winners_forgotten"),
        ({"learning_rate": 0.5, "method": "sft"}, "winners_forgotten"),
    ],
    ids=["beta", "learning_rate", "sft"],
)
def test_a_run_that_is_made_to_fail_is_named(tmp_path, clips, capsys, settings, name, held_out):
    """β or the learning rate × 100. Of the latter 30 times do for a model that knows something:
    this one begins with random weights, and must be made worse than those."""
    options = {"validation": held_out, "validate_every": 10, "steps": 30}
    _, found = follow(tmp_path, clips, capsys, **options, **settings)
    assert name in found
    assert step_of(found[name]) <= 30


def test_silent_clips_are_named(tmp_path, capsys):
    _, found = follow(tmp_path, silence(40), capsys, steps=12)
    assert list(found) == ["pairs_alike"]
    assert "100% of the pairs count nothing" in found["pairs_alike"]


def test_eight_clips_are_named(tmp_path, clips, capsys):
    _, found = follow(tmp_path, clips[:8], capsys, steps=30, beta_audio=10.0)
    assert step_of(found["too_few_clips"]) == 20


def test_a_broken_clip_is_named_and_so_is_what_ends_a_run(tmp_path, clips, capsys):
    broken = [dict(clip) for clip in clips[:40]]
    broken[3]["audio"] = broken[3]["audio"] * math.nan
    _, found = follow(tmp_path / "one", broken, capsys, steps=6)
    assert "steps_skipped" in found
    with pytest.raises(TrainingDiverged):
        follow(tmp_path / "all", [broken[3]] * 40, capsys)
    assert "without a finite loss" in (tmp_path / "all" / FILE).read_text()
