"""Kandinsky 6 by the command line alone: clips → cache → SFT and SyncDPO → clips → figures."""

import csv
import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import Kandinsky6Transformer3DModel
from launching import assert_same, launch
from micro import outcome
from safetensors.torch import load_file
from tiny_kandinsky6 import save_tiny_kandinsky6
from typer.testing import CliRunner

from syncdpo.cli import app, main
from syncdpo.data.clips import read_clip, write_clip
from syncdpo.data.latents import LatentDataset
from syncdpo.data.synthetic import render_clip
from syncdpo.models import load_model
from syncdpo.models.weights import COMFYUI_LORA, FULL, LORA
from syncdpo.train import train as run
from syncdpo.training.checkpoint import read_figures, read_log, read_rows
from syncdpo.training.config import TrainConfig

SIZE = ("--frames", 41, "--height", 32, "--width", 32)
ROUGH = ("--learning-rate", 1e-3, "--warmup", 0, "--sigma", "shared", "--log-with", "none")


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def refused(monkeypatch, capsys, *arguments):
    """What the command says on its one line, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["syncdpo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    return said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A pipeline on disk, and four captioned clips in a cache that it made."""
    folder = tmp_path_factory.mktemp("kandinsky6")
    save_tiny_kandinsky6(folder / "model", num_visual_blocks=1)
    (folder / "clips").mkdir()
    for seed in range(4):
        write_clip(folder / "clips" / f"{seed}.mp4", render_clip(seed))
        (folder / "clips" / f"{seed}.txt").write_text("a ball strikes the floor")
    shown = invoke(
        "prepare", folder / "clips", "-o", folder / "cache", "--model", folder / "model", *SIZE
    )
    assert "4 clips in the cache" in shown
    return folder


def train(folder, name, *options):
    """→ the folder of the run."""
    output = folder / name
    invoke(
        "train", "--model", folder / "model", "--data", folder / "cache", "--output", output,
        "--batch-size", 2, "--steps", 3, *ROUGH, *options,
    )  # fmt: skip
    log = read_log(output)
    assert [entry["skipped"] for entry in log] == [0] * len(log)
    return output


def same_weights(one, other):
    first, second = (
        load_file(next(folder / name for name in (FULL, LORA) if (folder / name).exists()))
        for folder in (one, other)
    )
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# --- caches ---------------------------------------------------------------------------------------


def test_a_cache_holds_what_the_model_takes(prepared):
    data = LatentDataset(prepared / "cache")
    assert {name: list(tensor.shape) for name, tensor in data[0].items()} == {
        "video": [11 * 16, 4], "audio": [74, 6], "text": [1024, 16], "text_mask": [1024],
        "pooled_text": [8],
    }  # fmt: skip
    assert data.identity["model"] == "kandinsky6"


