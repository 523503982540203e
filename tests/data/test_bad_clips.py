"""Broken files, files without a clip, clips that cannot be written: each named with its reason."""

import pickle
from pathlib import Path

import av
import pytest
import torch
from recordings import RATE, click_and_flash

from syncdpo.data.clips import (
    Clip,
    ClipError,
    is_silent,
    list_clips,
    read_clip,
    read_clips,
    reading_summary,
    write_clip,
)


@pytest.fixture
def clip():
    return click_and_flash(1.0)


def bad_files(folder: Path, clip: Clip) -> dict[str, str]:
    """name → a word of the reason that its reader must give."""
    write_clip(folder / "good.mp4", clip)
    whole = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "stub.mp4").write_bytes(whole[:1000])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("These are words, not pictures.\n" * 50)
    write_clip(folder / "silent.mp4", Clip(clip.video, 24.0, torch.zeros_like(clip.audio), RATE))
    write_clip(folder / "short.mp4", click_and_flash(0.2, seconds=0.5))
    for kept in ("video", "audio"):
        with av.open(str(folder / "good.mp4")) as source, \
                av.open(str(folder / f"{kept}-only.mp4"), "w") as out:  # fmt: skip
            stream = getattr(source.streams, kept)[0]
            copy = out.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    out.mux(packet)
    return {"cut.mp4": "truncated", "stub.mp4": "truncated", "empty.mp4": "empty",
            "text.mp4": "not a media file", "silent.mp4": "silent", "short.mp4": "shorter",
            "video-only.mp4": "no sound", "audio-only.mp4": "no pictures"}  # fmt: skip


def test_every_broken_file_is_skipped_with_its_reason(tmp_path):
    time = torch.arange(2 * RATE) / RATE
    noisy = torch.rand(48, 64, 64, 3, generator=torch.Generator().manual_seed(0)) * 255
    clip = Clip(noisy.to(torch.uint8), 24.0, 0.5 * torch.sin(2764 * time)[None], RATE)
    reasons = bad_files(tmp_path, clip)
    asked = []

    def progress(paths):
        for path in paths:
            asked.append(path)
            yield path

    clips, skipped = read_clips(list_clips(tmp_path), progress=progress, seconds=1.0)
    assert len(clips) == 1
    assert len(asked) == 1 + len(reasons)
    assert {path.name for path, _ in skipped} == set(reasons)
    for path, reason in skipped:
        assert reasons[path.name] in reason
        assert "\n" not in reason
    summary = reading_summary(len(clips), skipped)
    assert summary.startswith("Read 1 of 9 clips, skipped 8: ")
    assert all(name in summary for name in reasons)
    assert reading_summary(3, []) == "Read all 3 clips."


def test_truncation_at_any_point_is_noticed(tmp_path, clip):
    noise = torch.rand(48, 64, 64, 3, generator=torch.Generator().manual_seed(0)) * 255
    write_clip(tmp_path / "a.mp4", Clip(noise.to(torch.uint8), 24.0, clip.audio, RATE))
    whole = (tmp_path / "a.mp4").read_bytes()
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.8):
        (tmp_path / "b.mp4").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ClipError):
            read_clip(tmp_path / "b.mp4")


def test_missing_file_and_error_that_travels(tmp_path):
    with pytest.raises(ClipError, match="no such file") as caught:
        read_clip(tmp_path / "none.mp4")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.reason) == (tmp_path / "none.mp4", "no such file")
    assert str(again) == f"{tmp_path / 'none.mp4'}: no such file"


def test_silence():
    assert is_silent(torch.full((2, 100), 0.3))
    assert is_silent(torch.zeros(1, 0))
    assert not is_silent(torch.tensor([[0.0, 0.01]]))


def test_list_clips(tmp_path):
    for name in ("b.mp4", "a/c.MOV", "a/d.txt", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_clips(tmp_path) == [tmp_path / "a/c.MOV", tmp_path / "b.mp4"]
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        list_clips(tmp_path / "b.mp4")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"video": torch.zeros(2, 4, 4, 3)}, TypeError, "video: expected torch.uint8"),
        ({"video": torch.zeros(4, 4, 3, dtype=torch.uint8)}, ValueError, "T,H,W,3"),
        ({"audio": torch.zeros(8, dtype=torch.float32)}, ValueError, "C,N"),
        ({"audio": torch.zeros(1, 8, dtype=torch.int16)}, TypeError, "audio: expected"),
        ({"fps": 0.0}, ValueError, "fps: expected a positive"),
        ({"sample_rate": -1}, ValueError, "sample_rate: expected a positive"),
    ],
)
def test_clip_checks(clip, change, error, words):
    fields = {"video": clip.video, "fps": 24.0, "audio": clip.audio, "sample_rate": RATE}
    with pytest.raises(error, match=words):
        Clip(**fields | change)


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (click_and_flash(0.2, seconds=0.5, size=(63, 64)), "even"),
        (click_and_flash(0.2, seconds=0.5, channels=3), "1 or 2 channels"),
        (click_and_flash(0.2, seconds=0.5, rate=17_000), "expected one of"),
        (Clip(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), 24.0, torch.full((1, 9), torch.nan),
              RATE), "finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, clip, words):
    with pytest.raises(ValueError, match=words):
        write_clip(tmp_path / "a.mp4", clip)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["seconds", "fps", "sample_rate", "channels"])
def test_options_must_be_positive(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}: expected a positive number, got 0"):
        read_clip(tmp_path / "a.mp4", **{option: 0})
