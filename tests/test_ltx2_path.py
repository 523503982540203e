"""LTX-2 by the command line alone: clips → cache → SFT and SyncDPO → LoRA → pipeline → figures."""

import csv

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file
from tiny_ltx2 import save_tiny_ltx2
from typer.testing import CliRunner

from syncdpo.checkpoint import read_log
from syncdpo.cli import app
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.models.weights import LORA


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A pipeline on disk, and three captioned clips in a cache that it made."""
    folder = tmp_path_factory.mktemp("ltx2")
    save_tiny_ltx2(folder / "model")
    (folder / "clips").mkdir()
    for seed in range(3):
        write_clip(folder / "clips" / f"{seed}.mp4", render_clip(seed))
        (folder / "clips" / f"{seed}.txt").write_text("a ball strikes the floor")
    size = ("--frames", 41, "--height", 64, "--width", 64)
    shown = invoke(
        "prepare", folder / "clips", "-o", folder / "cache", "--model", folder / "model", *size
    )
    assert "3 clips in the cache" in shown
    return folder


@pytest.fixture(scope="module", params=["sft", "syncdpo"])
def trained(request, prepared):
    output = prepared / request.param
    invoke(
        "train", "--model", prepared / "model", "--data", prepared / "cache", "--output", output,
        "--method", request.param, "--lora-rank", 2, "--steps", 3, "--batch-size", 2,
        "--rules", "shift", "--learning-rate", 1e-2, "--warmup", 0, "--gradient-checkpointing",
    )  # fmt: skip
    return prepared, output


def test_the_lora_changed_and_its_log_is_finite(trained):
    _, output = trained
    weights = load_file(output / LORA)
    assert weights
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    log = read_log(output)
    assert len(log) == 3
    assert all(entry["skipped"] == 0 for entry in log)


def test_the_pipeline_takes_the_lora(trained):
    folder, output = trained
    pipeline = LTX2Pipeline.from_pretrained(folder / "model")
    pipeline.load_lora_weights(output)
    added = {n: p for n, p in pipeline.transformer.named_parameters() if "lora_" in n}
    weights = load_file(output / LORA)
    assert len(added) == len(weights)
    for name, parameter in added.items():
        stored = weights["transformer." + name.replace(".default_0", "")]
        torch.testing.assert_close(parameter.detach(), stored.to(parameter.dtype))


def test_samples_are_written_and_measured(trained):
    folder, output = trained
    samples = output / "samples"
    invoke(
        "sample", "--model", folder / "model", "--weights", output, "-o", samples, "--count", 1,
        "--steps", 2, "--caption", "a ball", "--frames", 41, "--height", 64, "--width", 64,
    )  # fmt: skip
    invoke("evaluate", samples, "-o", output / "figures")
    rows = list(csv.DictReader((output / "figures" / "clips.csv").open()))
    assert [row["clip"] for row in rows] == ["all", "000.mp4"]
