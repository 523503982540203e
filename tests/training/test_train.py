"""Training: the same numbers however a run is cut into processes, micro-steps, halves or pieces."""

import math
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from micro import STEPS, micro_model, one_of_two, outcome, random_latents, run, run_or_resume
from processes import free_port, processes
from safetensors.torch import load_file

from syncdpo.models.tiny import Tiny
from syncdpo.models.weights import FULL, of_audio
from syncdpo.negatives.curriculum import curriculum
from syncdpo.train import PATIENCE, learning_rate_factor, train
from syncdpo.training.adapter import adapter_switched_off, train_adapter
from syncdpo.training.checkpoint import read_log
from syncdpo.training.config import TrainConfig, TrainingDiverged
from syncdpo.training.dice import Dice, Order


def losses(log):
    return torch.tensor([entry["loss"] for entry in log], dtype=torch.float64)


def assert_same(first, second, rtol):
    """Losses by relative error; weights too, all of them as one vector."""
    torch.testing.assert_close(losses(first[0]), losses(second[0]), rtol=rtol, atol=0)
    difference = sum((tensor - second[1][name]).square().sum() for name, tensor in first[1].items())
    size = sum(tensor.square().sum() for tensor in first[1].values())
    assert (difference / size).sqrt() <= rtol


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


def test_sft_learns(tmp_path):
    log, _ = run(tmp_path, method="sft", steps=60, learning_rate=1e-2)
    loss = losses(log)
    assert loss[-10:].mean() < 0.8 * loss[:10].mean()
    assert {"video_error", "audio_error"} <= log[0].keys()


def test_syncdpo_learns_to_prefer_the_winner(tmp_path):
    settings = {"steps": 80, "learning_rate": 1e-2, "curriculum": "constant", "beta_audio": 500.0}
    log, _ = run(tmp_path, rules="shift", matched=0.0, sft_weight=0.0, **settings)
    accuracy = [entry["implicit_accuracy"] for entry in log]
    assert accuracy[0] == 0.5  # policy and reference agree
    assert sum(accuracy[-20:]) / 20 > 0.7
    assert losses(log)[-20:].mean() < losses(log)[0] == pytest.approx(math.log(2), rel=1e-5)


def test_difficulty_follows_the_curriculum(undisturbed):
    difficulty = [entry["difficulty"] for entry in undisturbed[0]]
    expected = [min(1.0, step / STEPS / 0.8) for step in range(STEPS)]
    assert difficulty == pytest.approx(expected, abs=1e-6)


def test_same_seed_same_bits(undisturbed, tmp_path):
    again = run(tmp_path)
    assert torch.equal(losses(undisturbed[0]), losses(again[0]))
    assert all(torch.equal(tensor, again[1][name]) for name, tensor in undisturbed[1].items())


def test_another_seed_is_another_run(undisturbed, tmp_path):
    assert not torch.equal(losses(undisturbed[0]), losses(run(tmp_path, seed=1)[0]))


def test_accumulation_changes_nothing(undisturbed, tmp_path):
    assert_same(undisturbed, run(tmp_path, batch_size=2, accumulation=2), rtol=1e-5)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return run(tmp_path_factory.mktemp("short"), steps=4)


@pytest.mark.parametrize(
    "setting",
    [
        {"schedule": "constant"},
        {"weight_decay": 1.0},
        {"max_grad_norm": 1e-9},
        {"beta_video": 100.0},
        {"normalize": True},
        {"logistic": "separate"},
        {"trained": "audio"},
        {"rules": "shift"},
        {"matched": 1.0},
        {"curriculum": "stages"},
        {"sft_weight": 0.0},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_every_setting_makes_another_run(short, tmp_path, setting):
    log, weights = run(tmp_path, steps=4, **setting)
    same = torch.equal(losses(log), losses(short[0]))
    same = same and all(torch.equal(tensor, short[1][name]) for name, tensor in weights.items())
    assert not same


def test_reading_ahead_changes_nothing(short, tmp_path):
    weights = run(tmp_path, steps=4, workers=1)[1]
    assert all(torch.equal(tensor, short[1][name]) for name, tensor in weights.items())


def test_learning_rate_rises_and_falls_as_the_schedule_says():
    config = TrainConfig(steps=14, warmup=4)
    constant, linear, cosine = (
        [learning_rate_factor(replace(config, schedule=name), step) for step in range(15)]
        for name in ("constant", "linear", "cosine")
    )
    assert constant[:5] == linear[:5] == cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert constant[5:] == [1.0] * 10
    assert linear[5:] == pytest.approx([1 - k / 10 for k in range(1, 11)])
    assert cosine[5:] == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(1, 11)])


def test_split_pair_has_the_same_gradients(undisturbed, tmp_path):
    assert_same(undisturbed, run(tmp_path, split_pair=True), rtol=1e-5)
    torch.testing.assert_close(
        losses(undisturbed[0]), losses(read_log(tmp_path)), rtol=1e-6, atol=0
    )


