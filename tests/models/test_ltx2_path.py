"""LTX-2 by the command line alone: clips → cache → SFT and SyncDPO → LoRA → pipeline → figures."""

import csv

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file
from tiny_ltx2 import save_tiny_ltx2
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.clips import read_clip, write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.models.weights import LORA
from syncdpo.training.checkpoint import read_log, read_rows

SIZE = ("--frames", 41, "--height", 64, "--width", 64)


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
    shown = invoke(
        "prepare", folder / "clips", "-o", folder / "cache", "--model", folder / "model", *SIZE
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


def test_captioned_clips_are_held_out(trained):
    """Whatever conditions a model has; another output, the same cache on both sides."""
    folder, output = trained
    watched = output.with_name(f"{output.name}-watched")
    method = ("--method", output.name, "--validation-data", folder / "cache", "--keep", "best")
    invoke(
        "train", "--model", folder / "model", "--data", folder / "cache", "--output", watched,
        "--lora-rank", 2, "--steps", 3, "--batch-size", 2, "--rules", "shift", "--warmup", 0,
        "--learning-rate", 1e-2, "--gradient-checkpointing", "--validate-every", 1, *method,
    )  # fmt: skip
    assert read_log(watched) == read_log(output)
    figures = [row["validation"] for row in read_rows(watched) if "validation" in row]
    assert [f["clips"] for f in figures] == [3] * 4
    assert figures[0]["winner_ratio"] == 1 != figures[3]["winner_ratio"]


def test_the_pipeline_takes_the_lora(trained):
    folder, output = trained
    pipeline = LTX2Pipeline.from_pretrained(folder / "model")
    pipeline.load_lora_weights(output)
    added = {n: p for n, p in pipeline.transformer.named_parameters() if "lora_" in n}
    weights = load_file(output / LORA)
    assert len(added) == len(weights)
    for name, parameter in added.items():
        stored = weights["diffusion_model." + name.replace(".default_0", "")]
        torch.testing.assert_close(parameter.detach(), stored.to(parameter.dtype))


def test_samples_are_written_and_measured(trained):
    """A clip per caption and seed; the same seed without the LoRA is another clip."""
    folder, output = trained
    samples, base = output / "samples", output / "base"
    (output / "captions.txt").write_text("a ball\n\nrain on a roof\n")
    options = ("--model", folder / "model", "--count", 1, "--steps", 2, *SIZE)
    adapted = ("--weights", output, "--captions", output / "captions.txt")
    invoke("sample", *options, "-o", samples, *adapted)
    invoke("sample", *options, "-o", base, "--caption", "a ball")
    invoke("evaluate", samples, "-o", output / "figures")
    rows = list(csv.DictReader((output / "figures" / "clips.csv").open()))
    assert [row["clip"] for row in rows] == ["all", "000.mp4", "001.mp4"]
    clips = [read_clip(path) for path in (samples / "000.mp4", base / "000.mp4")]
    assert not torch.equal(clips[0].video, clips[1].video)


def test_guidance_reaches_the_pipeline(prepared, monkeypatch):
    asked = []

    def watched(pipeline, *arguments, **options):
        asked.append(options)
        return call(pipeline, *arguments, **options)

    call = LTX2Pipeline.__call__
    monkeypatch.setattr(LTX2Pipeline, "__call__", watched)
    guidance = {
        "negative_prompt": "noise", "guidance_scale": 2.5, "audio_guidance_scale": 5.5,
        "guidance_rescale": 0.1, "audio_guidance_rescale": 0.2, "modality_scale": 1.5,
        "audio_modality_scale": 2.0, "stg_scale": 0.3, "audio_stg_scale": 0.4,
    }  # fmt: skip
    options = [part for name, value in guidance.items()
               for part in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    invoke(
        "sample", "--model", prepared / "model", "-o", prepared / "guided", "--count", 1, *SIZE,
        "--fps", 12, "--steps", 2, *options, "--stg-block", 0, "--stg-block", 1,
    )  # fmt: skip
    guidance |= {"spatio_temporal_guidance_blocks": [0, 1], "num_inference_steps": 2}
    guidance |= {"num_frames": 41, "height": 64, "width": 64, "frame_rate": 12}
    assert len(asked) == 1
    assert {name: asked[0][name] for name in guidance} == guidance
