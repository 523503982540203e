"""Training from weights of another run or tool: where it starts, and against what."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import LTX2Pipeline
from micro import micro_model, outcome, random_latents, run
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_ltx2 import HEADS, TEXT, VERSIONS, WIDTH, save_tiny_ltx2

from syncdpo.models.lora_keys import original_name
from syncdpo.models.ltx2 import LTX2
from syncdpo.models.tiny import Tiny
from syncdpo.models.weights import LORA, of_audio
from syncdpo.train import policy_and_reference, train
from syncdpo.training.adapter import (
    REFERENCE,
    as_reference,
    keep_reference,
    loaded_pairs,
    train_adapter,
)
from syncdpo.training.checkpoint import load_checkpoint
from syncdpo.training.config import TrainConfig

STILL = 1e-12  # a learning rate that moves nothing


def write_lora(path, rank=4, wanted=lambda name: True, extra=(), transformer=None):
    """What ltx-trainer leaves: the attentions' LoRA, not small, without alpha; → its pairs."""
    generator = torch.Generator().manual_seed(3)
    pairs, tensors = {}, {}
    transformer = transformer or micro_model().transformer
    for name, module in transformer.named_modules():
        if not name.endswith(Tiny.lora_targets + tuple(extra)) or not wanted(name):
            continue
        a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
        b = 0.2 * torch.randn(module.out_features, rank, generator=generator)
        pairs[name] = (a, b)
        key = f"diffusion_model.{original_name(name)}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(tensors, path)
    return pairs


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora_weights_step_02000.safetensors"
    return path, write_lora(path)


@torch.no_grad()
def velocities(model, samples=None, transformer=None) -> torch.Tensor:
    conditions = torch.utils.data.default_collate(samples or random_latents(2))
    latents = (conditions.pop("video"), conditions.pop("audio"))
    sigma = (torch.full((2,), 0.5), torch.full((2,), 0.3))
    streams = model.velocity(transformer or model.transformer, latents, sigma, conditions)
    return torch.cat([stream.flatten() for stream in streams])


def merged(pairs) -> torch.Tensor:
    """The velocities of W + B·A."""
    model = micro_model()
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            model.transformer.get_submodule(name).weight += b @ a
    return velocities(model)


def after(folder) -> torch.Tensor:
    """The velocities of the weights that a run left."""
    model = micro_model()
    model.load_weights(folder)
    return velocities(model)


@pytest.mark.parametrize("rank", [0, 2, 4, 6])
def test_training_starts_at_the_velocities_of_a_lora(tmp_path, lora, rank, capsys):
    """Not at the base's, whichever rank is asked for; and the file that is left stands alone."""
    path, pairs = lora
    log, weights = run(tmp_path, weights=str(path), lora_rank=rank, steps=2, learning_rate=STILL)
    assert log[0]["margin"] == 0
    assert log[0]["implicit_accuracy"] == 0.5
    expected, base = merged(pairs), velocities(micro_model())
    torch.testing.assert_close(after(tmp_path), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).norm() > 0.05 * base.norm()
    if rank:
        assert {len(t) for n, t in weights.items() if "lora_A" in n} == {max(rank, 4)}
    said = "lora_rank: 2, but 24 modules of the LoRA in weights keep their own, up to 4"
    assert (said in capsys.readouterr().err) == (rank == 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_ltx2_goes_on_from_an_ltx_trainer_lora(tmp_path, version):
    """And what comes of it loads into diffusers' pipeline, with the velocities it began with."""
    folder = save_tiny_ltx2(tmp_path / "model", version)
    model = LTX2(folder, frames=17, height=64, width=64)
    pairs = write_lora(tmp_path / "theirs.safetensors", transformer=model.transformer)
    data = ltx2_samples(model)
    config = TrainConfig(
        output=str(tmp_path / "run"), weights=str(tmp_path / "theirs.safetensors"), lora_rank=4,
        steps=1, batch_size=2, learning_rate=STILL, rules="shift",
    )  # fmt: skip
    train(config, model, data, progress=False)
    log, _ = outcome(tmp_path / "run")
    assert (log[0]["margin"], log[0]["implicit_accuracy"]) == (0, 0.5)

    pipeline = LTX2Pipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "run")
    fresh, expected = (LTX2(folder, frames=17, height=64, width=64) for _ in range(2))
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            expected.transformer.get_submodule(name).weight += b @ a
    found, wanted, base = (
        velocities(fresh, data, transformer)
        for transformer in (pipeline.transformer, expected.transformer, fresh.transformer)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - base).norm() > 0.01 * base.norm()