def test_cached_reference_changes_nothing(tmp_path):
    # A random model errs by 2; a difference of such numbers is known to β times their rounding.
    plain = run(tmp_path / "plain", draws=3, beta_audio=10.0)
    cached = run(tmp_path / "cached", cache_reference=3, beta_audio=10.0)
    torch.testing.assert_close(losses(plain[0]), losses(cached[0]), rtol=1e-6, atol=0)


def test_sft_draws_the_same_noise_and_no_pairs():
    rolls = {}
    for method in ("sft", "syncdpo"):
        config, accelerator = TrainConfig(method=method, batch_size=4), Accelerator(cpu=True)
        order, difficulty = Order(config, 10, accelerator), curriculum("linear")
        dice = Dice(config, micro_model(), difficulty, order, accelerator.device)
        rolls[method] = dice.roll(3, 0)
    sft, syncdpo = rolls["sft"], rolls["syncdpo"]
    assert sft.pairs is None
    assert syncdpo.pairs is not None
    for name in ("clips", "seed"):
        assert torch.equal(getattr(sft, name), getattr(syncdpo, name))
    assert all(torch.equal(*streams) for streams in zip(sft.sigma, syncdpo.sigma, strict=True))


def test_draws_repeat_within_a_stage_only(tmp_path):
    """With one clip and two draws, there are two kinds of steps: one per half of the run."""
    config = TrainConfig(
        output=str(tmp_path), steps=6, batch_size=1, draws=2, learning_rate=1e-12, warmup=0
    )
    train(config, micro_model(), random_latents(1), progress=False)
    loss = losses(read_log(tmp_path))
    assert torch.allclose(loss[:3], loss[0], rtol=1e-5)
    assert torch.allclose(loss[3:], loss[3], rtol=1e-5)
    assert not torch.isclose(loss[0], loss[3], rtol=1e-3)


def test_lora_trains_the_adapter_alone_against_its_absence(tmp_path):
    log, weights = run(tmp_path, lora_rank=2)
    assert all("lora_" in name for name in weights)
    assert log[0]["margin"] == 0  # a fresh adapter changes nothing
    assert log[-1]["margin"] != 0
    model = micro_model()
    model.load_weights(tmp_path)
    loaded = dict(model.transformer.named_parameters())
    name = next(n for n in loaded if "lora_B" in n)
    assert loaded[name].abs().sum() > 0


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA that an earlier run left, and its weights."""
    folder = tmp_path_factory.mktemp("lora")
    return folder, run(folder, method="sft", lora_rank=2, learning_rate=1e-2)[1]


def test_training_goes_on_with_a_lora(tmp_path, lora):
    """Against itself by default: tests/test_lora_reference.py has the other reference."""
    log, weights = run(tmp_path, weights=str(lora[0]), lora_rank=2, learning_rate=1e-12)
    assert log[0]["margin"] == 0
    assert weights.keys() == lora[1].keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, lora[1][name])


def test_a_lora_is_merged_where_all_weights_are_trained(tmp_path, lora):
    log, _ = run(tmp_path, weights=str(lora[0]), learning_rate=1e-12)
    assert log[0]["margin"] == 0
    adapted = micro_model()
    adapted.load_weights(lora[0])
    adapted.transformer.fuse_lora()
    merged = micro_model()
    merged.load_weights(tmp_path)
    latents = torch.utils.data.default_collate(random_latents(2))
    arguments = (latents["video"], latents["audio"]), (torch.full((2,), 0.5),) * 2, {}
    with torch.no_grad():
        one, other, base = (
            torch.cat([v.flatten() for v in model.velocity(model.transformer, *arguments)])
            for model in (adapted, merged, micro_model())
        )
    torch.testing.assert_close(one, other)
    assert (one - base).norm() > 1e-3 * base.norm()


def test_the_audio_alone_is_trained(tmp_path):
    """The picture's half keeps its bits, and what is saved is whole."""
    _, weights = run(tmp_path, trained="audio")
    before = micro_model().transformer.state_dict()
    assert weights.keys() == before.keys()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in changed if of_audio(name)}
    parts = {name.split(".")[2] for name in changed if name.startswith("transformer_blocks")}
    assert {"audio_attn1", "audio_ff", "video_to_audio_attn"} <= parts
    micro_model().load_weights(tmp_path)


def test_a_lora_of_the_audio_alone(tmp_path):
    _, weights = run(tmp_path, trained="audio", lora_rank=2)
    modules = {name.split(".")[3] for name in weights}
    assert modules == {"audio_attn1", "audio_attn2", "video_to_audio_attn"}


def test_training_the_audio_alone_keeps_the_rest_of_a_lora(tmp_path, lora):
    """What it says of the picture stays as it was, is saved, and is no part of the base."""
    settings = {"trained": "audio", "weights": str(lora[0]), "lora_rank": 2}
    log, weights = run(tmp_path, reference="base", **settings)
    assert log[0]["margin"] != 0
    assert weights.keys() == lora[1].keys()
    for name, tensor in weights.items():
        if not of_audio(name):
            assert torch.equal(tensor, lora[1][name])
    assert any(not torch.equal(weights[name], lora[1][name]) for name in weights if of_audio(name))


