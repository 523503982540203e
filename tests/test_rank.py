"""Sample and rank: which clips make a pair, what it cost, and that a killed run goes on."""

import csv
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from micro import micro_model, random_latents
from tiny_ltx2 import save_tiny_ltx2
from tqdm import tqdm
from typer.testing import CliRunner

from syncdpo.cli import app, main
from syncdpo.data.clips import read_clip, write_clip
from syncdpo.data.latents import LatentDataset
from syncdpo.data.pairs import read_pairs
from syncdpo.data.synthetic import render_clip
from syncdpo.evaluation import evaluate_folder
from syncdpo.models.weights import LORA
from syncdpo.ranking import Measure, Source, of_captions, of_pictures, rank
from syncdpo.training.checkpoint import read_log

COUNT, STEPS = 3, 2


def loudness(clip):
    return clip.audio.square().mean().sqrt().item()


LOUDER = Measure("loudness", "higher", lambda path: loudness(read_clip(path)))


def pictures(count=4):
    return of_pictures(micro_model(), random_latents(count))


def ranked(folder, model=None, sources=None, measure=LOUDER, **options):
    options = {"count": COUNT, "steps": STEPS, "progress": False} | options
    return rank(model or micro_model(), sources or pictures(), folder, measure, **options)


def rows(folder):
    return list(csv.DictReader((folder / "PAIRS.csv").open()))


def samples(folder):
    return sorted((folder / "samples").rglob("*.mp4"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    return folder, ranked(folder)


def test_the_best_stands_against_the_worst(whole):
    folder, summary = whole
    assert len(samples(folder)) == 4 * COUNT
    found = rows(folder)
    assert len(found) == len(summary.pairs) == 4
    for row in found:
        win, lose = folder / row["win"], folder / row["lose"]
        assert win.parent == lose.parent
        scores = {path: loudness(read_clip(path)) for path in win.parent.glob("*.mp4")}
        assert len(scores) == COUNT
        assert (scores[win], scores[lose]) == (max(scores.values()), min(scores.values()))
        assert float(row["loudness_win"]) == scores[win]
        assert float(row["loudness_lose"]) == scores[lose]
    listed = read_pairs(folder / "PAIRS.csv")
    assert not listed.captions
    assert all(pair.win.is_file() and pair.lose.is_file() for pair in listed.pairs)


def test_lower_turns_the_pairs_round(whole, tmp_path):
    """And another measure of the same clips samples nothing anew."""
    folder, _ = whole
    before = rows(folder)
    quieter = Measure("quietness", "lower", LOUDER.score)
    summary = ranked(folder, measure=quieter)
    after = rows(folder)
    ranked(folder)
    assert summary.sampled == 0
    assert [(r["win"], r["lose"]) for r in after] == [(r["lose"], r["win"]) for r in before]
    assert rows(folder) == before


def test_the_pictures_are_those_given(whole):
    folder, _ = whole
    for row in rows(folder):
        win, lose = (read_clip(folder / row[name]) for name in ("win", "lose"))
        assert torch.equal(win.video, lose.video)
        assert not torch.equal(win.audio, lose.audio)
    first, second = (read_clip(folder / row["win"]).video for row in rows(folder)[:2])
    assert not torch.equal(first, second)


def test_the_same_seed_is_the_same_ranking_and_another_is_not(whole, tmp_path):
    folder, _ = whole
    ranked(tmp_path / "again")
    assert rows(tmp_path / "again") == rows(folder)
    for path in samples(folder):
        again = tmp_path / "again" / path.relative_to(folder)
        assert torch.equal(read_clip(again).audio, read_clip(path).audio)
    ranked(tmp_path / "other", seed=1)
    assert rows(tmp_path / "other") != rows(folder)


def test_a_clips_noise_is_its_own(whole, tmp_path):
    """Fewer sources, in another order, more clips: those that there were are the same ones."""
    folder, _ = whole
    ranked(tmp_path, sources=pictures()[2:0:-1], count=COUNT + 1)
    kept = [path for path in samples(tmp_path) if path.stem < f"{COUNT:02d}"]
    assert len(kept) == 2 * COUNT
    for path in kept:
        other = read_clip(folder / path.relative_to(tmp_path))
        assert torch.equal(read_clip(path).audio, other.audio)


def test_the_default_is_the_onset_error_that_evaluate_measures(tmp_path):
    folder, measure = tmp_path / "rank", Measure.of("onset_error_ms")
    assert measure.better == "lower"
    assert Measure.of("f1").better == "higher"
    for seed in range(2):
        write_clip(tmp_path / f"{seed}.mp4", render_clip(seed))
    evaluate_folder(tmp_path, folder, with_av_align=False, progress=False)
    figures = list(csv.DictReader((folder / "clips.csv").open()))[1:]
    for row in figures:
        for name in ("onset_error_ms", "f1"):
            score = Measure.of(name).score(tmp_path / row["clip"])
            assert score == pytest.approx(float(row[name]), abs=0.06)


def test_a_source_that_comes_again_is_taken_once(whole):
    folder, summary = whole
    again = ranked(folder, sources=pictures() + pictures())
    assert (again.sampled, again.clips, len(again.pairs)) == (0, 4 * COUNT, 4)
    assert again.pairs == summary.pairs


def test_several_pairs_of_one_source_have_noise_of_their_own(tmp_path):
    """Clips of its own: tiny takes no text, and so has one source."""
    summary = ranked(tmp_path, sources=of_captions([""], groups=2))
    [first, second] = rows(tmp_path)
    assert len(summary.pairs) == 2
    assert Path(first["win"]).parent != Path(second["win"]).parent
    clips = [read_clip(path).audio for path in samples(tmp_path)]
    assert all(not torch.equal(x, y) for i, x in enumerate(clips) for y in clips[:i])


# --- what gives no pair ---------------------------------------------------------------------------


def test_ties_and_clips_without_a_score_give_no_pair(whole, tmp_path):
    folder, _ = whole
    names = sorted({path.parent.name for path in samples(folder)})

    def score(path):
        at = names.index(path.parent.name)
        number = int(path.stem)
        return {0: 1.0, 1: None if number else 2.0, 2: None, 3: [3.0, 1.0, 3.0][number]}[at]

    summary = ranked(folder, measure=Measure("odd", "higher", score))
    left = {path.name: reason for path, reason in summary.left}
    assert left == {
        names[0]: "its best clip is no better than its worst: all have 1",
        names[1]: "1 of its 3 clips has a score (it has no odd)",
        names[2]: "0 of its 3 clips has a score (it has no odd)",
    }
    assert "3 left out:" in str(summary)
    [row] = rows(folder)
    assert row["win"] == f"samples/{names[3]}/00.mp4"  # of equals the first
    assert row["lose"] == f"samples/{names[3]}/01.mp4"
    about = json.loads((folder / "ranking.json").read_text())
    assert about["left_out"] == left
    assert about["pairs"] == 1
    ranked(folder)  # as it was


def test_no_pair_at_all_is_an_error(whole):
    folder, _ = whole
    with pytest.raises(ValueError, match=r"none of 4 gives a pair\n(.|\n)*no better than its"):
        ranked(folder, measure=Measure("one", "lower", lambda path: 1.0))
    ranked(folder)


def test_another_folders_samples_are_not_taken(whole):
    folder, _ = whole
    with pytest.raises(ValueError, match=r"output: .* other settings \(steps was 2, is 3\)"):
        ranked(folder, steps=3)
    with pytest.raises(ValueError, match="seed was 0, is 5"):
        ranked(folder, seed=5)
    other = micro_model()
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1)
    with pytest.raises(ValueError, match="weights was"):
        ranked(folder, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("median",), "metric: expected onset_error_ms, .* or module:function, got 'median'"),
        (("syncdpo.metrics:av_align",), "better: expected lower or higher for syncdpo.metrics:av"),
        (("f1", "lower"), "better: expected higher for f1, got lower"),
        (("f1", "best"), "better: expected lower or higher, got 'best'"),
    ],
)
def test_a_measure_that_is_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Measure.of(*arguments)


