"""Names that file systems allow and people use: read, or named in the summary with the reason."""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from recordings import click_and_flash
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data import items, latents
from syncdpo.data.clips import (
    EXTENSIONS,
    find_clips,
    list_clips,
    read_clips,
    write_clip,
)
from syncdpo.data.files import readable, reasons
from syncdpo.data.latents import LatentDataset
from syncdpo.demo.demonstration import DemoConfig, prepare_clips
from syncdpo.metrics import clip_metrics
from syncdpo.models import load_model

NOT_UTF8 = b"caf\xe9.mp4"
# ending → (container, codec of the picture, of the sound)
KINDS = {
    ".3g2": ("3g2", "libx264", "aac"),
    ".3gp": ("3gp", "libx264", "aac"),
    ".asf": ("asf", "wmv2", "wmav2"),
    ".f4v": ("f4v", "libx264", "aac"),
    ".flv": ("flv", "flv", "aac"),
    ".m2ts": ("mpegts", "libx264", "aac"),
    ".mpeg": ("mpeg", "mpeg2video", "mp2"),
    ".mpg": ("mpeg", "mpeg2video", "mp2"),
    ".mts": ("mpegts", "libx264", "ac3"),
    ".mxf": ("mxf", "mpeg2video", "pcm_s16le"),
    ".ogv": ("ogg", "libvpx", "libopus"),
    ".qt": ("mov", "libx264", "aac"),
    ".ts": ("mpegts", "mpeg2video", "mp2"),
    ".vob": ("vob", "mpeg2video", "ac3"),
    ".wmv": ("asf", "wmv2", "wmav2"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_clip(path, click_and_flash(1.0, rate=48_000))
    return path


def record(path, container, picture_codec, sound_codec, *, when=1.0, fps=25):
    """A flash and a click at `when` in a file of this kind, every picture with its own time."""
    clip = click_and_flash(when, fps=fps, rate=48_000, size=(96, 128))
    with av.open(f"file:{path}", "w", format=container) as out:
        video = out.add_stream(picture_codec, rate=fps)
        video.height, video.width, video.pix_fmt = 96, 128, "yuv420p"
        video.bit_rate = 2_000_000
        sound = out.add_stream(sound_codec, rate=48_000, layout="mono")
        sound.bit_rate = 128_000
        for k, picture in enumerate(clip.video.numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, fps)
            out.mux(video.encode(frame))
        size = sound.codec_context.frame_size or 1024
        samples = (clip.audio.numpy() * 32767).astype(np.int16)
        fifo = av.AudioFifo()
        whole = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        whole.sample_rate, whole.pts = 48_000, 0
        resampler = av.AudioResampler(sound.codec_context.format, "mono", 48_000)
        for frame in resampler.resample(whole):
            fifo.write(frame)
        while (frame := fifo.read(size, partial=True)) is not None:
            out.mux(sound.encode(frame))
        out.mux(video.encode(None))
        out.mux(sound.encode(None))


def folder_of_odd_names(folder, good):
    """Clips under names of all kinds → those that can be read, as shown."""
    names = [b"plain.mp4", b"CAPITAL.MP4", b"12:30 a:b.mp4", b"two\nlines.mp4", NOT_UTF8,
             b"-o.mp4", b"%d # ?.mp4", "雪 🙂.mp4".encode()]  # fmt: skip
    folder.mkdir()
    for name in names:
        shutil.copy(good, os.path.join(os.fsencode(folder), name))
    return {"plain.mp4", "CAPITAL.MP4", "12:30 a:b.mp4", r"two\nlines.mp4", r"caf\xe9.mp4",
            "-o.mp4", "%d # ?.mp4", "雪 🙂.mp4"}  # fmt: skip


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("ending", KINDS)
def test_every_ending_is_read_in_step_or_refused_for_its_timestamps(tmp_path, ending):
    path = tmp_path / f"clip{ending.upper() if ending == '.mts' else ending}"
    record(path, *KINDS[ending])
    assert list_clips(tmp_path) == [path]
    clips, skipped = read_clips([path])
    # PyAV's own ASF gives its pictures no timestamps; that of others does.
    assert bool(clips) or ending in (".asf", ".wmv")
    for clip in clips:
        found = clip_metrics(clip)
        assert found.seen == pytest.approx([1.0], abs=0.005)
        assert found.heard == pytest.approx([1.0], abs=0.007)
    for _, reason in skipped:
        assert "no timestamps" in reason


def test_all_endings_are_tried():
    """.ogm is an older name of .ogv; the others are in the tests of clips."""
    assert set(KINDS) | {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".ogm", ".webm"} == EXTENSIONS


def test_evaluate_reads_every_name(tmp_path, good, monkeypatch):
    shown = folder_of_odd_names(tmp_path / "clips", good)
    monkeypatch.chdir(tmp_path / "clips")  # a relative name begins with what looks as a protocol
    text = invoke("evaluate", ".", "-o", tmp_path / "out", "--no-av-align")
    assert "8 clips in ." in text
    assert "skipped" not in text
    rows = list(csv.DictReader((tmp_path / "out" / "clips.csv").open(encoding="utf-8")))
    assert {row["clip"] for row in rows} == shown | {"all"}
    assert all(row["offset_ms"] and abs(float(row["offset_ms"])) < 5 for row in rows)
    assert r"caf\xe9.mp4" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_prepare_reads_every_name_and_resumes(tmp_path, good, monkeypatch):
    shown = folder_of_odd_names(tmp_path / "clips", good)
    monkeypatch.chdir(tmp_path / "clips")
    out = tmp_path / "latents"
    assert "8 clips in the cache (8 made, 0 kept)" in invoke("prepare", ".", "-o", out)
    assert "8 clips in the cache (0 made, 8 kept)" in invoke("prepare", ".", "-o", out)
    assert {clip["source"] for clip in LatentDataset(out).clips} == shown


def test_a_caption_beside_a_name_that_is_not_utf8(tmp_path, good):
    folder_of_odd_names(tmp_path / "clips", good)
    caption = os.path.join(os.fsencode(tmp_path / "clips"), NOT_UTF8.replace(b".mp4", b".txt"))
    with open(caption, "w") as file:
        file.write("a cup of coffee")
    out = tmp_path / "latents"
    assert "7 without a caption" in invoke("prepare", tmp_path / "clips", "-o", out)
    captions = {clip["source"]: clip["caption"] for clip in LatentDataset(out).clips}
    assert captions[r"caf\xe9.mp4"] == "a cup of coffee"


def test_a_clip_is_written_under_a_name_with_a_colon(tmp_path, good, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("12:30.mp4", read_clips([good])[0][0])
    assert [path.name for path in tmp_path.iterdir()] == ["12:30.mp4"]
    assert len(read_clips(["12:30.mp4"])[0]) == 1


def odd_links(folder, good):
    """Links of all kinds → a word of the reason for each that is not read."""
    (folder / "real" / "deeper").mkdir(parents=True)
    shutil.copy(good, folder / "real" / "deeper" / "a.mp4")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(good, elsewhere / "b.mp4")
    (folder / "a linked folder").symlink_to(elsewhere)
    (folder / "linked.mp4").symlink_to(good)
    (folder / "a second name").symlink_to(folder / "real")
    (folder / "real" / "circle").symlink_to(folder)
    (folder / "gone.mp4").symlink_to("/nonexistent/gone.mp4")
    (folder / "round.mp4").symlink_to(folder / "round.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return {"a second name": "read under another name", "circle": "read under another name",
            "gone.mp4": "/nonexistent/gone.mp4, which is not there",
            "round.mp4": "which is not there", "pipe.mp4": "not a file"}  # fmt: skip


def test_links_are_followed_once_and_what_leads_nowhere_is_named(tmp_path, good):
    folder = tmp_path / "clips"
    reasons_of = odd_links(folder, good)
    paths, left = find_clips(folder)
    assert [str(path.relative_to(folder)) for path in paths] == [
        "a linked folder/b.mp4", "linked.mp4", "real/deeper/a.mp4"]  # fmt: skip
    assert {path.name for path, _ in left} == set(reasons_of)
    for path, reason in left:
        assert reasons_of[path.name] in reason


@pytest.mark.parametrize("command", ["evaluate", "prepare"])
def test_the_summary_names_what_was_not_read(tmp_path, good, command):
    reasons_of = odd_links(tmp_path / "clips", good)
    text = invoke(command, tmp_path / "clips", "-o", tmp_path / "out")
    assert "3 clips in" in text
    assert "5 skipped:" in text
    for name, reason in reasons_of.items():
        assert name in text
        assert reason in text


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, good, monkeypatch):
    shutil.copy(good, tmp_path / "good.mp4")
    (tmp_path / "locked").mkdir()
    listed = Path.iterdir

    def refuse(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert find_clips(tmp_path) == (
        [tmp_path / "good.mp4"],
        [(tmp_path / "locked", "a folder that cannot be opened (Permission denied)")],
    )


def test_the_demonstration_takes_them_too(tmp_path, good, capsys):
    folder_of_odd_names(tmp_path / "clips", good)
    odd_links(tmp_path / "more", good)
    (tmp_path / "clips" / "more").symlink_to(tmp_path / "more")
    clips = prepare_clips(DemoConfig(tmp_path / "demo", tmp_path / "clips", progress=False))
    assert len(clips.training) + len(clips.held_out) == 11
    assert "gone.mp4" in capsys.readouterr().out


def test_a_folder_whose_name_is_not_utf8(tmp_path, good):
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9")))
    folder_of_odd_names(folder, good)
    clips = prepare_clips(DemoConfig(tmp_path / "demo", folder, progress=False))
    assert len(clips.training) + len(clips.held_out) == 8
    assert r"8 clips in " in invoke("evaluate", folder, "-o", folder / "out", "--no-av-align")
    with pytest.raises(ValueError, match=r"out: expected a folder with a name in UTF-8, got .*xe9"):
        latents.prepare(load_model("tiny"), folder, folder / "latents", progress=False)


def test_a_folder_of_nothing_but_broken_links_says_so(tmp_path):
    (tmp_path / "gone.mp4").symlink_to("/nonexistent")
    for command in ("evaluate", "prepare"):
        result = CliRunner().invoke(app, [command, str(tmp_path), "-o", str(tmp_path / "out")])
        assert isinstance(result.exception, ValueError)
        assert "gone.mp4: a link to /nonexistent" in str(result.exception)


def test_a_terminal_without_utf8(tmp_path, good):
    """What a terminal cannot show is escaped; the command goes on."""
    folder_of_odd_names(tmp_path / "clips", good)
    (tmp_path / "clips" / "雪.mp4").write_text("no clip")
    command = [sys.executable, "-m", "syncdpo", "evaluate", str(tmp_path / "clips")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), "--no-av-align"],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert rb"\u96ea.mp4: damaged" in done.stdout


def test_prepare_names_what_a_reader_chose_or_did_not_survive(tmp_path, good, monkeypatch):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        shutil.copy(good, tmp_path / name)
    read = items.read_clip

    def odd(path, **options):
        if path.name == "a.mp4":
            raise ZeroDivisionError("no\nrate")
        return replace(read(path, **options), notes=("sound track 2 of 3 is read",))

    monkeypatch.setattr(items, "read_clip", odd)
    text = invoke("prepare", tmp_path, "-o", tmp_path / "latents")
    assert "2 clips in the cache" in text
    assert f"{tmp_path / 'a.mp4'}: cannot be read (ZeroDivisionError: no rate)" in text
    assert f"2 noted:\n  {tmp_path / 'b.mp4'}: sound track 2 of 3 is read" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(NOT_UTF8), r"caf\xe9.mp4"),
        ("a\nb\x1b[31m\x85\u2028.mp4", r"a\nb\x1b[31m\x85\u2028.mp4"),
        ("雪 é\u3000👩‍🚀 C:\\x.mp4", "雪 é\u3000👩‍🚀 C:\\x.mp4"),
    ],
)
def test_readable_names(name, shown):
    assert readable(name) == shown


def test_many_files_with_one_reason_are_one_line():
    short = [(Path(f"{k}.mp4"), f"0.{k}0 s long, shorter than the 2 s asked") for k in range(3)]
    silent = [(Path(f"s{k}.mp4"), "silent") for k in range(4)]
    few = [(Path("x.mp4"), "empty file"), (Path("y.mp4"), "empty file")]
    assert reasons([short[0], *few, *silent, *short[1:]]) == [
        "  3 files: … s long, shorter than the … s asked",
        "    0.mp4",
        "    1.mp4",
        "    2.mp4",
        "  x.mp4: empty file",
        "  y.mp4: empty file",
        "  4 files: silent",
        "    s0.mp4",
        "    s1.mp4",
        "    s2.mp4",
        "    s3.mp4",
    ]