def test_several_formats_in_one_cache(prepared):
    """Prepared, trained, held out and validated on, each clip in its own format."""
    mixed = prepared / "mixed"
    shown = invoke(
        "prepare", prepared / "clips", "-o", mixed, "--model", prepared / "model",
        "--bucket", "25x32x32", "--bucket", "41x32x16", "--bucket", "41x32x32",
    )  # fmt: skip
    assert "4 in 41x32x32" in shown
    index = json.loads((mixed / "index.json").read_text())
    short = prepared / "short"
    short.mkdir()
    for seed in range(2):  # two that end too soon for the longer buckets
        clip = render_clip(seed)
        cut = clip.audio[:, : round(30 / 24 * clip.sample_rate)]
        write_clip(short / f"{seed}.mp4", type(clip)(clip.video[:30], 24.0, cut, clip.sample_rate))
    both = prepared / "both"
    both.mkdir()
    for path in (*(prepared / "clips").glob("*.mp4"), *short.glob("*.mp4")):
        (both / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    buckets = ("--bucket", "25x32x32", "--bucket", "41x32x32")
    cache = prepared / "two"
    shown = invoke("prepare", both, "-o", cache, "--model", prepared / "model", *buckets)
    assert "2 in 25x32x32" in shown
    assert "4 in 41x32x32" in shown
    assert [clip["bucket"] for clip in index["clips"]] == [[41, 32, 32, 24.0]] * 4
    output = train(
        prepared, "mixed-run", "--data", cache, "--validation-data", cache, "--validate-every", 3,
        "--lora-rank", 2,
    )  # fmt: skip
    assert {f["clips"] for _, f in read_figures(output, "validation")} == {6}


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(prepared):
    return train(prepared, "lora", "--lora-rank", 2, "--rules", "shift+scale+warp+replace")


def test_the_lora_changed_and_goes_into_diffusers(prepared, lora):
    weights = load_file(lora / LORA)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(t.abs().max() > 0 for n, t in weights.items() if "lora_B" in n)
    transformer = Kandinsky6Transformer3DModel.from_pretrained(prepared / "model" / "transformer")
    transformer.load_lora_adapter(lora, weight_name=LORA)
    added = {n: p for n, p in transformer.named_parameters() if "lora_" in n}
    assert len(added) == len(weights) == len(load_file(lora / COMFYUI_LORA))
    card = (lora / "README.md").read_text()
    assert "Kandinsky 6.0" in card
    assert "load_lora_adapter" not in card  # of no published base
    assert "LTX2Pipeline" not in card


@pytest.mark.parametrize("rule", ["shift", "scale", "warp", "replace"])
@pytest.mark.parametrize("matched", [0, 1])
def test_every_rule_makes_pairs_that_count(prepared, rule, matched):
    output = train(
        prepared, f"{rule}-{matched}", "--lora-rank", 1, "--rules", rule, "--matched", matched,
        "--steps", 1, "--batch-size", 4,
    )  # fmt: skip
    [entry] = read_log(output)
    assert entry["valid"] == 1.0
    assert entry["audio_error_win"] != entry["audio_error_lose"]


def test_halves_of_a_pair_in_turn_and_recomputed_are_the_same_run(prepared, lora):
    same = train(
        prepared, "in-turn", "--lora-rank", 2, "--rules", "shift+scale+warp+replace",
        "--split-pair", "--gradient-checkpointing",
    )  # fmt: skip
    for one, other in zip(read_log(same), read_log(lora), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_cached_reference_is_the_reference(prepared):
    """All weights: no second model, the same losses."""
    settings = ("--rules", "replace", "--batch-size", 4)
    drawn = train(prepared, "drawn", "--draws", 2, *settings)
    cached = train(prepared, "cached", "--cache-reference", 2, *settings)
    assert (cached / FULL).exists()
    for one, other in zip(read_log(cached), read_log(drawn), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    loaded = Kandinsky6Transformer3DModel.from_pretrained(cached)
    before = Kandinsky6Transformer3DModel.from_pretrained(prepared / "model" / "transformer")
    idle = "visual_token_type_embeddings.weight"
    old = before.state_dict()
    unchanged = {n for n, tensor in loaded.state_dict().items() if torch.equal(tensor, old[n])}
    assert unchanged == {idle}


def test_sft_goes_on_where_it_was_killed(prepared):
    settings = ("--method", "sft", "--lora-rank", 2, "--checkpoint-every", 1, "--steps", 4)
    whole = train(prepared, "whole", *settings)
    broken = train(prepared, "broken", *settings)
    for name in ("checkpoint-000004.safetensors", LORA):
        (broken / name).unlink()
    again = train(prepared, "broken", *settings, "--resume")
    assert same_weights(whole, again)
    assert read_log(whole) == read_log(again)


def test_the_sounds_half_alone(prepared):
    output = train(prepared, "audio", "--trained", "audio", "--keep", "last")
    weights = load_file(output / FULL)
    before = load_file(prepared / "model" / "transformer" / FULL)
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed
    assert all("audio" in name or "av_cross_attention" in name for name in changed)


def test_held_out_clips(prepared):
    output = train(
        prepared, "watched", "--lora-rank", 2, "--validation", 0.5, "--validate-every", 1,
        "--keep", "best",
    )  # fmt: skip
    figures = [row["validation"] for row in read_rows(output) if "validation" in row]
    assert len(figures) == 4
    assert figures[0]["winner_ratio"] == 1 != figures[3]["winner_ratio"]
    assert figures[0]["accuracy_0"] is not None


def test_two_processes_train_as_one(prepared, lora):
    """All weights, a LoRA merged into them; the one that has no gradient is left out again."""
    settings = (
        "--model", prepared / "model", "--data", prepared / "cache", "--sigma", "shared",
        "--steps", 20, "--learning-rate", 3e-5, "--weights", lora,
    )  # fmt: skip
    invoke("train", *settings, "--output", prepared / "one", "--batch-size", 2)
    two = ("train", *settings, "--output", prepared / "two", "--batch-size", 1)
    launch("ddp_8_gpus.yaml", "-m", "syncdpo", *two)
    assert_same(outcome(prepared / "one"), outcome(prepared / "two"))


def test_bf16_as_on_a_gpu(prepared, lora, tmp_path):
    """Base and latents in bf16, products under autocast, the LoRA in float32: nearly the same."""
    model = load_model(str(prepared / "model"), frames=41, height=32, width=32, dtype="bfloat16")
    config = TrainConfig(
        data=str(prepared / "cache"), output=str(tmp_path), lora_rank=2, steps=3, batch_size=2,
        rules="shift+scale+warp+replace", learning_rate=1e-3, warmup=0, sigma="shared",
        mixed_precision="bf16", log_with="none", gradient_checkpointing=True,
    )  # fmt: skip
    AcceleratorState._reset_state()  # one process of accelerate's has one precision
    run(config, model, progress=False)
    AcceleratorState._reset_state()
    for one, other in zip(read_log(tmp_path), read_log(lora), strict=True):
        for name in ("video_error_win", "audio_error_win", "audio_reference_win"):
            assert one[name] == pytest.approx(other[name], rel=2**-5)
    assert load_file(tmp_path / LORA)[next(iter(load_file(lora / LORA)))].dtype == torch.float32


# --- clips ----------------------------------------------------------------------------------------


def test_samples_are_written_and_measured(prepared, lora):
    """A clip per caption and seed; the same seed without the LoRA is another clip."""
    (lora / "captions.txt").write_text("a ball\n\nrain on a roof\n")
    options = ("--model", prepared / "model", "--count", 1, "--steps", 2, *SIZE)
    samples, base = prepared / "samples", prepared / "base"
    invoke("sample", *options, "-o", samples, "--weights", lora,
           "--captions", lora / "captions.txt", "--guidance-scale", 2)  # fmt: skip
    invoke("sample", *options, "-o", base, "--caption", "a ball", "--guidance-scale", 2)
    invoke("evaluate", samples, "-o", prepared / "figures")
    rows = list(csv.DictReader((prepared / "figures" / "clips.csv").open()))
    assert [row["clip"] for row in rows] == ["all", "000.mp4", "001.mp4"]
    clips = [read_clip(path) for path in (samples / "000.mp4", base / "000.mp4")]
    assert clips[0].video.shape == (41, 32, 32, 3)
    assert not torch.equal(clips[0].video, clips[1].video)


def test_given_pictures_get_a_sound_while_training(prepared):
    output = train(
        prepared, "watching", "--lora-rank", 1, "--steps", 2, "--sample-every", 2,
        "--sample-pictures", prepared / "cache", "--sample-captions", "a ball",
        "--sample-count", 2, "--sample-steps", 2,
    )  # fmt: skip
    assert [step for step, _ in read_figures(output, "samples")] == [0, 2]
    real = sorted((output / "samples" / "real").glob("*.mp4"))
    made = sorted((output / "samples" / "step-000002").glob("*.mp4"))
    assert len(real) == len(made) == 2
    for one, other in zip(real, made, strict=True):
        # One picture in both, encoded twice with different sounds beside it.
        difference = read_clip(one).video.float() - read_clip(other).video.float()
        assert difference.abs().mean() < 1


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sigma", "separate"), "sigma: expected shared (--sigma shared), as Kandinsky 6 has"),
        (("--shift-bound", 4096), "shift_bound: for LTX-2 alone, Kandinsky 6 has none"),
        (("--text-encoder", "x"), "text_encoder: for LTX-2 alone, Kandinsky 6 has none"),
    ],
)
def test_settings_of_another_family_are_refused(prepared, monkeypatch, capsys, arguments, sentence):
    """The defaults are LTX-2's, so that even the plain command says what it wants."""
    command = ("train", "--model", prepared / "model", "--data", prepared / "cache",
               "--output", prepared / "refused", "--sigma", "shared")  # fmt: skip
    said = refused(monkeypatch, capsys, *command, *arguments)
    assert said.startswith(f"syncdpo: {sentence}")
    assert not (prepared / "refused").exists()


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (("--frames", 40), "frames: expected a multiple of 4 plus 1, got 40"),
        (("--frames", 41, "--height", 33), "height: expected a multiple of 16, got 33"),
        (("--fps", 25), "fps: expected 24"),
    ],
)
def test_formats_that_it_has_not_are_refused(prepared, monkeypatch, capsys, size, sentence):
    command = ("prepare", prepared / "clips", "--model", prepared / "model", "-o",
               prepared / "refused", *size)  # fmt: skip
    assert refused(monkeypatch, capsys, *command).startswith(f"syncdpo: {sentence}")