# --- time, and a kill -----------------------------------------------------------------------------


def test_the_time_is_written_down_and_grows_with_what_is_done(tmp_path):
    def slow(path):
        time.sleep(0.05)
        return loudness(read_clip(path))

    summary = ranked(tmp_path, sources=pictures(2), measure=Measure("slow", "higher", slow))
    about = json.loads((tmp_path / "ranking.json").read_text())
    assert about["seconds"] == summary.seconds
    assert about["seconds"]["ranking"] >= 2 * COUNT * 0.05
    assert about["seconds"]["sampling"] > 0
    assert about["cpu_seconds"].keys() == {"sampling", "ranking"}
    assert about["untimed"] == 0
    for _ in range(2):  # nothing is done, and nothing is forgotten
        ranked(tmp_path, sources=pictures(2), measure=Measure("slow", "higher", slow))
        assert json.loads((tmp_path / "ranking.json").read_text()) == about
    samples(tmp_path)[0].unlink()
    again = ranked(tmp_path, sources=pictures(2), measure=Measure("slow", "higher", slow))
    assert again.sampled == 1
    assert again.seconds["sampling"] > summary.seconds["sampling"]
    assert again.seconds["ranking"] > summary.seconds["ranking"]


def test_killed_it_goes_on_to_the_same_pairs(whole, tmp_path):
    folder, _ = whole
    killed, seen = 0, set()
    for attempt in range(8):
        child = os.fork()
        if child == 0:
            tqdm.set_lock(threading.RLock())
            torch.set_num_threads(1)
            try:
                ranked(tmp_path)
            finally:
                os._exit(0)
        time.sleep(0.1 + 0.1 * attempt)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        before = {path: path.stat().st_mtime_ns for path in samples(tmp_path)}
        assert seen <= before.items()  # what is there is not sampled again
        seen = set(before.items())
    assert killed >= 2
    ranked(tmp_path)
    assert rows(tmp_path) == rows(folder)
    assert not list((tmp_path / "samples").rglob("*.tmp"))
    torn = tmp_path / "log.jsonl"
    torn.write_text(torn.read_text() + '{"clip": "torn')
    assert ranked(tmp_path).sampled == 0


