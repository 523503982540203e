"""Samples while it trains: there, measured, and nothing that the training would notice."""

import json
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from micro import micro_model, outcome, random_latents
from tiny_ltx2 import save_tiny_ltx2
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.clips import read_clip, write_clip
from syncdpo.data.latents import prepare
from syncdpo.data.synthetic import render_clip
from syncdpo.metrics import clip_metrics, summarise
from syncdpo.models import load_model
from syncdpo.models.tiny import Tiny
from syncdpo.train import train
from syncdpo.training import samples
from syncdpo.training.checkpoint import read_figures, read_log
from syncdpo.training.config import TrainConfig
from syncdpo.training.samples import undisturbed

HERE = Path(__file__).parent
SETTINGS = {"steps": 6, "batch_size": 4, "warmup": 2, "learning_rate": 1e-3, "log_with": "none"}
SAMPLED = {"sample_every": 4, "sample_count": 2, "sample_steps": 2}


def loudness(clip):
    """A metric that also spends random numbers."""
    return clip.audio.abs().mean().item() + 0 * torch.rand(()).item()


def run(folder, model=None, **settings):
    config = TrainConfig(output=str(folder), **SETTINGS | settings)
    train(config, model or micro_model(), random_latents(), progress=False)
    return outcome(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    settings = {"metric": "test_samples:loudness", "checkpoint_every": 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(HERE))
        return folder, run(folder, **SAMPLED | settings)


def test_the_first_step_every_so_many_and_the_last(sampled):
    folder = sampled[0] / "samples"
    assert sorted(p.name for p in folder.glob("step-*")) == [
        "step-000000",
        "step-000004",
        "step-000006",
    ]
    for step in folder.glob("step-*"):
        assert sorted(path.name for path in step.iterdir()) == ["000.mp4", "001.mp4"]
    first, last = (
        read_clip(folder / name / "000.mp4", require_sound=False)
        for name in ("step-000000", "step-000006")
    )
    assert first.video.shape == (48, 64, 64, 3)
    assert not torch.equal(first.audio, last.audio)  # what was learnt in between is heard


def test_figures_of_the_log_are_those_of_the_files(sampled):
    folder, _ = sampled
    rows = read_figures(folder, "samples")
    assert [step for step, _ in rows] == [0, 4, 6]
    for step, figures in rows:
        paths = sorted((folder / "samples" / f"step-{step:06d}").glob("*.mp4"))
        clips = [read_clip(path, require_sound=False) for path in paths]
        expected = summarise([clip_metrics(clip) for clip in clips])
        names = ("f1", "onset_error_ms", "events_per_clip", "seen_per_clip", "clips")
        assert {name: figures[name] for name in names} == {name: expected[name] for name in names}
        assert 0 <= figures["av_align"] <= 1
        assert figures["loudness"] == sum(map(loudness, clips)) / 2
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 6 + 3
    assert [row["step"] for row in read_log(folder)] == list(range(6))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_is_the_same_bit_for_bit(tmp_path, precision, lora_rank):
    settings = {"mixed_precision": precision, "lora_rank": lora_rank, "steps": 4}
    settings |= {"gradient_checkpointing": True}
    without, with_samples = (
        (AcceleratorState._reset_state(), run(tmp_path / name, **settings | more))[1]
        for name, more in (("plain", {}), ("sampled", SAMPLED | {"sample_every": 1}))
    )
    AcceleratorState._reset_state()
    assert without[0] == with_samples[0]
    assert all(torch.equal(tensor, with_samples[1][name]) for name, tensor in without[1].items())


def test_the_state_that_sampling_finds_is_the_state_it_leaves():
    model = micro_model()
    model.transformer.train()
    frozen, free = list(model.transformer.parameters())[:2]
    frozen.requires_grad_(False)
    random, block = torch.get_rng_state(), next(iter(model.transformer.children()))
    block.eval()
    with undisturbed(model.transformer):
        assert not any(module.training for module in model.transformer.modules())
        torch.rand(3)
        model.transformer.requires_grad_(True).train()
    assert torch.equal(torch.get_rng_state(), random)
    assert (frozen.requires_grad, free.requires_grad) == (False, True)
    assert model.transformer.training
    assert not block.training


def test_weights_and_losses_are_those_of_a_run_without(plain, sampled):
    assert plain[0] == sampled[1][0]
    assert all(torch.equal(tensor, sampled[1][1][name]) for name, tensor in plain[1].items())


def test_a_resumed_run_samples_no_step_twice(sampled, tmp_path, monkeypatch):
    asked = []
    generate = Tiny.generate

    def watched(model, *arguments, **options):
        asked.append(options)
        return generate(model, *arguments, **options)

    monkeypatch.setattr(Tiny, "generate", watched)
    settings = SAMPLED | {"checkpoint_every": 4}
    run(tmp_path, **settings)
    assert len(asked) == 3
    files = {p: p.read_bytes() for p in tmp_path.glob("samples/*/*.mp4")}
    run(tmp_path, **settings, resume=True)  # nothing is left to do
    assert len(asked) == 3
    # Killed after step 4's checkpoint and samples, before the end.
    max(tmp_path.glob("checkpoint-*")).unlink()
    run(tmp_path, **settings, resume=True)
    assert len(asked) == 4
    assert [step for step, _ in read_figures(tmp_path, "samples")] == [0, 4, 6]
    assert {p: p.read_bytes() for p in files} == files
    # Killed after the checkpoint, before the samples.
    rows = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(r for r in rows if '"samples"' not in r))
    run(tmp_path, **settings, resume=True)
    assert len(asked) == 5
    assert [step for step, _ in read_figures(tmp_path, "samples")] == [6]