def ltx2_samples(model, count=2):
    generator = torch.Generator().manual_seed(5)
    video, audio = (t.frames * t.tokens for t in model.timelines)
    prompt = model.config["use_prompt_embeddings"]
    text = (TEXT, TEXT) if prompt else (HEADS * WIDTH, HEADS * WIDTH // 2)
    shapes = {
        "video": (video, model.config["in_channels"]),
        "audio": (audio, model.config["audio_in_channels"]),
        "video_text": (4, text[0]),
        "audio_text": (4, text[1]),
    }
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("rank", [0, 4])
def test_the_base_is_the_reference_on_demand(tmp_path, lora, rank):
    """The margin is then that of the LoRA over the base, from the first step."""
    settings = {"weights": str(lora[0]), "lora_rank": rank, "steps": 1, "learning_rate": STILL}
    log, _ = run(tmp_path / "base", reference="base", **settings)
    assert log[0]["margin"] != 0
    own, _ = run(tmp_path / "own", **settings)
    for name in ("video_error_win", "audio_error_win", "audio_error_lose"):
        assert log[0][name] == own[0][name]
    sums = {name: log[0][f"audio_error_{name}"] for name in ("win", "lose")}
    base, _ = run(tmp_path / "plain", steps=1, learning_rate=STILL)
    anchor = {name: base[0][f"audio_error_{name}"] for name in ("win", "lose")}
    # margin = −½ β Δ of the audio, whose β is 10 by default
    delta = (sums["win"] - anchor["win"]) - (sums["lose"] - anchor["lose"])
    assert log[0]["margin"] == pytest.approx(-0.5 * 10 * delta, rel=1e-3)


@pytest.mark.parametrize("rank", [0, 2])
def test_all_weights_against_the_base_they_replace(tmp_path, rank):
    run(tmp_path / "first", method="sft", learning_rate=1e-2)
    settings = {"weights": str(tmp_path / "first"), "lora_rank": rank, "steps": 1}
    assert run(tmp_path / "own", **settings)[0][0]["margin"] == 0
    assert run(tmp_path / "base", reference="base", **settings)[0][0]["margin"] != 0


def test_the_reference_stays_while_the_lora_moves(tmp_path, lora):
    """Its errors, made once before the first step, are those that it gives as it goes."""
    settings = {"weights": str(lora[0]), "lora_rank": 6, "learning_rate": 1e-3, "steps": 6}
    cached, _ = run(tmp_path / "cached", cache_reference=2, **settings)
    lively, weights = run(tmp_path / "lively", draws=2, **settings)
    margins = [[row["margin"] for row in log] for log in (cached, lively)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-4, abs=1e-6)
    assert abs(margins[1][-1]) > 1e-4
    moved = (after(tmp_path / "lively") - merged(lora[1])).norm()
    assert moved > 1e-3
    assert not any(REFERENCE in name for name in weights)


def test_a_resumed_run_goes_on_exactly(tmp_path, lora):
    settings = {"weights": str(lora[0]), "lora_rank": 6, "learning_rate": 1e-3}
    settings |= {"steps": 8, "checkpoint_every": 4}
    whole = run(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for name in ("checkpoint-000008.safetensors", LORA):
        (tmp_path / "stopped" / name).unlink()
    again = run(tmp_path / "stopped", resume=True, **settings)
    assert again[0] == whole[0]
    assert again[1].keys() == whole[1].keys()
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in again[1].items())


def test_another_reference_is_another_run(tmp_path, lora):
    settings = {"weights": str(lora[0]), "lora_rank": 4, "steps": 1}
    run(tmp_path, **settings)
    config = TrainConfig(output=str(tmp_path), resume=True, reference="base", **settings)
    with pytest.raises(ValueError, match="other settings"):
        load_checkpoint(config, None, None, None)


def test_a_lora_of_the_picture_is_kept_and_the_sound_gets_its_own(tmp_path):
    """What people have is often a LoRA of the picture; SyncDPO teaches the sound."""
    path = tmp_path / "picture.safetensors"
    pairs = write_lora(path, wanted=lambda name: not of_audio(name), extra=("ff.net.2",))
    log, weights = run(
        tmp_path / "run", weights=str(path), lora_rank=2, trained="audio", learning_rate=1e-3
    )
    assert log[0]["margin"] == 0
    for name, (a, b) in pairs.items():
        key = f"diffusion_model.{original_name(name)}"
        assert torch.equal(weights[f"{key}.lora_A.weight"], a)
        assert torch.equal(weights[f"{key}.lora_B.weight"], b)
    fresh = [t for n, t in weights.items() if of_audio(n) and n.endswith("lora_B.weight")]
    assert len(fresh) == 12
    assert any(tensor.abs().max() > 0 for tensor in fresh)
    assert any("ff.net.2" in name for name in weights)


@pytest.fixture
def other_precision():
    """One process of accelerate's has one precision, unless its state is forgotten."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_a_lora_goes_on_in_more_than_the_models_precision(tmp_path, lora, other_precision):
    """A base in bfloat16 does not round the LoRA that it is given, nor what it is merged into."""
    path, pairs = lora
    settings = {"weights": str(path), "mixed_precision": "bf16", "dtype": torch.bfloat16}
    settings |= {"steps": 1, "learning_rate": STILL}
    _, weights = run(tmp_path / "lora", lora_rank=4, **settings)
    for name, (a, b) in pairs.items():
        key = f"diffusion_model.{original_name(name)}"
        torch.testing.assert_close(weights[f"{key}.lora_A.weight"], a)
        torch.testing.assert_close(weights[f"{key}.lora_B.weight"], b)
    _, whole = run(tmp_path / "all", **settings)
    for name, (a, b) in pairs.items():
        weight = micro_model().transformer.get_submodule(name).weight.detach().bfloat16().float()
        torch.testing.assert_close(whole[f"{name}.weight"], weight + b @ a)


def test_what_does_not_belong_is_refused_or_left_out_by_name(tmp_path, lora, capsys):
    tensors = load_file(lora[0]) | {"text_embedding_projection.lora_A.weight": torch.ones(1, 1)}
    path = tmp_path / "more.safetensors"
    save_file(tensors, path)
    settings = {"weights": str(path), "lora_rank": 4, "steps": 1}
    with pytest.raises(ValueError, match=r"text_embedding_projection.*--allow-partial"):
        run(tmp_path / "no", **settings)
    log, _ = run(tmp_path / "yes", allow_partial=True, **settings)
    assert "text_embedding_projection.lora_A.weight; they are left out" in capsys.readouterr().err
    assert log[0]["margin"] == 0


def test_the_reference_is_the_adapter_as_it_was_and_nothing_else_changes(lora):
    model = micro_model()
    model.load_weights(lora[0])
    transformer = model.transformer
    train_adapter(transformer, 6, Tiny.lora_targets, lambda name: True, seed=0)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and of_audio(name))
    before = {name: p.requires_grad for name, p in transformer.named_parameters()}
    started = velocities(model)
    keep_reference(transformer)
    assert torch.equal(velocities(model), started)
    with torch.no_grad():
        for a, b in loaded_pairs(transformer).values():
            a += 1
            b += 1
    assert not torch.allclose(velocities(model), started)
    found = {name: p.requires_grad for name, p in transformer.named_parameters()}
    assert found == before | {name: False for name in found if f".{REFERENCE}." in name}
    with as_reference(transformer):
        assert torch.equal(velocities(model), started)
        assert {name: p.requires_grad for name, p in transformer.named_parameters()} == found
    assert not torch.allclose(velocities(model), started)
    assert {name: p.requires_grad for name, p in transformer.named_parameters()} == found


def test_an_adapter_of_ones_own_keeps_its_scale():
    """One that was put there by peft, with any alpha, before training began."""
    model = micro_model()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.transformer.add_adapter(config)
    before = velocities(model)
    train_adapter(model.transformer, 3, Tiny.lora_targets, lambda name: True, seed=0)
    torch.testing.assert_close(velocities(model), before, rtol=1e-4, atol=1e-5)
    assert (before - velocities(micro_model())).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("method", ["sft", "syncdpo"])
def test_no_copy_is_kept_that_nobody_asks_for(lora, method):
    model = micro_model()
    policy, reference = policy_and_reference(TrainConfig(method=method, lora_rank=2), model)
    assert reference is None
    assert not any(REFERENCE in name for name, _ in policy.named_parameters())


def test_a_seed_of_random_halves_is_the_runs_own(tmp_path, lora):
    """Two runs that widen one LoRA, or reach further than it, add the same."""
    for name in ("one", "other"):
        torch.manual_seed(len(name))
        config = TrainConfig(
            output=str(tmp_path / name), weights=str(lora[0]), lora_rank=6, steps=1, warmup=0,
            batch_size=2,
        )  # fmt: skip
        train(config, micro_model(), random_latents(2), progress=False)
    one, other = (outcome(tmp_path / name)[1] for name in ("one", "other"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
