import errno
import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from syncdpo.data import files, items
from syncdpo.data.captions import read_captions
from syncdpo.data.clips import Clip, write_clip
from syncdpo.data.latents import LatentDataset, prepare


@dataclass(frozen=True)
class Format:
    seconds: float = 0.5
    fps: float = 8.0
    height: int = 32
    width: int = 32
    sample_rate: int = 8000
    channels: int = 1


class Model:
    """The part of the protocol that `prepare` knows: means of picture and sound as latents."""

    clip_format = Format()

    def __init__(self, name: str = "means", delay: float = 0.0):
        self.name, self.delay = name, delay

    def identity(self) -> dict:
        return {"video_vae": self.name, "fps": self.clip_format.fps}

    def encode(self, clip: Clip, caption: str) -> dict:
        time.sleep(self.delay)
        return {
            "video": clip.video.float().mean((1, 2)),
            "audio": clip.audio.reshape(-1, 100).mean(1, keepdim=True).to(torch.bfloat16),
            "prompt": torch.tensor([ord(c) for c in caption], dtype=torch.int64),
        }


def make_clip(seed: int, seconds: float = 0.5) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    format_ = Format()
    frames, samples = round(seconds * format_.fps), round(seconds * format_.sample_rate)
    picture = torch.rand(1, 3, 4, 4, generator=generator)
    picture = torch.nn.functional.interpolate(picture, (format_.height, format_.width))
    brightness = torch.linspace(0.5, 1, frames)[:, None, None, None]
    video = (picture.movedim(1, -1) * brightness * 255).to(torch.uint8)
    audio = 0.2 * torch.rand(1, samples, generator=generator) - 0.1
    return Clip(video, format_.fps, audio, format_.sample_rate)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for index in range(8):
        path = root / ("ab"[index % 2]) / f"{index}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_clip(path, make_clip(index))
        path.with_suffix(".txt").write_text(f"clip number {index}\n")
    return root


def content(cache: Path) -> dict[str, bytes]:
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory) -> dict[str, bytes]:
    """The content of an undisturbed cache."""
    out = tmp_path_factory.mktemp("whole")
    prepare(Model(), folder, out, captions=read_captions(folder), progress=False)
    return content(out)


def test_cache_holds_what_the_model_encoded(folder, tmp_path):
    summary = prepare(Model(), folder, tmp_path, captions=read_captions(folder), progress=False)
    assert (summary.made, summary.kept, summary.skipped) == (8, 0, [])
    dataset = LatentDataset(tmp_path, Model().identity())
    assert [clip["source"] for clip in dataset.clips] == [f"a/{i}.mp4" for i in (0, 2, 4, 6)] + [
        f"b/{i}.mp4" for i in (1, 3, 5, 7)
    ]
    item = dataset[1]
    assert "".join(map(chr, item["prompt"].tolist())) == dataset.clips[1]["caption"]
    assert item["prompt"].tolist() == [ord(c) for c in "clip number 2"]
    decoded = items.decode_clip(folder / "a" / "2.mp4", Format())
    torch.testing.assert_close(item["video"], decoded.video.float().mean((1, 2)), rtol=0, atol=0)
    assert item["audio"].dtype == torch.bfloat16


def test_a_second_run_encodes_nothing(folder, tmp_path, whole):
    captions = read_captions(folder)
    prepare(Model(), folder, tmp_path, captions=captions, progress=False)

    class Refuses(Model):
        def encode(self, clip, caption):
            raise AssertionError("encoded twice")

    summary = prepare(Refuses(), folder, tmp_path, captions=captions, progress=False)
    assert (summary.made, summary.kept) == (0, 8)
    assert content(tmp_path) == whole


def test_a_changed_caption_or_source_is_encoded_again(folder, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for index in range(3):
        write_clip(clips / f"{index}.mp4", make_clip(index))
    captions = {f"{index}.mp4": "before" for index in range(3)}
    prepare(Model(), clips, tmp_path / "cache", captions=captions, progress=False)
    captions["1.mp4"] = "after"
    write_clip(clips / "2.mp4", make_clip(9))
    summary = prepare(Model(), clips, tmp_path / "cache", captions=captions, progress=False)
    assert (summary.made, summary.kept) == (2, 1)
    assert LatentDataset(tmp_path / "cache").clips[1]["caption"] == "after"


def alone() -> None:
    """For a child that was forked: tqdm's lock is shared with the parent, who would wait for ever
    for one that was killed while it held it."""
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)


