"""`syncdpo evaluate`: metrics of the user's own beside the built-in ones."""

import csv
import math

import pytest
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.evaluation import evaluate_folder, load_metric


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