def test_a_frozen_part_of_an_adapter_stays_frozen():
    transformer = micro_model().transformer
    train_adapter(transformer, 2, Tiny.lora_targets, lambda name: True, seed=0)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and of_audio(name))
    before = [parameter.requires_grad for parameter in transformer.parameters()]
    with adapter_switched_off(transformer):
        assert [parameter.requires_grad for parameter in transformer.parameters()] == before
    assert [parameter.requires_grad for parameter in transformer.parameters()] == before


def test_training_starts_from_all_weights(tmp_path):
    _, weights = run(tmp_path / "first", method="sft", learning_rate=1e-3)
    log, again = run(tmp_path / "second", weights=str(tmp_path / "first"), learning_rate=1e-12)
    assert log[0]["margin"] == 0
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, weights[name])


def test_gradient_checkpointing_changes_nothing(undisturbed, tmp_path):
    assert_same(undisturbed, run(tmp_path, gradient_checkpointing=True), rtol=1e-5)


@pytest.mark.parametrize(
    "extra", [{}, {"lora_rank": 2}, {"trained": "audio"}, {"curriculum": "adaptive"}]
)
def test_a_resumed_run_goes_on_exactly(tmp_path, monkeypatch, extra):
    whole = run(tmp_path / "whole", **extra)
    stopped = tmp_path / "stopped"

    def stop_after_checkpoint(*arguments):
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    from syncdpo import train as module

    save_checkpoint = module.save_checkpoint
    monkeypatch.setattr(module, "save_checkpoint", stop_after_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, checkpoint_every=7, **extra)
    monkeypatch.undo()
    resumed = run(stopped, checkpoint_every=7, resume=True, **extra)
    assert torch.equal(losses(whole[0]), losses(resumed[0]))
    assert [entry["step"] for entry in resumed[0]] == list(range(STEPS))
    assert all(torch.equal(tensor, resumed[1][name]) for name, tensor in whole[1].items())


def test_sigkill_at_random_steps_twenty_times(undisturbed, tmp_path):
    context, chance = processes(), random.Random(0)
    kills = 0
    while kills < 20:
        child = context.Process(target=run_or_resume, args=(tmp_path,))
        child.start()
        before = set(tmp_path.glob("checkpoint-*"))
        deadline = time.monotonic() + 60
        while child.is_alive() and time.monotonic() < deadline:
            if set(tmp_path.glob("checkpoint-*")) != before:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        child.kill()  # nothing happens if it has come to its end
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
        for path in tmp_path.glob("checkpoint-*"):
            assert load_file(path), path  # whole, whenever it is looked at
        if child.exitcode == 0:  # it came to its end: start over, the kills are not done
            assert_same(undisturbed, outcome(tmp_path), rtol=1e-5)
            for path in filter(Path.is_file, tmp_path.glob("*")):
                path.unlink()
    final = context.Process(target=run_or_resume, args=(tmp_path,))
    final.start()
    final.join()
    assert final.exitcode == 0
    assert_same(undisturbed, outcome(tmp_path), rtol=1e-5)


def test_a_nan_clip_skips_its_steps_and_is_counted(tmp_path):
    data = random_latents(8)
    data[3]["audio"][0, 0] = math.nan
    config = TrainConfig(output=str(tmp_path), steps=8, batch_size=2)
    result = train(config, micro_model(), data, progress=False)
    assert result["skipped"] == 2  # once an epoch, of four steps
    assert all(t.isfinite().all() for t in load_file(tmp_path / FULL).values())


def test_ten_nan_steps_in_a_row_stop_the_run(tmp_path):
    data = random_latents(4)
    good = TrainConfig(output=str(tmp_path), steps=40, batch_size=4, checkpoint_every=1)
    seen = 0

    class TurnsBad(list):
        def __getitem__(self, index):
            nonlocal seen
            seen += 1
            sample = dict(list.__getitem__(self, index))
            return sample if seen <= 12 else {k: v * math.nan for k, v in sample.items()}

    with pytest.raises(TrainingDiverged, match=f"no finite gradient in {PATIENCE} steps"):
        train(good, micro_model(), TurnsBad(data), progress=False)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert checkpoints[-1].name == "checkpoint-000003.safetensors"
    assert all(t.isfinite().all() for t in load_file(checkpoints[-1]).values())


def test_a_run_is_not_overwritten_nor_continued_with_other_settings(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds a run"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"beta_audio was 10\.0, is 9\.0"):
        run(tmp_path, resume=True, beta_audio=9.0)


def test_two_processes_equal_one(undisturbed, tmp_path):
    context, port = processes(), free_port()
    children = [context.Process(target=one_of_two, args=(r, port, tmp_path)) for r in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(180)
    assert [child.exitcode for child in children] == [0, 0]
    assert_same(undisturbed, outcome(tmp_path), rtol=1e-5)