def test_a_line_that_was_cut_off_is_no_line(sampled, tmp_path):
    run(tmp_path, checkpoint_every=3)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss"')
    assert len(read_log(tmp_path)) == 6
    max(tmp_path.glob("checkpoint-*")).unlink()
    log, _ = run(tmp_path, resume=True, checkpoint_every=3)
    assert len(log) == 6


def test_samples_are_no_time_of_training(tmp_path, monkeypatch):
    def slow(model, captions, seeds, **options):
        time.sleep(2)
        yield from (render_clip(k) for k in range(len(seeds)))

    monkeypatch.setattr(Tiny, "generate", slow)
    config = TrainConfig(output=str(tmp_path), **SETTINGS | SAMPLED | {"steps": 2})
    result = train(config, micro_model(), random_latents(), progress=False)
    assert result["seconds"] < 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A cache of held-out clips."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "clips").mkdir()
    for seed in range(3):
        write_clip(folder / "clips" / f"{seed}.mp4", render_clip(seed))
    prepare(micro_model(), folder / "clips", folder / "cache", progress=False)
    return folder


def test_given_pictures_get_a_sound(pictures, tmp_path):
    settings = SAMPLED | {"sample_pictures": str(pictures / "cache"), "sample_count": 8, "steps": 1}
    run(tmp_path, **settings)
    folder = tmp_path / "samples"
    about = json.loads((folder / "about.json").read_text())
    assert about["pictures"] == "cache"
    assert len(about["clips"]) == 3  # as many as there are
    assert about["real"]["f1"] > 0.8
    given, real, made = (
        read_clip(path, require_sound=False)
        for path in (
            pictures / "clips" / "1.mp4",
            folder / "real" / "001.mp4",
            folder / "step-000001" / "001.mp4",
        )
    )
    for clip in (real, made):
        assert (clip.video.float() - given.video.float()).abs().mean() < 8
    assert clip_metrics(real).heard.shape == clip_metrics(given).heard.shape
    assert not torch.equal(real.audio, made.audio)