def kill_somewhere(folder: Path, out: Path, delay: float) -> bool:
    """Runs `prepare` in a child and kills it after `delay` seconds; whether it was still at it."""
    child = os.fork()
    if child == 0:
        alone()
        status = 1
        try:
            captions = read_captions(folder)
            prepare(Model(delay=0.01), folder, out, captions=captions, progress=False)
            status = 0
        finally:
            os._exit(status)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_twenty_times_it_resumes_to_the_same_content(folder, tmp_path, whole):
    generator, interrupted = random.Random(0), 0
    for attempt in range(20):
        interrupted += kill_somewhere(folder, tmp_path, generator.uniform(0, 0.06))
        for path in tmp_path.rglob("*.safetensors"):
            assert path.read_bytes() == whole[path.relative_to(tmp_path).as_posix()]
        if attempt % 5 == 4:  # start from nothing now and then, so that every stage is hit
            summary = prepare(
                Model(), folder, tmp_path, captions=read_captions(folder), progress=False
            )
            assert summary.usable == 8
            assert content(tmp_path) == whole
            for path in tmp_path.rglob("*.safetensors"):
                path.unlink()
    assert interrupted >= 10


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_while_writing_no_half_file_is_left(folder, tmp_path, whole, moment):
    child = os.fork()
    if child == 0:
        alone()
        calls, genuine = iter(range(100)), getattr(os, moment)

        def die(*arguments):
            if next(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine(*arguments)

        setattr(os, moment, die)
        try:
            prepare(Model(), folder, tmp_path, captions=read_captions(folder), progress=False)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    for path in tmp_path.rglob("*.safetensors"):
        load_file(path)
    prepare(Model(), folder, tmp_path, captions=read_captions(folder), progress=False)
    assert content(tmp_path) == whole


def test_shards_make_the_same_cache_as_one_process(folder, tmp_path, whole):
    captions = read_captions(folder)
    children = []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            alone()
            status = 1
            try:
                prepare(
                    Model(), folder, tmp_path, captions=captions, shard=(rank, 3), progress=False
                )
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert content(tmp_path) == whole


def test_a_file_swept_while_it_is_written_is_written_again(tmp_path, monkeypatch):
    genuine, swept = os.replace, []

    def replace(source, target):
        if not swept:
            swept.append(source)
            files.remove_leftovers(tmp_path)
        genuine(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    files.write_atomic(tmp_path / "file", b"content")
    assert swept
    assert content(tmp_path) == {"file": b"content"}


def test_a_full_disk_stops_cleanly_and_resumes(folder, tmp_path, whole, monkeypatch):
    genuine, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if 8 < len(written) < 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    captions = read_captions(folder)
    with pytest.raises(OSError, match=r"disk is full after 3 of 8 clips.*run the same command"):
        prepare(Model(), folder, tmp_path, captions=captions, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    summary = prepare(Model(), folder, tmp_path, captions=captions, progress=False)
    assert (summary.made, summary.kept) == (5, 3)
    assert content(tmp_path) == whole


def test_unusable_files_are_named_with_their_reason(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "good.mp4", make_clip(0))
    write_clip(clips / "short.mp4", make_clip(1, seconds=0.25))
    silent = make_clip(1)
    write_clip(clips / "silent.mp4", Clip(silent.video, silent.fps, silent.audio * 0, 8000))
    (clips / "text.mp4").write_text("not a film")
    (clips / "empty.mp4").touch()
    whole_file = (clips / "good.mp4").read_bytes()
    (clips / "truncated.mp4").write_bytes(whole_file[: len(whole_file) // 2])
    summary = prepare(Model(), clips, tmp_path / "cache", captions={}, progress=False)
    assert summary.made == 1
    reasons = {path.name: reason for path, reason in summary.skipped}
    assert sorted(reasons) == [
        f"{name}.mp4" for name in ("empty", "short", "silent", "text", "truncated")
    ]
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert [path.name for path in summary.without_caption][:1] == ["empty.mp4"]
    assert "5 skipped" in str(summary)
    assert "6 without a caption" in str(summary)
    assert len(LatentDataset(tmp_path / "cache")) == 1


def test_no_usable_clip_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no clips found"):
        prepare(Model(), tmp_path, tmp_path / "cache", progress=False)
    (tmp_path / "text.mp4").write_text("not a film")
    with pytest.raises(ValueError, match="none of 1 can be used"):
        prepare(Model(), tmp_path, tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="lists no clips"):
        LatentDataset(tmp_path / "cache")


def test_nan_latents_are_skipped(folder, tmp_path):
    class Broken(Model):
        def encode(self, clip, caption):
            found = super().encode(clip, caption)
            if caption.endswith("3"):
                found["audio"][0] = float("nan")
            return found

    summary = prepare(Broken(), folder, tmp_path, captions=read_captions(folder), progress=False)
    assert summary.made == 7
    assert summary.skipped == [(folder / "b" / "3.mp4", "its audio came out NaN or infinite")]


def test_strict_leaves_flagged_winners_out(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "good.mp4", make_clip(0))
    first, second = make_clip(2), make_clip(3)
    joined = torch.cat([first.video[:2], second.video[:2]])
    write_clip(clips / "cut.mp4", Clip(joined, first.fps, first.audio, first.sample_rate))
    for strict, used in (
        (True, ["good.mp4"]),
        (False, ["cut.mp4", "good.mp4"]),
        (True, ["good.mp4"]),
    ):
        summary = prepare(Model(), clips, tmp_path / "cache", strict=strict, progress=False)
        faulty = summary.skipped if strict else summary.flagged
        assert faulty == [(clips / "cut.mp4", "cut at 0.25 s")]
        assert [c["source"] for c in LatentDataset(tmp_path / "cache").clips] == used


def test_a_cache_of_another_model_is_refused(folder, tmp_path):
    prepare(Model(), folder, tmp_path, progress=False)
    with pytest.raises(ValueError, match="video_vae is means in the cache, others here"):
        LatentDataset(tmp_path, Model("others").identity())
    with pytest.raises(ValueError, match="video_vae is means in the cache, others here"):
        prepare(Model("others"), folder, tmp_path, progress=False)
    with pytest.raises(ValueError, match="expected a latent cache with an index"):
        LatentDataset(folder)


def test_a_damaged_file_is_named_and_made_again(folder, tmp_path, whole):
    captions = read_captions(folder)
    prepare(Model(), folder, tmp_path, captions=captions, progress=False)
    dataset = LatentDataset(tmp_path)
    path = tmp_path / "latents" / dataset.clips[2]["file"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is missing or damaged"):
        dataset[2]
    summary = prepare(Model(), folder, tmp_path, captions=captions, progress=False)
    assert (summary.made, summary.kept) == (1, 7)
    assert content(tmp_path) == whole


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0)])
def test_a_bad_shard_is_refused(folder, tmp_path, shard):
    with pytest.raises(ValueError, match="shard: expected"):
        prepare(Model(), folder, tmp_path, shard=shard, progress=False)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_captions_from_a_table(folder, kind):
    rows = [
        {"media_path": str(folder / "a" / "0.mp4"), "caption": "by its absolute path"},
        {"media_path": "b/1.mp4", "caption": "by its relative path, with a comma"},
    ]
    table = folder.parent / f"captions.{kind}"
    if kind == "csv":
        lines = ["media_path,caption", *(f'{r["media_path"]},"{r["caption"]}"' for r in rows)]
        table.write_text("\n".join(lines))
    elif kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        table.write_text(json.dumps(rows))
    assert read_captions(folder, table) == {
        "a/0.mp4": "by its absolute path",
        "b/1.mp4": "by its relative path, with a comma",
    }


def test_a_table_without_captions_is_refused(tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("name,words\na.mp4,hello\n")
    with pytest.raises(ValueError, match="expected one of the columns media_path"):
        read_captions(tmp_path, table)
    table = tmp_path / "captions.txt"
    table.write_text("hello")
    with pytest.raises(ValueError, match=r"expected a \.csv"):
        read_captions(tmp_path, table)