def test_guidance_of_another_family_is_refused(prepared, monkeypatch, capsys):
    command = ("sample", "--model", prepared / "model", "--caption", "a ball", *SIZE,
               "-o", prepared / "refused", "--stg-scale", 1)  # fmt: skip
    said = refused(monkeypatch, capsys, *command)
    assert said.startswith("syncdpo: stg_scale: expected negative_prompt or guidance_scale")


def test_piflow_is_refused_for_training(prepared, monkeypatch, capsys, tmp_path):
    save_tiny_kandinsky6(tmp_path / "model", piflow=4)
    command = ("train", "--model", tmp_path / "model", "--data", prepared / "cache",
               "--output", tmp_path / "run", *map(str, ROUGH))  # fmt: skip
    assert "is distilled, as its PiFlow" in refused(monkeypatch, capsys, *command)
    said = refused(monkeypatch, capsys, *command, "--allow-distilled")
    assert "predicts no velocity" in said or "was prepared with another model" in said


def test_latents_of_ltx2s_trainer_are_refused(prepared, monkeypatch, capsys, tmp_path):
    (tmp_path / "latents").mkdir()
    torch.save({"latents": torch.zeros(4, 2, 2, 2)}, tmp_path / "latents" / "0.pt")
    command = ("train", "--model", prepared / "model", "--data", tmp_path, "--sigma", "shared",
               "--output", prepared / "refused")  # fmt: skip
    assert "holds latents of LTX-2; expected an LTX-2" in refused(monkeypatch, capsys, *command)


def test_a_cache_of_another_family_is_refused(prepared, monkeypatch, capsys):
    command = ("train", "--model", "tiny", "--data", prepared / "cache",
               "--output", prepared / "refused")  # fmt: skip
    assert "model is kandinsky6 in the cache, " in refused(monkeypatch, capsys, *command)