# --- what cannot be done is said before the first step --------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_captions": "rain"}, "sample_captions: expected none without sample_every"),
        ({"metric": "math:floor"}, "metric: expected none without sample_every"),
        (SAMPLED | {"sample_captions": "rain"}, "sample_every: caption: tiny takes no text"),
        (SAMPLED | {"metric": "math:nothing"}, "metric: expected module:function, got 'math:noth"),
        (SAMPLED | {"sample_captions": "no such.txt"}, "no such.txt"),
        (SAMPLED | {"sample_pictures": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_sampled_ends_at_once(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_metric_does_not_take_a_figure_s_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f1(clip):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="metric: expected other names than the figures', got f1"):
        run(tmp_path / "run", **SAMPLED, metric="mine:f1")


def test_weights_in_shards_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr("syncdpo.train.keep_precision", lambda accelerator: None)
    with pytest.raises(ValueError, match=r"sample_every: expected 0 where weights are in shards"):
        run(tmp_path, **SAMPLED)


def test_no_room_is_one_sentence(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And so on.")

    monkeypatch.setattr(Tiny, "generate", full)
    with pytest.raises(ValueError, match=r"sample_every: no room .* at step 0 \(CUDA out of mem"):
        run(tmp_path, **SAMPLED)


def test_room_for_what_the_first_step_will_make(monkeypatch):
    """Sampling at step 0 finds more room than at any later one."""
    transformer = micro_model().transformer
    trained = sum(p.numel() for p in transformer.parameters())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    for free, enough in ((8 * trained + 500, True), (8 * trained + 499, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        if enough:
            samples._check_room(transformer, torch.device("cuda"))
        else:
            with pytest.raises(ValueError, match=r"sample_every: expected .* GB on the GPU"):
                samples._check_room(transformer, torch.device("cuda"))


# --- LTX-2 ----------------------------------------------------------------------------------------

SIZE = {"frames": 17, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx2")
    save_tiny_ltx2(folder / "model")
    (folder / "clips").mkdir()
    for seed in range(2):
        write_clip(folder / "clips" / f"{seed}.mp4", render_clip(seed))
        (folder / "clips" / f"{seed}.txt").write_text("a ball")
    model = load_model(str(folder / "model"), **SIZE)
    prepare(model, folder / "clips", folder / "cache", progress=False)
    return folder


def ltx2_run(folder, output, **settings):
    settings = {"steps": 2, "batch_size": 2, "lora_rank": 2, "log_with": "none"} | settings
    config = TrainConfig(
        model=str(folder / "model"), data=str(folder / "cache"), output=str(output), **settings
    )
    return train(config, progress=False)


def test_ltx2_by_its_pipeline_from_captions(ltx2, tmp_path):
    (tmp_path / "captions.txt").write_text("a ball\n\nrain on a roof\n")
    more = {"sample_every": 2, "sample_count": 1, "sample_steps": 2}
    more |= {"sample_captions": str(tmp_path / "captions.txt")}
    ltx2_run(ltx2, tmp_path / "plain")
    ltx2_run(ltx2, tmp_path / "sampled", **more)
    assert outcome(tmp_path / "plain")[0] == outcome(tmp_path / "sampled")[0]
    clips = sorted((tmp_path / "sampled" / "samples" / "step-000002").glob("*.mp4"))
    assert len(clips) == 2
    assert read_clip(clips[0], require_sound=False).video.shape[:3] == (17, 64, 64)
    about = json.loads((tmp_path / "sampled" / "samples" / "about.json").read_text())
    assert [clip["caption"] for clip in about["clips"]] == ["a ball", "rain on a roof"]


def test_ltx2_without_a_text_encoder_says_so_before_the_first_step(ltx2, tmp_path):
    index = json.loads((ltx2 / "model" / "model_index.json").read_text())
    lacking = tmp_path / "model"
    lacking.mkdir()
    for part in (ltx2 / "model").iterdir():
        if part.is_dir() and part.name != "text_encoder":
            (lacking / part.name).symlink_to(part)
    index["text_encoder"] = [None, None]
    (lacking / "model_index.json").write_text(json.dumps(index))
    more = {"sample_every": 2, "sample_captions": "rain", "data": str(ltx2 / "cache")}
    config = TrainConfig(model=str(lacking), output=str(tmp_path / "run"), lora_rank=2, **more)
    with pytest.raises(ValueError, match=r"sample_every: text_encoder: .* --text-encoder names"):
        train(config, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"sample_every: caption: expected text, which LTX-2 generates from"),
        ({"sample_captions": "rain", "sample_pictures": "cache"}, "sample_pictures: expected none"),
    ],
)
def test_ltx2_needs_captions_and_takes_no_pictures(ltx2, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ltx2_run(ltx2, tmp_path, sample_every=2, **settings)


def test_on_the_command_line_metrics_are_repeated(tmp_path):
    shown = CliRunner().invoke(
        app, ["train", "--show-config", "--metric", "a:f", "--metric", "b:g", "--sample-every", "5"]
    )
    assert shown.exit_code == 0, shown.output
    assert "metric: a:f,b:g" in shown.output
    assert "sample_every: 5" in shown.output
