"""The command line with a user's own model in the working folder, from clips to figures."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from documented_model import PAGE, write_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from syncdpo.cli import app, main
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.models.weights import LORA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, eight clips and their cache, made by the command line."""
    folder = tmp_path_factory.mktemp("own")
    write_model(folder, "cli_own_model", more=OTHERS)
    (folder / "clips").mkdir()
    for seed in range(8):
        write_clip(folder / "clips" / f"{seed}.mp4", render_clip(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        invoke("prepare", "clips", "-o", "cache", "--model", NAME)
    return folder


NAME = "cli_own_model:Own"
OTHERS = """
class Other(Own):
    def identity(self):
        return super().identity() | {"codec": "pooled-2"}


class Upside(Own):
    def of_audio(self, name):
        return True


class Halved:
    def __init__(self):
        raise ValueError("checkpoint: expected a file, got none")
"""


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(monkeypatch, capsys, *arguments):
    """Of the real entry point: what ends with code 2, and is said in a line."""
    monkeypatch.setattr(sys, "argv", ["syncdpo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("syncdpo: ")
    return last


def test_from_clips_to_figures(here):
    settings = {"model": NAME, "data": "cache", "steps": 6, "batch_size": 2, "lora_rank": 2,
                "output": "run", "validation": 0.3, "sample_every": 3, "sample_count": 1,
                "sample_steps": 2, "checkpoint_every": 3}  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    assert "6 steps" in invoke("train", "--config", "run.yaml")
    assert "6 steps" in invoke("train", "--config", "run.yaml", "--resume")
    assert set(load_file(Path("run") / LORA)) >= {"diffusion_model.to_q.lora_A.weight"}
    listed = invoke("sample", "--model", NAME, "--weights", "run", "-o", "samples", "--count", 2)
    assert len(listed.split()) == 2
    assert "2 clips in samples" in invoke("evaluate", "samples", "-o", "figures", "--no-av-align")
    assert "report.html" in invoke("report", "run")
    rows = invoke("probe", "cache", "--model", NAME, "--steps", 2, "--rule", "shift")
    assert "shift" in rows


def test_a_model_that_does_as_it_should(here):
    shown = invoke("check-model", NAME)
    assert re.search(r"^ok +encode +video \[12, 48\], audio \[50, 8\]$", shown, re.M)
    assert re.search(r"^ok +generate +clips of \[24, 32, 32, 3\]", shown, re.M)
    assert "FAILS" not in shown
    assert "generate" not in invoke("check-model", NAME, "--no-generate")


def test_the_page_shows_what_the_command_says(here):
    """All its lines, but for numbers that another processor may round otherwise."""
    shown = re.search(r"```\n(ok +transformer.*?)\n```", PAGE.read_text("utf-8"), re.S)[1]
    assert [plain(line) for line in shown.splitlines()] == [
        plain(line) for line in invoke("check-model", NAME).strip().splitlines()
    ]


def plain(line):
    return re.sub(r"[+-]0\.\d\d", "±0.00", line)


def test_a_model_that_does_not_ends_with_code_2_and_a_sentence(here, monkeypatch, capsys):
    error = error_of(monkeypatch, capsys, "check-model", "cli_own_model:Upside")
    assert error.endswith("cli_own_model:Upside does not follow the protocol in of_audio")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "--data", "cache", "--model", "cli_own_model:Nobody"),
         "model: cli_own_model has no Nobody"),
        (("prepare", "clips", "-o", "new", "--model", "nowhere:Own"),
         "expected a module nowhere, found in"),
        (("sample", "--model", "nowhere.py:Own"), "expected a file nowhere.py"),
        (("sample", "--model", "cli_own_model.py"), "expected cli_own_model.py:Class"),
        (("prepare", "clips", "-o", "new", "--model", NAME, "--frames", "9"),
         "frames: expected options that cli_own_model:Own takes (none), got 9"),
        (("prepare", "clips", "-o", "new", "--model", NAME, "--bucket", "24x32x32"),
         "bucket: expected a model of several clip formats, got Own, which has one"),
        (("sample", "--model", NAME, "--caption", "rain"), "caption: this model takes no text"),
        (("probe", "cache", "--model", "tiny"), "codec is pooled-1 in the cache"),
        (("train", "--data", "cache", "--output", "other", "--model", "cli_own_model:Other"),
         "codec is pooled-1 in the cache, pooled-2 here"),
        (("prepare", "clips", "-o", "cache", "--model", "cli_own_model:Other"),
         "codec is pooled-1 in the cache, pooled-2 here"),
        (("train", "--data", "cache", "--model", NAME, "--sigma", "shared"),
         "sigma: expected options that cli_own_model:Own takes (none), got 'shared'"),
        (("train", "--data", "cache", "--model", NAME, "--estimate"), "estimate: expected tiny, "),
        (("check-model", "cli_own_model:Halved"), "checkpoint: expected a file, got none"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence(here, monkeypatch, capsys, arguments, sentence):
    assert sentence in error_of(monkeypatch, capsys, *arguments)
