"""The demonstration in miniature: all its steps, all its files, on a user's own clips."""

import json
import re

import pytest

from syncdpo.data.clips import read_clip, write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.demo import DemoConfig, run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "clips").mkdir()
    for seed in range(4):
        write_clip(folder / "clips" / f"{seed}.mp4", render_clip(seed))
    config = DemoConfig(
        folder / "out", clips=folder / "clips", steps=2, samples=3, sampling_steps=2, progress=False
    )
    return config, run(config)


def test_report_json_has_a_row_per_method(demo):
    config, report = demo
    assert json.loads((config.output / "report.json").read_text()) == report
    assert [r["method"] for r in report["rows"]] == ["base", "sft", "sft-equal-time", "syncdpo"]
    for row in report["rows"]:
        assert {"f1", "onset_error_ms", "events_per_clip", "steps", "seconds"} <= row.keys()
    steps = {row["method"]: row["steps"] for row in report["rows"]}
    assert (steps["base"], steps["sft"], steps["syncdpo"]) == (0, 2, 2)
    assert steps["sft-equal-time"] > 2  # a pair costs more than a clip


def test_a_second_run_repeats_no_training_and_finds_the_same(demo):
    assert run(demo[0])["rows"] == demo[1]["rows"]


def test_real_clips_are_in_step(demo):
    assert demo[1]["real"]["f1"] > 0.9
    assert demo[1]["real"]["onset_error_ms"] < 30


def test_samples_are_clips_with_pictures_and_sound(demo):
    files = sorted((demo[0].output / "samples" / "syncdpo").glob("*.mp4"))
    assert len(files) == 3
    clip = read_clip(files[0], require_sound=False)
    assert clip.video.shape == (48, 64, 64, 3)
    assert clip.audio.shape == (1, 32_000)


def test_page_needs_nothing_beside_it(demo):
    page = (demo[0].output / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{5})', page)
    assert len(sources) == 2 + 4 * 3  # two pictures, three clips of each method
    assert set(sources) == {"data:"}
    assert "$" not in re.sub(r'"data:[^"]*"', "", page)
