"""Pairs of clips from disk: both in one format, their text once, resumed, and never mixed up."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from recordings import click_and_flash
from safetensors.torch import load_file
from tqdm import tqdm
from typer.testing import CliRunner

from syncdpo.cli import app, main
from syncdpo.data.buckets import Bucket, mixed_identity
from syncdpo.data.captions import read_captions
from syncdpo.data.clips import Clip, ClipFormat, read_clip, write_clip
from syncdpo.data.items import decode_clip
from syncdpo.data.latents import LatentDataset, prepare
from syncdpo.data.pairs import match_folders, prepare_pairs, read_pairs
from syncdpo.data.synthetic import render, render_clip
from syncdpo.training.checkpoint import read_log

FPS, RATE = 24.0, 16_000
LONG, SHORT, TALL = (Bucket(*size, FPS) for size in ((41, 32, 64), (17, 32, 64), (17, 64, 32)))


class Model:
    """Means of picture and sound as latents, in any format."""

    def __init__(self, name="means", delay=0.0):
        self.name, self.delay = name, delay
        self.set_format(*SHORT)

    def set_format(self, frames, height, width, fps):
        self.clip_format = ClipFormat(frames / fps, fps, height, width, RATE, 1)
        self.timelines = (SimpleNamespace(frames=frames), None)

    def identity(self):
        return {"video_vae": self.name} | vars(self.clip_format)

    def encode(self, clip, caption):
        time.sleep(self.delay)
        return {
            "video": clip.video.float().mean((1, 2)),
            "audio": clip.audio.mean(0, keepdim=True),
            "prompt": torch.tensor([ord(c) for c in caption]),
        }


def pair(index, *, seconds=1.0, same_picture=False):
    """A click with its flash, and another one, or another sound to the same picture."""
    win = click_and_flash((2 + index) / FPS, seconds=seconds, size=(32, 64))
    late = click_and_flash((9 + index) / FPS, seconds=seconds, size=(32, 64))
    lose = Clip(win.video, win.fps, late.audio, late.sample_rate) if same_picture else late
    return win, lose


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs, two of which share the picture, and a table of them."""
    root = tmp_path_factory.mktemp("pairs")
    rows = ["win,lose,caption"]
    for index in range(6):
        for side, clip in zip(("good", "bad"), pair(index, same_picture=index < 2), strict=True):
            (root / side).mkdir(exist_ok=True)
            write_clip(root / side / f"{index}.mp4", clip)
        rows.append(f"good/{index}.mp4,bad/{index}.mp4,pair {index}")
    (root / "PAIRS.csv").write_text("\n".join(rows))
    return root


def prepared(table, out, model=None, **options):
    return prepare_pairs(model or Model(), read_pairs(table), out, progress=False, **options)