# --- by the command line --------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def test_clips_of_a_folder_to_a_cache_of_pairs_to_a_run(tmp_path):
    (tmp_path / "clips").mkdir()
    for seed in range(3):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", render_clip(seed))
    arguments = (
        "rank", "--pictures", tmp_path / "clips", "-o", tmp_path / "rank", "--count", 2,
        "--steps", 2, "--prepare", tmp_path / "pairs",
    )  # fmt: skip
    shown = invoke(*arguments)
    assert "3 pairs of 3 sources, 6 clips (6 sampled now)" in shown
    assert "onset_error_ms, lower is better" in shown
    assert "3 pairs in the cache (3 made, 0 kept)" in shown
    assert "(3 made" not in invoke(*arguments)
    about = json.loads((tmp_path / "rank" / "ranking.json").read_text())
    assert about["seconds"].keys() == {"sampling", "ranking", "preparing"}
    data = LatentDataset(tmp_path / "pairs")
    assert [clip["shared"] for clip in data.clips] == [["video"]] * 3
    run = ("--data", tmp_path / "pairs", "--output", tmp_path / "run", "--steps", 1)
    invoke("train", "--method", "dpo", "--batch-size", 2, *run)
    [row] = read_log(tmp_path / "run")
    assert row["valid"] == 1


def test_captions_of_ltx2_from_a_table_to_a_lora(tmp_path, monkeypatch):
    """Pairs whose pictures differ, with conditions, by LTX-2's own pipeline."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = save_tiny_ltx2(tmp_path / "model")
    table = tmp_path / "captions.csv"
    table.write_text("caption,mood\na door slams,dark\nrain,grey\nrain,blue\n")
    size = ("--model", model, "--frames", 17, "--height", 64, "--width", 64)
    arguments = (
        "rank", *size, "--captions", table, "-o", tmp_path / "rank", "--count", 2, "--steps", 2,
        "--metric", "test_rank:loudness", "--better", "higher", "--prepare", tmp_path / "pairs",
    )  # fmt: skip
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "2 pairs of 2 sources, 4 clips" in result.stdout
    assert "captions: 1 of 3 stand there again" in result.stderr
    assert {row["caption"] for row in rows(tmp_path / "rank")} == {"a door slams", "rain"}
    data = LatentDataset(tmp_path / "pairs")
    assert {clip["caption"] for clip in data.clips} == {"a door slams", "rain"}
    assert data[0].keys() >= {"video", "video_lose", "audio", "audio_lose", "video_text"}
    invoke(
        "train", "--method", "dpo", "--model", model, "--data", tmp_path / "pairs", "--output",
        tmp_path / "run", "--lora-rank", 2, "--steps", 2, "--batch-size", 2, "--normalize",
        "--learning-rate", 1e-2, "--warmup", 0, "--beta-video", 5,
    )  # fmt: skip
    assert (tmp_path / "run" / LORA).is_file()
    log = read_log(tmp_path / "run")
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert log[1]["margin"] != 0
    assert all(row["skipped"] == 0 and row["valid"] == 1 for row in log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption", "rain"], "caption: tiny takes no text"),
        (["--caption", "rain", "--pictures", "x"], "got --caption and --pictures"),
        (["--metric", "none:such"], "better: expected lower or higher for none:such"),
        (["--metric", "none:such", "--better", "lower"], "metric: expected module:function"),
        (["--pictures", "{tmp}/none"], "none"),
        (["--model", "{tmp}/model", "--pictures", "{tmp}"], "pictures: expected none for a model"),
    ],
)
def test_what_the_user_can_mend(tmp_path, monkeypatch, capsys, arguments, message):
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    if str(tmp_path / "model") in filled:
        save_tiny_ltx2(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["syncdpo", "rank", "-o", str(tmp_path / "out"), *filled])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert "Traceback" not in error


def test_sources_of_one_name_and_other_pictures_are_others():
    first, second = random_latents(2)
    folders = {Source("", "0.mp4", x["video"]).folder for x in (first, second, first)}
    assert len(folders) == 2
