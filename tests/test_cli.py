"""The command line, as a user meets it: help, exit codes, one-sentence errors."""

import csv
import sys

import pytest
import typer
from typer.testing import CliRunner

from syncdpo import __version__
from syncdpo.cli import app, main
from syncdpo.cli.clips import lines
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render, render_clip
from syncdpo.training.config import TrainConfig, load_config


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def exit_code(monkeypatch, capsys, *arguments):
    """Of the real entry point; → (code, stderr)."""
    monkeypatch.setattr(sys, "argv", ["syncdpo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err


def test_version_and_help():
    assert invoke("--version").strip() == __version__
    help_text = invoke("--help")
    for command in (
        "demo",
        "prepare",
        "prepare-pairs",
        "rank",
        "train",
        "report",
        "sample",
        "evaluate",
        "probe",
        "tune",
        "compare-rules",
        "compare",
        "check-model",
        "render",
        "info",
    ):
        assert command in help_text


@pytest.mark.parametrize("command", [command.callback for command in app.registered_commands])
def test_every_option_says_what_it_is(command):
    name = command.__name__.replace("_", "-")
    parameters = typer.main.get_command(app).commands[name].params
    assert [p.name for p in parameters if not p.help] == []


def test_rendered_clips_are_kept_and_counted(tmp_path, monkeypatch, capsys):
    assert "2 of 2 clips of weak rendered" in invoke("render", "weak", tmp_path, "--count", 2)
    said = invoke("render", "weak", tmp_path, "--count", 2, "--first", 1)
    assert "1 of 2 clips of weak rendered" in said
    assert "kept 1 that were there" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:06d}.mp4" for i in range(3)]
    code, said = exit_code(monkeypatch, capsys, "render", "balls", tmp_path)
    assert code == 2
    assert "family: expected one of impacts, speech, several, weak, blinds, got 'balls'" in said


def test_info_says_what_runs_where():
    assert __version__ in invoke("info")


def test_shown_config_is_a_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(invoke("train", "--show-config", "--method", "sft", "--lora-rank", "4"))
    assert load_config(path) == TrainConfig(method="sft", lora_rank=4)
    assert "steps: 7" in invoke("train", "--config", path, "--show-config", "--steps", 7)


def test_prepare_train_sample_evaluate(tmp_path):
    """The user's path, with one clip that cannot be used on the way."""
    (tmp_path / "clips").mkdir()
    for seed in range(3):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", render_clip(seed))
    (tmp_path / "clips" / "note.mp4").write_text("no clip at all")
    summary = invoke("prepare", tmp_path / "clips", "-o", tmp_path / "latents")
    assert "3 clips in the cache" in summary
    assert "note.mp4" in summary
    run = tmp_path / "run"
    shown = invoke(
        "train", "--data", tmp_path / "latents", "--output", run, "--steps", 2, "--batch-size", 2
    )
    assert "2 steps" in shown
    samples = tmp_path / "samples"
    listed = invoke("sample", "-o", samples, "--weights", run, "--count", 2, "--steps", 2)
    assert listed.split() == [str(samples / "000.mp4"), str(samples / "001.mp4")]
    invoke("evaluate", samples, "-o", tmp_path / "figures")
    rows = list(csv.DictReader((tmp_path / "figures" / "clips.csv").open()))
    assert [row["clip"] for row in rows] == ["all", "000.mp4", "001.mp4"]


def test_evaluate_hears_a_lag(tmp_path):
    for seed in range(4):
        write_clip(tmp_path / f"{seed}.mp4", render(seed, offset=0.08).clip)
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    text = invoke("evaluate", tmp_path, "-o", tmp_path / "out", "--no-av-align")
    figures = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    assert float(figures["offset_ms"]) == pytest.approx(80, abs=15)
    assert float(figures["f1"]) > 0.9
    assert "broken.mp4" in text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_captions_to_sample_are_lines_that_end_at_line_feeds(tmp_path, capsys, encoding):
    separator = "\x85" if encoding != "cp1252" else "…"  # U+0085 is no character of cp1252
    text = f" a dog\u2019s{separator}bark\r\n\n rain \n"
    (tmp_path / "captions.txt").write_bytes(text.encode(encoding))
    assert lines(tmp_path / "captions.txt") == [f"a dog\u2019s{separator}bark", "rain"]
    assert ("read as Windows-1252" in capsys.readouterr().err) == (encoding == "cp1252")


def test_captions_to_sample_that_are_no_text(tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"\x81\x8d")
    with pytest.raises(ValueError, match=r"captions\.txt is neither UTF-8"):
        lines(tmp_path / "captions.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "{empty}", "-o", "{empty}/out"], "clips"),
        (["evaluate", "{empty}", "-o", "{empty}/out"], "none in"),
        (["prepare", "{empty}/missing"], "missing"),
        (["train", "--data", "{empty}"], "syncdpo prepare"),
        (["train", "--steps", "0"], "steps: expected at least 1"),
        (["train", "--config", "{empty}/none.yaml"], "none.yaml"),
        (["demo", "--clips", "{empty}", "--offset-spread", "0.1"], "got 0.1"),
        (["sample", "--caption", "rain", "--captions", "none.txt"], "--captions, got 'rain'"),
        (["sample", "-o", "{empty}/out", "--caption", "rain"], "caption: tiny takes no text"),
        (["sample", "-o", "{empty}/out", "--stg-scale", "0"], "stg_scale: tiny takes no text"),
        (["sample", "-o", "{empty}/out", "--frames", "9"], "frames: tiny has one clip format"),
        (["sample", "-o", "{empty}/out", "--captions", "{empty}/none.txt"], "none.txt"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(monkeypatch, capsys, tmp_path, arguments, message):
    filled = [argument.format(empty=tmp_path) for argument in arguments]
    code, error = exit_code(monkeypatch, capsys, *filled)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_a_training_that_diverges_is_one_sentence_and_exit_code_3(monkeypatch, capsys, tmp_path):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "0.mp4", render_clip(0))
    invoke("prepare", tmp_path / "clips", "-o", tmp_path / "latents")
    run = ("--data", tmp_path / "latents", "--output", tmp_path / "run", "--batch-size", 1)
    wild = ("--method", "sft", "--learning-rate", 1e30, "--warmup", 0, "--steps", 30)
    code, error = exit_code(monkeypatch, capsys, "train", *run, *wild)
    assert code == 3
    assert "no finite gradient in 10 steps" in error
    assert "Traceback" not in error


def test_a_folder_without_one_usable_clip(monkeypatch, capsys, tmp_path):
    (tmp_path / "text.mp4").write_text("no clip")
    code, error = exit_code(monkeypatch, capsys, "prepare", tmp_path, "-o", tmp_path / "out")
    assert code == 2
    assert "text.mp4" in error