def content(cache):
    return {p.relative_to(cache): p.read_bytes() for p in cache.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    summary = prepared(folder / "PAIRS.csv", out)
    assert (summary.made, summary.kept, summary.skipped) == (6, 0, [])
    assert str(summary).startswith("6 pairs in the cache (6 made, 0 kept)")
    return out


# --- what is in it --------------------------------------------------------------------------------


def test_it_holds_what_the_model_makes_of_both_clips(folder, whole):
    data = LatentDataset(whole, Model().identity())
    assert data.pairs
    assert data.names == [f"good/{i}.mp4" for i in range(6)]
    for index, item in enumerate(data):
        assert item.keys() == {"video", "audio", "prompt", "video_lose", "audio_lose"}
        assert "".join(map(chr, item["prompt"].tolist())) == f"pair {index}"
        for side, suffix in (("good", ""), ("bad", "_lose")):
            clip = decode_clip(folder / side / f"{index}.mp4", Model().clip_format)
            expected = Model().encode(clip, "")
            assert torch.equal(item[f"video{suffix}"], expected["video"])
            assert torch.equal(item[f"audio{suffix}"], expected["audio"])
        assert torch.equal(item["video"], item["video_lose"]) == (index < 2)


def test_what_both_share_is_on_disk_once(whole):
    shared = {clip["win"]: clip["shared"] for clip in LatentDataset(whole).clips}
    assert shared == {f"good/{i}.mp4": ["video"] if i < 2 else [] for i in range(6)}
    for clip in LatentDataset(whole).clips:
        names = load_file(whole / "latents" / clip["file"]).keys()
        assert ("video_lose" in names) == (not clip["shared"])
        assert names >= {"video", "audio", "prompt", "audio_lose"}


def test_where_every_pair_shares_the_picture_no_item_has_it_twice(folder, tmp_path):
    rows = (folder / "PAIRS.csv").read_text().splitlines()[:3]
    table = folder / "shared.csv"
    table.write_text("\n".join(rows))
    prepared(table, tmp_path)
    assert all("video_lose" not in item for item in LatentDataset(tmp_path))


def test_winners_alone(whole):
    data = LatentDataset(whole)
    data.losers = False
    assert data[3].keys() == {"video", "audio", "prompt"}


# --- which pairs ----------------------------------------------------------------------------------


def test_unusable_pairs_are_named_with_the_reason(folder, tmp_path):
    write_clip(folder / "short.mp4", pair(0, seconds=0.4)[0])
    silent = pair(1)[1]
    silent = Clip(silent.video, silent.fps, torch.zeros_like(silent.audio), silent.sample_rate)
    write_clip(folder / "silent.mp4", silent)
    rows = [
        "good/0.mp4,bad/0.mp4", "good/1.mp4,missing.mp4", "missing.mp4,bad/1.mp4",
        "good/2.mp4,good/2.mp4", "good/3.mp4,short.mp4", "short.mp4,bad/3.mp4",
        "silent.mp4,bad/4.mp4", "good/4.mp4,silent.mp4", "good/5.mp4,", "good/0.mp4,bad/0.mp4",
    ]  # fmt: skip
    (folder / "odd.csv").write_text("win,lose\n" + "\n".join(rows))
    summary = prepared(folder / "odd.csv", tmp_path)
    reasons = [(path.name, reason) for path, reason in summary.skipped]
    assert sorted(reasons) == sorted(
        [
            ("odd.csv", "row 9 names no winner or no loser"),
            ("odd.csv", "row 10 names good/0.mp4 and bad/0.mp4 again"),
            ("1.mp4", "its loser missing.mp4: no such file"),
            ("missing.mp4", "no such file"),
            ("2.mp4", "its loser good/2.mp4 has the same pictures and sound"),
            ("3.mp4", "its loser short.mp4: 0.42 s long, shorter than the 0.708333 s asked"),
            ("short.mp4", "0.42 s long, shorter than the 0.708333 s asked"),
            ("silent.mp4", "silent"),
        ]
    )
    # A loser may be silent: that may be what is wrong with it.
    assert [clip["lose"] for clip in LatentDataset(tmp_path).clips] == ["bad/0.mp4", "silent.mp4"]
    assert "no captions: none of the pairs has one" in str(summary)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "win,caption\nx,y",
            "pairs: expected the columns win and lose .* without lose",
        ),
        ("a.txt", "win,lose", "pairs: expected a .csv, .jsonl or .json file"),
        ("a.json", '{"win": 1}', "pairs: expected one object per row"),
        ("a.csv", "win,lose\n", "pairs: expected one at least, got none"),
        ("a.csv", "win,lose\nx.mp4,y.mp4\n", "pairs: none of 1 can be used\n(.|\n)*no such file"),
    ],
)
def test_a_table_that_is_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / name, tmp_path / "out")


def test_two_folders_with_the_same_names(folder, tmp_path, whole):
    """As a table, whose captions are now a file beside each winner."""
    for side in ("good", "bad"):
        (tmp_path / side / "deep").mkdir(parents=True)
        for index in range(3):
            target = tmp_path / side / "deep" / f"{index}.mp4"
            target.write_bytes((folder / side / f"{index}.mp4").read_bytes())
            (tmp_path / "good" / "deep" / f"{index}.txt").write_text(f"pair {index}\n")
    (tmp_path / "bad" / "deep" / "2.mp4").rename(tmp_path / "bad" / "other.mp4")
    captions = read_captions(tmp_path / "good")
    listed = match_folders(tmp_path / "good", tmp_path / "bad", captions)
    summary = prepare_pairs(Model(), listed, tmp_path / "out", progress=False)
    assert [(p.name, why) for p, why in summary.skipped] == [
        ("2.mp4", "no loser of that name"),
        ("other.mp4", "no winner of that name"),
    ]
    data, expected = LatentDataset(tmp_path / "out"), LatentDataset(whole)
    assert data.names == ["deep/0.mp4", "deep/1.mp4"]
    assert [clip["caption"] for clip in data.clips] == ["pair 0", "pair 1"]
    for item, other in zip(data, expected, strict=False):
        assert all(torch.equal(item[name], other[name]) for name in item)


