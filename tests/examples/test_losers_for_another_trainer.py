"""examples/losers_for_another_trainer.py on rendered clips: files, table, who is out of step."""

import csv

import pytest
import torch
from from_examples import load, run

pytest.importorskip("av")
from syncdpo.data import Clip, read_clip, write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.metrics import clip_metrics, summarise


@pytest.fixture
def folder(tmp_path):
    """Two clips, one of them with a caption, one without sound and one that is none."""
    (tmp_path / "clips").mkdir()
    for seed in (1, 2):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", render_clip(seed))
    (tmp_path / "clips" / "1.txt").write_text(" a ball, bouncing ☂\n", encoding="utf-8")
    clip = render_clip(3)
    silent = Clip(clip.video, clip.fps, torch.zeros_like(clip.audio), clip.sample_rate)
    write_clip(tmp_path / "clips" / "silent.mp4", silent)
    (tmp_path / "clips" / "torn.mp4").write_bytes(b"no media")
    return tmp_path


@pytest.mark.parametrize("rule", ["replace", "scale"])
def test_pairs_and_their_table(folder, monkeypatch, capsys, rule):
    torch.manual_seed(0)
    run(monkeypatch, "losers_for_another_trainer", folder / "clips", folder / "pairs", rule)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("/")[-1].split(":")[0] for line in said] == ["silent.mp4", "torn.mp4"]
    assert all(line.startswith("left out ") for line in said)
    with open(folder / "pairs" / "pairs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == ["a ball, bouncing ☂", ""]
    assert list(rows[0]) == ["win", "lose", "caption"]
    halves = [[read_clip(folder / "pairs" / row[half]) for row in rows] for half in ("win", "lose")]
    for win, lose in zip(*halves, strict=True):
        assert torch.equal(win.video, lose.video)
        assert win.audio.shape == lose.audio.shape
        assert (win.audio - lose.audio).abs().max() > 0.1
    winners, losers = (summarise([clip_metrics(clip) for clip in half]) for half in halves)
    assert winners["onset_error_ms"] < 30  # cut or not, they keep time
    assert losers["onset_error_ms"] > 2 * winners["onset_error_ms"]


@pytest.mark.parametrize("rule", ["scale", "warp", "shift"])
def test_the_sound_moves_on_all_channels_alike_and_keeps_its_pitch(rule):
    mono = render_clip(1)
    clip = Clip(mono.video, mono.fps, mono.audio.repeat(2, 1), mono.sample_rate)
    torch.manual_seed(0)
    win, lose = load("losers_for_another_trainer").winner_and_loser(clip, rule, 0.0)
    assert win is clip
    assert torch.equal(*lose.audio)

    def pitch(audio):
        return torch.fft.rfft(audio[0]).abs().argmax().item() / (audio.shape[1] / clip.sample_rate)

    assert pitch(lose.audio) == pytest.approx(pitch(win.audio), rel=0.05)
    error = [summarise([clip_metrics(half)])["onset_error_ms"] for half in (win, lose)]
    assert error[1] > 60 > error[0]


def test_a_loser_that_sounds_like_its_winner_is_refused():
    clip = render_clip(1)
    still = Clip(clip.video, clip.fps, torch.full_like(clip.audio, 0.1), clip.sample_rate)
    with pytest.raises(ValueError, match="sound the same"):
        load("losers_for_another_trainer").winner_and_loser(still, "replace", 0.0)
