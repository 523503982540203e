"""`syncdpo evaluate`: metrics of the user's own beside the built-in ones."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from recordings import click_and_flash
from typer.testing import CliRunner

from syncdpo import evaluation, metrics
from syncdpo.cli import app
from syncdpo.data.clips import Clip, read_clip, write_clip
from syncdpo.data.decoding import decode
from syncdpo.data.synthetic import render_clip
from syncdpo.evaluation import evaluate_folder, load_metric
from syncdpo.metrics import cell_events, clip_metrics, picture_events


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(2):
        write_clip(folder / f"{seed}.mp4", render_clip(seed))
    return folder


def rows(output):
    return list(csv.DictReader((output / "clips.csv").open()))


def test_a_metric_of_ones_own_is_a_column(folder, tmp_path):
    seen = []

    def second_only(clip):
        seen.append(clip)
        return math.nan if len(seen) == 1 else 0.25

    extra = {"desync": second_only, "length": lambda clip: clip.video.shape[0]}
    text = evaluate_folder(folder, tmp_path, with_av_align=False, extra=extra, progress=False)
    assert [row["desync"] for row in rows(tmp_path)] == ["0.25", "", "0.25"]
    assert [row["length"] for row in rows(tmp_path)] == ["48", "48", "48"]
    assert all(row["av_align"] == "" for row in rows(tmp_path))
    assert seen[0].video.shape == (48, 64, 64, 3)
    page = (tmp_path / "report.html").read_text()
    assert "<th>desync</th>" in page
    assert "Given by the user: desync, length." in page
    assert "desync                 0.25" in text


def test_the_command_line_finds_it_in_the_working_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text("def loudness(clip):\n    return clip.audio.std()\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", str(folder), "-o", "out", "--no-av-align"]
    result = CliRunner().invoke(app, [*arguments, "--metric", "my_metrics:loudness"])
    assert result.exit_code == 0, result.output
    assert all(0 < float(row["loudness"]) < 1 for row in rows(tmp_path / "out"))


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such", "math", "", ":", "math:pi"])
def test_a_wrong_name_is_named(name):
    with pytest.raises(ValueError, match=f"metric: expected .*'{name}'"):
        load_metric(name)


def test_a_column_that_is_there_already_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="expected names that are no columns yet, got f1"):
        evaluate_folder(folder, tmp_path, extra={"f1": lambda clip: 0.0}, progress=False)


X264 = {"crf": "15", "bf": "0", "preset": "ultrafast"}


def record(path, clip, times=None, codec="pcm_s16le"):
    """A Matroska file of the clip, its pictures on from `times` in seconds, its sound as it is."""
    times = np.arange(len(clip.video)) / clip.fps if times is None else times
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=30, options=X264)
        video.height, video.width = clip.video.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        sound = out.add_stream(codec, rate=clip.sample_rate, layout="mono")
        for picture, time in zip(clip.video.numpy(), times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            out.mux(video.encode(frame))
        samples = clip.audio.numpy()
        if codec == "pcm_s16le":
            samples = (samples * 32767).astype(np.int16)
        form = {"pcm_s16le": "s16", "pcm_f32le": "flt"}[codec]
        for start in range(0, samples.shape[1], 1024):
            chunk = np.ascontiguousarray(samples[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(chunk, format=form, layout="mono")
            frame.sample_rate, frame.pts = clip.sample_rate, start
            frame.time_base = Fraction(1, clip.sample_rate)
            out.mux(sound.encode(frame))
        out.mux(video.encode(None))
        out.mux(sound.encode(None))


def changing_rate():
    """(clip, times, instants): 30 pictures a second for 2 s, then 10; at each instant a picture
    that is bright comes on, and a click sounds."""
    times = np.concatenate([np.arange(60) / 30, 2 + np.arange(30) / 10])
    instants = np.array([0.5, 1.2, 1.8, 2.6, 3.4, 4.2])
    bright = (np.abs(times[:, None] - instants).min(1) < 0.005)[:, None, None, None]
    video = torch.from_numpy(np.where(bright, 220, 40)).expand(-1, 64, 64, 3).to(torch.uint8)
    audio = torch.zeros(1, 5 * 16_000)
    for instant in instants:
        start = round(instant * 16_000)
        audio[:, start : start + 32] = 0.8 * torch.hann_window(32)
    return Clip(video.contiguous(), 18.0, audio, 16_000), times, instants


def test_pictures_of_a_variable_rate_stand_at_their_own_times(tmp_path):
    clip, times, instants = changing_rate()
    (tmp_path / "clips").mkdir()
    record(tmp_path / "clips" / "a.mkv", clip, times)
    evaluate_folder(tmp_path / "clips", tmp_path, with_av_align=False, progress=False)
    figures = rows(tmp_path)[1]
    assert float(figures["f1_undetectable"]) == 1
    assert float(figures["seen_per_clip"]) == len(instants)
    assert float(figures["onset_error_ms"]) < 5
    assert abs(float(figures["offset_ms"])) < 5


def test_events_stand_at_the_instants_whatever_the_rate_between():
    clip, times, instants = changing_rate()
    found = cell_events(evaluation.picture_cells(clip.video), times)
    assert found == pytest.approx(instants, abs=0.002)


@pytest.mark.parametrize("fps", [10, 24, 30000 / 1001, 60])
def test_own_times_of_a_constant_rate_change_nothing(fps):
    video = render_clip(3).video
    jitter = np.random.default_rng(0).uniform(-5e-4, 5e-4, len(video))  # a container's rounding
    found = cell_events(evaluation.picture_cells(video), np.arange(len(video)) / fps + jitter)
    assert found == pytest.approx(picture_events(video, fps), abs=1e-3)
    assert len(found) > 1


def test_evaluate_measures_a_constant_rate_as_the_clip_itself(folder, tmp_path):
    evaluate_folder(folder, tmp_path, progress=False)
    for row, name in zip(rows(tmp_path)[1:], ("0.mp4", "1.mp4"), strict=True):
        clip = read_clip(folder / name)
        entry = evaluation.Evaluated(name, clip_metrics(clip), {"av_align": metrics.av_align(clip)})
        assert row == evaluation._formatted(entry.row(), evaluation.COLUMNS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("av_align", [True, False])
def test_sound_that_is_not_finite_is_refused_by_name(folder, tmp_path, value, av_align):
    clip = click_and_flash(1.0)
    broken = clip.audio.clone()
    broken[:, 5000:5010] = value
    clips = tmp_path / "clips"
    clips.mkdir()
    record(clips / "broken.mkv", replace(clip, audio=broken), codec="pcm_f32le")
    record(clips / "good.mkv", clip, codec="pcm_f32le")
    text = evaluate_folder(clips, tmp_path, with_av_align=av_align, progress=False)
    assert [row["clip"] for row in rows(tmp_path)] == ["all", "good.mkv"]
    assert "1 skipped:" in text
    (line,) = [line for line in text.splitlines() if "broken.mkv" in line]
    assert "NaN" in line


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_clip_of_few_pictures_has_figures(tmp_path, count):
    clip = click_and_flash(0.0)
    short = Clip(clip.video[:count], 24.0, clip.audio[:, : count * 667], 16_000)
    (tmp_path / "clips").mkdir()
    record(tmp_path / "clips" / "a.mkv", short)
    text = evaluate_folder(tmp_path / "clips", tmp_path, progress=False)
    assert "1 clips" in text


def test_whatever_one_file_does_to_its_reader_the_others_are_measured(
    folder, tmp_path, monkeypatch
):
    def odd(path, *arguments, **options):
        if path.name == "0.mp4":
            raise ZeroDivisionError("no\nrate")
        return decode(path, *arguments, **options)

    monkeypatch.setattr(evaluation, "decode", odd)
    text = evaluate_folder(folder, tmp_path, with_av_align=False, progress=False)
    assert [row["clip"] for row in rows(tmp_path)] == ["all", "1.mp4"]
    assert f"{folder / '0.mp4'}: cannot be read (ZeroDivisionError: no rate)" in text


def test_an_error_of_a_metric_of_ones_own_is_not_hidden(folder, tmp_path):
    with pytest.raises(ZeroDivisionError):
        evaluate_folder(folder, tmp_path, extra={"odd": lambda clip: 1 / 0}, progress=False)


def test_what_the_reader_had_to_choose_is_in_the_summary(folder, tmp_path, monkeypatch):
    def chose(*arguments, **options):
        return replace(decode(*arguments, **options), notes=("sound track 2 of 3 is read",))

    monkeypatch.setattr(evaluation, "decode", chose)
    text = evaluate_folder(folder, tmp_path, with_av_align=False, progress=False)
    assert "2 noted:" in text
    assert f"{folder / '1.mp4'}: sound track 2 of 3 is read" in text


PEAKS = """
import resource, sys
from pathlib import Path
from syncdpo.evaluation import evaluate_folder

for name in sys.argv[1:]:
    evaluate_folder(Path(name), Path(name, "out"), with_av_align=False, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_film(tmp_path):
    """72 pictures of 1080p more, of 6 MB each; what grows by is less than a tenth of them."""
    lengths = {"short": 12, "long": 84}
    for name, count in lengths.items():
        (tmp_path / name).mkdir()
        noise = torch.randint(0, 256, (1, 1080, 1920, 3), dtype=torch.uint8)
        video = noise.expand(count, -1, -1, -1)
        sound = 0.5 * torch.sin(torch.arange(count * 2000) * 0.1)[None]
        record(tmp_path / name / "a.mkv", Clip(video, 24.0, sound, 48_000))
    command = [sys.executable, "-c", PEAKS, *(str(tmp_path / name) for name in lengths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    short, long = (int(line) / 1024 for line in done.stdout.split())  # MiB
    assert long - short < 0.1 * 72 * 1080 * 1920 * 3 / 2**20
