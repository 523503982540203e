"""`syncdpo report`: what a run's folder holds is on one page that needs nothing beside it."""

import base64
import io
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from micro import micro_model, random_latents
from PIL import Image
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render, render_clip
from syncdpo.report import curves, run, write_run_report
from syncdpo.report.players import Shown, events, gallery, poster
from syncdpo.train import train
from syncdpo.training.checkpoint import read_figures
from syncdpo.training.config import TrainConfig

SETTINGS = {"steps": 4, "batch_size": 4, "log_with": "none"}
SAMPLED = {"sample_every": 2, "sample_count": 2, "sample_steps": 2}


def trained(folder, **settings):
    config = TrainConfig(output=str(folder), **SETTINGS | settings)
    train(config, micro_model(), random_latents(), progress=False)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("finished") / "a <run>", **SAMPLED, learning_rate=2e-4)


def text(page):
    return re.sub(r'"data:[^"]*"', '""', page)


def test_the_command_writes_the_page_into_the_run(finished):
    result = CliRunner().invoke(app, ["report", str(finished)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(finished / "report.html")
    page = (finished / "report.html").read_text()
    sources = re.findall(r'(?:src|href|poster)="([^"]{5})', page)
    assert len(sources) == 2 + 2 * 3 * 2  # two of curves; a film and its poster, three times two
    assert set(sources) == {"data:"}
    assert not re.search(r"https?:|@import|\$\w", text(page))
    assert "<h1>a &lt;run&gt;</h1>" in page
    assert "syncdpo, model tiny, 4 of 4 steps" in page
    assert [f"after step {step}" in page for step in (0, 2, 4)] == [True] * 3


def test_figures_and_chosen_settings_stand_in_it(finished):
    page = text(write_run_report(finished).read_text())
    [_, last] = read_figures(finished, "samples")[-1]
    line = re.search(r'<tr class=""><td>4</td>(.*?)</tr>', page)[1]
    assert f"<td>{last['events_per_clip']:.2f}</td>" in line
    assert '<tr class="chosen"><td>learning_rate</td><td>0.0002</td></tr>' in page
    assert '<tr class=""><td>beta_audio</td><td>10.0</td></tr>' in page
    assert str(finished.parent) not in page  # a page may be passed on


def test_warnings_and_held_out_figures_where_there_are_any(finished, tmp_path):
    page = text(write_run_report(finished, tmp_path / "before.html").read_text())
    assert "Warnings" not in page
    assert "Held-out" not in page
    log = (finished / "log.jsonl").read_text()
    rows = [
        {"step": step, "validation": {"accuracy_1": 0.5 + step / 10, "best_step": 2, "new": 1.0}}
        for step in (0, 2, 4)
    ]
    try:
        with (finished / "log.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        (finished / "warnings.txt").write_text("winners <forgotten>: lower beta_audio\n")
        page = text(write_run_report(finished, tmp_path / "after.html").read_text())
    finally:
        (finished / "log.jsonl").write_text(log)
        (finished / "warnings.txt").unlink()
    assert "<li>winners &lt;forgotten&gt;: lower beta_audio</li>" in page
    assert "Best after step 2." in page
    assert 'alt="Held-out figures by step"' in page
    figures = [(row["step"], row["validation"]) for row in rows]
    panels = curves.figure_panels(figures, curves.HELD_OUT, "h")
    assert panels["held-out accuracy"] == {"accuracy 1": [(0, 0.5), (2, 0.7), (4, 0.9)]}
    assert panels["h: new"] == {"new": [(0, 1.0), (2, 1.0), (4, 1.0)]}
    assert len(panels) == 2


def test_a_run_without_samples_and_one_that_has_only_begun(tmp_path):
    plain = trained(tmp_path / "plain", method="sft")
    page = text(write_run_report(plain).read_text())
    assert "sample_every" in page
    assert "<video" not in page
    for path in plain.glob("checkpoint-*"):
        path.unlink()
    assert "They come with the run's first checkpoint" in write_run_report(plain).read_text()


def test_what_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"run: expected the folder of a training run, with a log"):
        write_run_report(tmp_path)


def test_curves_leave_out_what_cannot_be_drawn():
    log = [
        {"step": 0, "loss": 1.0, "margin": float("nan"), "skipped": 0, "mine": 2.0, "valid": 1.0},
        {"step": 1, "loss": 0.5, "margin": 0.1, "skipped": 0, "mine": None, "valid": 0.5},
    ]
    panels = curves.training_panels(log)
    assert panels["loss"] == {"loss": [(0, 1.0), (1, 0.5)]}
    assert panels["margin"] == {"margin": [(1, 0.1)]}
    assert panels["mine"] == {"mine": [(0, 2.0)]}
    assert panels["accuracy and difficulty"] == {"pairs that count": [(0, 1.0), (1, 0.5)]}
    assert "steps skipped" not in panels
    log[1]["skipped"] = 1
    assert "steps skipped" in curves.training_panels(log)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "000.mp4", render_clip(1))
    write_clip(folder / "001.mp4", render(1, offset=0.4).clip)
    return [Shown(folder / "000.mp4", "in <step>"), Shown(folder / "001.mp4")]


def test_events_are_marked_where_they_are(clips):
    for shown, met in zip(clips, (True, False), strict=True):
        svg = events(shown.metrics)
        places = {
            kind: [float(x) for x in re.findall(rf'"{kind}" x1="([\d.]+)"', svg)]
            for kind in ("seen", "met", "alone")
        }
        expected = [round(500 * time, 1) for time in shown.metrics.seen]  # of 1000, in 2 s
        assert places["seen"] == pytest.approx(expected, abs=0.06)
        assert len(places["met"] + places["alone"]) == len(shown.metrics.heard)
        assert (len(places["met"]) == len(shown.metrics.seen)) == met


def test_the_poster_is_an_impact(clips):
    """The floor is lit in it, and is not in the picture before."""
    content = base64.b64decode(poster(clips[0]).partition(",")[2])
    picture = np.asarray(Image.open(io.BytesIO(content)))
    assert picture.shape == (192, 192, 3)
    floor = clips[0].clip.video[:, 58:, :8].float().mean((1, 2, 3))
    assert picture[174:, :24].mean() > floor.median() + 40


def test_dark_and_small_clips_are_lifted_and_enlarged(clips, tmp_path):
    page, width = gallery([("rendered", clips)])
    assert width == "192px"
    assert page.count('<video class="small dark"') == 2
    assert "shown brighter than they are" in page
    assert "in &lt;step&gt;" in page
    light = render_clip(1)
    light.video[:] = light.video // 4 + 180
    write_clip(tmp_path / "light.mp4", light)
    page, _ = gallery([("light", [Shown(tmp_path / "light.mp4")])])
    assert '<video class="small"' in page
    assert "shown brighter" not in page


def test_steps_and_clips_that_are_too_many_are_named(clips, tmp_path, monkeypatch):
    content = clips[0].path.read_bytes()
    for step in range(0, 90, 10):
        folder = tmp_path / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for number in range(8):
            (folder / f"{number:03d}.mp4").write_bytes(content)
    steps, count, told = run.chosen(tmp_path, range(0, 90, 10))
    assert steps == [0, 20, 30, 50, 60, 80]
    assert (count, told) == (5, " Shown: 6 of 9 steps and 5 of 8 clips of each.")
    monkeypatch.setattr(run, "MOST_BYTES", 4 * 6 * 2 * len(content) / 3)
    assert run.chosen(tmp_path, range(0, 90, 10))[1] == 2
    assert run.chosen(tmp_path, [0, 10])[2] == " Shown: 5 of 8 clips of each."


def test_settings_of_another_version_are_shown_all_the_same(finished, monkeypatch):
    settings = asdict(TrainConfig(method="sft")) | {"forgotten": 1}
    monkeypatch.setattr(run, "run_settings", lambda folder: settings)
    assert "sft, model tiny" in write_run_report(finished).read_text()