def test_both_go_into_the_bucket_that_both_fill(tmp_path):
    """A long winner with a short loser, and a tall loser of a wide winner."""
    write_clip(tmp_path / "long.mp4", pair(0, seconds=2.0)[0])
    write_clip(tmp_path / "long2.mp4", pair(1, seconds=2.0)[1])
    write_clip(tmp_path / "short.mp4", pair(2)[1])
    write_clip(tmp_path / "tall.mp4", click_and_flash(0.2, seconds=1.0, size=(64, 32)))
    rows = ["long.mp4,long2.mp4", "long.mp4,short.mp4", "short.mp4,long.mp4", "tall.mp4,long.mp4"]
    (tmp_path / "PAIRS.csv").write_text("\n".join(["win,lose", *rows]))
    buckets = [LONG, SHORT, TALL]
    summary = prepared(tmp_path / "PAIRS.csv", tmp_path / "out", buckets=buckets)
    assert summary.buckets == {LONG: 1, SHORT: 2, TALL: 1}
    data = LatentDataset(tmp_path / "out", mixed_identity(Model(), buckets))
    assert data.buckets == [LONG, SHORT, SHORT, TALL]
    for item, bucket in zip(data, data.buckets, strict=True):
        assert len(item["video"]) == len(item["video_lose"]) == bucket.frames
    format_ = ClipFormat(SHORT.seconds, FPS, SHORT.height, SHORT.width, RATE, 1)
    expected = Model().encode(decode_clip(tmp_path / "long.mp4", format_), "")
    assert torch.equal(data[1]["video"], expected["video"])


def test_strict_looks_at_winners_alone(tmp_path):
    for name, offset in (("in", 0.0), ("late", 0.4)):
        write_clip(tmp_path / f"{name}.mp4", render(3, offset=offset).clip)
    (tmp_path / "PAIRS.csv").write_text("win,lose\nin.mp4,late.mp4\nlate.mp4,in.mp4\n")
    model = Model()
    model.set_format(48, 64, 64, FPS)
    summary = prepared(tmp_path / "PAIRS.csv", tmp_path / "out", model, strict=True)
    assert summary.made == 1
    [(path, reason)] = summary.skipped
    assert path.name == "late.mp4"
    assert "its sound lags by" in reason


# --- resumed, and never mixed up ------------------------------------------------------------------


def test_a_second_run_encodes_nothing_and_a_changed_loser_or_caption_again(folder, tmp_path, whole):
    class Counts(Model):
        encoded = 0

        def encode(self, clip, caption):
            Counts.encoded += 1
            return super().encode(clip, caption)

    table = tmp_path / "PAIRS.csv"
    table.write_text((folder / "PAIRS.csv").read_text())
    for side in ("good", "bad"):
        (tmp_path / side).mkdir()
        for path in (folder / side).glob("*.mp4"):
            (tmp_path / side / path.name).write_bytes(path.read_bytes())
    prepared(table, tmp_path / "out", Counts())
    assert Counts.encoded == 12
    assert prepared(table, tmp_path / "out", Counts()).kept == 6
    assert Counts.encoded == 12
    write_clip(tmp_path / "bad" / "4.mp4", pair(7)[1])
    table.write_text(table.read_text().replace("pair 1", "another"))
    assert prepared(table, tmp_path / "out", Counts()).made == 2
    assert Counts.encoded == 16
    assert LatentDataset(tmp_path / "out").clips[1]["caption"] == "another"


def test_killed_it_resumes_to_the_same_content(folder, tmp_path, whole):
    killed = 0
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            tqdm.set_lock(threading.RLock())
            torch.set_num_threads(1)
            try:
                prepared(folder / "PAIRS.csv", tmp_path, Model(delay=0.02))
            finally:
                os._exit(0)
        time.sleep(0.02 + 0.04 * attempt)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed >= 3
    prepared(folder / "PAIRS.csv", tmp_path)
    assert content(tmp_path) == content(whole)


def test_shards_make_one_cache(folder, tmp_path, whole):
    for rank in range(2):
        prepared(folder / "PAIRS.csv", tmp_path, shard=(rank, 2))
    assert content(tmp_path) == content(whole)


