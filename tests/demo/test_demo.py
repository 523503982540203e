"""The demonstration in miniature: all its steps, all its files, on a user's own clips."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from syncdpo.data.clips import read_clip, write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.demo.demonstration import (
    FIRST,
    OWN,
    RENDERED,
    WEIGHTS,
    DemoConfig,
    equal_time,
    prepare_clips,
    read_logs,
    run,
    settings_of,
)
from syncdpo.models.weights import FULL, of_audio
from syncdpo.training.checkpoint import read_rows


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "clips").mkdir()
    for seed in range(8):
        write_clip(folder / "clips" / f"{seed}.mp4", render_clip(seed))
    config = DemoConfig(
        folder / "out", clips=folder / "clips", steps=2, samples=2, sampling_steps=2, progress=False
    )
    return config, run(config)


def test_report_json_has_a_row_per_method(demo):
    config, report = demo
    assert json.loads((config.output / "report.json").read_text()) == report
    assert [r["method"] for r in report["rows"]] == ["base", "sft", "sft-equal-time", "syncdpo"]
    for row in report["rows"]:
        assert {"f1", "onset_error_ms", "events_per_clip", "steps", "seconds"} <= row.keys()
        assert {"own_f1", "own_onset_error_ms"} <= row.keys()
        assert row["clips"] == 2
    steps = {row["method"]: row["steps"] for row in report["rows"]}
    assert (steps["base"], steps["sft"], steps["syncdpo"]) == (0, 2, 2)
    assert steps["sft-equal-time"] > 2  # a pair costs more than a clip


def test_equal_time_is_the_works(demo):
    """Of all weights, what forwards and backwards cost in forwards of a clip: SFT 1 + 2, SyncDPO
    2 + 4 and the reference's 2. Whatever else the machine does, the steps are as many."""
    data = prepare_clips(demo[0]).training
    sft, half = (settings_of(OWN, method) for method in ("sft", "syncdpo"))
    every = half | WEIGHTS["all"]
    assert equal_time(300, sft, every, data) == pytest.approx(300 * 8 / 3, rel=0.01)
    assert 2 < equal_time(300, sft, half, data) / 300 < 8 / 3  # fewer gradients of weights


def test_syncdpo_of_own_clips_goes_on_from_sft(demo):
    config, report = demo
    assert (config.recipe.steps, config.recipe.first_steps) == (2, 1)
    log = read_logs(config, "syncdpo")
    assert ["implicit_accuracy" in entry for entry in log] == [False, True]
    row = {row["method"]: row for row in report["rows"]}["syncdpo"]
    parts = [read_rows(config.work / name) for name in (FIRST, "syncdpo")]
    assert row["steps"] == sum(map(len, parts)) == 2
    assert row["weights"] == "all, then sound's half"
    first, ours = (load_file(config.work / name / FULL) for name in (FIRST, "syncdpo"))
    moved = {name for name in first if not torch.equal(first[name], ours[name])}
    assert moved
    assert all(of_audio(name) for name in moved)
    assert RENDERED.first_steps == 0  # a base that knows the clips needs none


def test_a_second_run_repeats_no_training_and_finds_the_same(demo):
    assert run(demo[0])["rows"] == demo[1]["rows"]


def test_what_was_trained_on_other_clips_or_seeds_is_not_taken_for_done(demo, tmp_path):
    config = demo[0]
    elsewhere = replace(config, clips=tmp_path / config.clips.name)
    others = (replace(config, clips=None), replace(config, seed=1), elsewhere)
    others += tuple(replace(config, clips=None, offset_spread=s) for s in (0.0, 0.1))
    assert len({other.work for other in (config, *others)}) == 6


def test_real_clips_are_in_step(demo):
    assert demo[1]["real"]["f1"] > 0.9
    assert demo[1]["real"]["onset_error_ms"] < 30


@pytest.mark.parametrize("kind", ["sounds", "clips"])
def test_samples_are_clips_with_pictures_and_sound(demo, kind):
    files = sorted((demo[0].work / "samples" / "syncdpo" / kind).glob("*.mp4"))
    assert len(files) == 2
    clip = read_clip(files[0], require_sound=False)
    assert clip.video.shape == (48, 64, 64, 3)
    assert clip.audio.shape == (1, 32_000)


def test_sounds_are_written_to_pictures_that_nobody_was_trained_on(demo):
    """Every fourth clip, from the second on; all methods show it."""
    clips = prepare_clips(demo[0])
    names = [clip["source"] for clip in clips.training.dataset.latents.clips]
    assert clips.held_out.indices == [1, 5]
    assert sorted([*clips.training.indices, *clips.held_out.indices]) == list(range(8))
    given = read_clip(demo[0].clips / names[5])
    shown = [
        read_clip(demo[0].work / "samples" / method / "sounds" / "001.mp4", require_sound=False)
        for method in ("base", "syncdpo")
    ]
    for clip in shown:
        assert (clip.video.float() - given.video.float()).abs().mean() < 8
    assert not torch.equal(*(clip.audio for clip in shown))


def test_only_training_clips_get_an_offset(tmp_path, monkeypatch):
    monkeypatch.setattr("syncdpo.demo.demonstration.TRAINING_CLIPS", 1)
    plain = DemoConfig(tmp_path, samples=1, offset_spread=0.0, progress=False)
    late = replace(plain, offset_spread=0.2)
    exact, moved = (prepare_clips(config) for config in (plain, late))
    assert torch.equal(exact.training[0]["video"], moved.training[0]["video"])
    assert not torch.equal(exact.training[0]["audio"], moved.training[0]["audio"])
    assert torch.equal(exact.held_out[0]["audio"], moved.held_out[0]["audio"])


def test_one_clip_is_not_enough(demo, tmp_path):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "only.mp4", render_clip(0))
    config = replace(demo[0], output=tmp_path / "out", clips=tmp_path / "clips")
    with pytest.raises(ValueError, match=r"clips: expected two .* got 1 in"):
        run(config)


def test_page_needs_nothing_beside_it(demo):
    page = (demo[0].output / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{5})', page)
    clips = (4 + 1) * 2  # two of each method, and two real ones
    assert len(sources) == 2 + clips  # and two pictures
    assert page.count('poster="data:image/png') == clips
    assert page.count('<svg class="events"') == clips
    assert set(sources) == {"data:"}
    assert "$" not in re.sub(r'"data:[^"]*"', "", page)