def test_other_models_triggers_and_kinds_are_refused(folder, whole, tmp_path):
    with pytest.raises(ValueError, match="video_vae is means in the cache, other here"):
        prepared(folder / "PAIRS.csv", whole, Model("other"))
    with pytest.raises(ValueError, match="trigger is not recorded in the cache, sks here"):
        prepared(folder / "PAIRS.csv", whole, trigger="sks")
    with pytest.raises(ValueError, match="pairs is True in the cache, none here"):
        prepare(Model(), folder / "good", whole, progress=False)
    prepare(Model(), folder / "good", tmp_path, progress=False)
    with pytest.raises(ValueError, match="pairs is not recorded in the cache, True here"):
        prepared(folder / "PAIRS.csv", tmp_path)
    with pytest.raises(ValueError, match="prepared with another model"):
        LatentDataset(whole, Model("other").identity())


def test_a_damaged_file_names_the_command(folder, tmp_path):
    prepared(folder / "PAIRS.csv", tmp_path)
    victim = next((tmp_path / "latents").iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"1 of 6 files .*; run `syncdpo prepare-pairs` again"):
        LatentDataset(tmp_path)


def test_the_trigger_stands_before_the_caption(folder, tmp_path):
    prepared(folder / "PAIRS.csv", tmp_path, trigger="sks")
    data = LatentDataset(tmp_path, Model().identity())
    assert "".join(map(chr, data[2]["prompt"].tolist())) == "sks pair 2"


# --- by the command line --------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Clips in time, and the same with their sound late, for tiny."""
    root = tmp_path_factory.mktemp("rendered")
    for side, offset in (("good", 0.0), ("bad", 0.3)):
        (root / side).mkdir()
        for seed in range(3):
            write_clip(root / side / f"{seed}.mp4", render(seed, offset=offset).clip)
    return root


def test_prepare_pairs_and_train(rendered, tmp_path):
    folders = ("--win", rendered / "good", "--lose", rendered / "bad")
    assert "3 pairs in the cache" in invoke("prepare-pairs", *folders, "-o", tmp_path / "pairs")
    settings = ("--data", tmp_path / "pairs", "--steps", 2, "--batch-size", 2)
    shown = invoke("train", "--method", "dpo", *settings, "--output", tmp_path / "run")
    assert "2 steps" in shown
    assert all(row["valid"] == 1 for row in read_log(tmp_path / "run"))
    cache = LatentDataset(tmp_path / "pairs")
    assert [clip["shared"] for clip in cache.clips] == [["video"]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare-pairs"], "expected a table, or both --win and --lose"),
        (["prepare-pairs", "--win", "{good}"], "expected a table, or both --win and --lose"),
        (["prepare-pairs", "x.csv", "--win", "{good}"], "expected a table, or both"),
        (["prepare-pairs", "x.csv", "--captions", "y.csv"], "expected as a column of x.csv"),
        (["prepare-pairs", "missing.csv"], "missing.csv"),
        (["prepare-pairs", "--win", "{good}", "--lose", "{out}/no"], "lose: expected a folder"),
        (["train", "--method", "dpo", "--data", "{out}/clips", "--output", "{out}/run"],
         "data: expected a cache of pairs for method: dpo, as `syncdpo prepare-pairs` makes one"),
        (["train", "--method", "dpo", "--rules", "shift"], "rules: expected none with method: dpo"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend(rendered, tmp_path, monkeypatch, capsys, arguments, message):
    clip = render_clip(0)
    (tmp_path / "one").mkdir()
    write_clip(tmp_path / "one" / "0.mp4", clip)
    invoke("prepare", tmp_path / "one", "-o", tmp_path / "clips")
    filled = [a.format(good=rendered / "good", out=tmp_path) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["syncdpo", *filled])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert "Traceback" not in error


def test_one_winner_may_have_several_losers(rendered, tmp_path):
    rows = [f"good/0.mp4,bad/{seed}.mp4" for seed in range(3)]
    (rendered / "several.csv").write_text("\n".join(["win,lose", *rows]))
    assert "3 pairs" in invoke("prepare-pairs", rendered / "several.csv", "-o", tmp_path)
    data = LatentDataset(tmp_path)
    assert data.names == ["good/0.mp4"] * 3  # all are held out, or none is
    assert len({clip["file"] for clip in data.clips}) == 3
    assert read_clip(rendered / "good" / "0.mp4").seconds == 2
