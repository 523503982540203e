"""Held-out figures: of fixed draws, seen by nobody, the same however a run is cut or stopped."""

import json
import math
import random
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from micro import micro_model, outcome, random_latents, run_or_resume
from processes import processes
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Subset
from typer.testing import CliRunner

from syncdpo import ops
from syncdpo.cli import app
from syncdpo.data.latents import prepare
from syncdpo.data.precomputed import open_latents
from syncdpo.data.synthetic import render_folder
from syncdpo.models.weights import FULL, LORA
from syncdpo.train import train
from syncdpo.training.checkpoint import read_log, read_rows
from syncdpo.training.config import TrainConfig
from syncdpo.training.validation import (
    COST,
    DIFFICULTIES,
    FORWARDS,
    TRAINING_FORWARDS,
    Plan,
    Validation,
    clip_names,
    hold_out,
    ratio_of_means,
)

STEPS = 12
QUICK = {"steps": STEPS, "batch_size": 4, "warmup": 2, "learning_rate": 3e-3, "validate_every": 4}


class Named(list):
    """Clips with names, as those of a cache have."""

    def __init__(self, clips, names=None):
        super().__init__(clips)
        self.names = names or [f"clip-{i:03d}.mp4" for i in range(len(clips))]


def follow(folder, data=None, held_out=None, **settings):
    """A short run; → (its result, its rows)."""
    config = TrainConfig(output=str(folder), **QUICK | settings)
    data = random_latents(10) if data is None else data
    result = train(config, micro_model(), data, held_out=held_out, progress=False)
    return result, read_rows(folder)


def found(rows):
    return {row["step"]: row["validation"] for row in rows if "validation" in row}


def held_out(count=5):
    return Named(random_latents(10 + count)[10:])


def validation(data, **settings):
    config = TrainConfig(**QUICK | settings)
    fresh = {"step": 0, "validation": None}
    return Validation(config, micro_model(), data, Accelerator(cpu=True), fresh, lambda step: None)


# --- which clips ----------------------------------------------------------------------------------


def test_a_share_is_chosen_by_name_and_more_clips_move_none():
    few, many = (Named([{}] * count) for count in (60, 600))
    config = TrainConfig(validation=0.1)
    kept, out = hold_out(config, None, few, None, False)
    more_kept, more_out = hold_out(config, None, many, None, False)
    assert 40 <= len(more_out) <= 80
    assert not set(clip_names(more_out)) & set(clip_names(more_kept))
    assert set(clip_names(out)) == set(clip_names(more_out)) & set(few.names)
    assert len(kept) + len(out) == 60
    order = random.Random(0).sample(few.names, 60)
    _, shuffled = hold_out(config, None, Named([{}] * 60, order), None, False)
    assert set(clip_names(shuffled)) == set(clip_names(out))


def test_names_of_what_has_none_and_of_a_part():
    assert clip_names([{}] * 3) == ["0", "1", "2"]
    assert clip_names(Subset(Named([{}] * 5), [4, 1])) == ["clip-004.mp4", "clip-001.mp4"]


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"validation": 0.001}, None, "validation: 0.001 of these 20 clips.* are 0"),
        ({"validation": 0.1}, [{}], "held_out: expected no validation"),
        ({"keep": "best"}, None, "validation: keep best and patience 0 need held-out clips"),
        ({"patience": 3}, None, "validation: keep last and patience 3 need held-out clips"),
    ],
)
def test_what_cannot_be_held_out_is_refused(settings, given, message):
    with pytest.raises(ValueError, match=message):
        hold_out(TrainConfig(**settings), None, Named([{}] * 20), given, False)


# --- no step is another ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "sft"},
        {"lora_rank": 2},
        {"cache_reference": 3, "gradient_checkpointing": True},
        {"accumulation": 2, "batch_size": 2, "mixed_precision": "bf16"},
        {"curriculum": "adaptive", "keep": "best", "trained": "audio"},
    ],
    ids=lambda settings: "-".join(settings) or "full",
)
def test_looking_changes_no_step(tmp_path, settings):
    AcceleratorState._reset_state()  # one process of accelerate's has one precision
    blind = {k: v for k, v in settings.items() if k != "keep"}
    _, without = follow(tmp_path / "without", **blind)
    _, rows = follow(tmp_path / "with", held_out=held_out(), **settings)
    assert [row for row in rows if "loss" in row] == without
    assert list(found(rows)) == [0, 4, 8, 12]
    if "keep" not in settings:
        (_, weights), (_, others) = (outcome(tmp_path / name) for name in ("with", "without"))
        assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    AcceleratorState._reset_state()


def test_a_share_trains_as_a_cache_without_those_clips(tmp_path):
    data = Named(random_latents(20))
    rest, out = hold_out(TrainConfig(validation=0.3), None, data, None, False)
    assert out
    _, rows = follow(tmp_path / "share", data, validation=0.3)
    _, alone = follow(tmp_path / "alone", [rest[i] for i in range(len(rest))])
    assert [row for row in rows if "loss" in row] == alone
    _, given = follow(tmp_path / "given", rest, held_out=out)
    assert given == rows


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Of rendered clips, as `syncdpo prepare` makes them: to train on, and to validate on."""
    folder = tmp_path_factory.mktemp("caches")
    for name, seeds in (("some", range(6)), ("others", range(100, 103))):
        render_folder(folder / f"{name}-clips", seeds)
        prepare(micro_model(), folder / f"{name}-clips", folder / name, progress=False)
    return folder


def test_another_cache_changes_no_step_either(tmp_path, caches, capsys):
    runs = {}
    for name, options in (("without", {}), ("with", {"validation_data": str(caches / "others")})):
        config = TrainConfig(
            data=str(caches / "some"), output=str(tmp_path / name), **QUICK | options
        )
        train(config, micro_model(), progress=False)
        runs[name] = read_rows(tmp_path / name)
    assert [row for row in runs["with"] if "loss" in row] == runs["without"]
    figures = found(runs["with"])
    assert {f["clips"] for f in figures.values()} == {3}
    assert list(figures) == [0, 4, 8, 12]


def test_clips_of_a_cache_are_called_what_their_files_are(caches):
    whole = open_latents(caches / "some", micro_model())
    assert len(clip_names(whole)) == len(set(clip_names(whole))) == 6
    assert sorted(clip_names(whole)) == sorted(
        path.name for path in (caches / "some-clips").iterdir()
    )


def test_the_command_line_says_which_step_it_left(tmp_path, caches):
    arguments = ["train", "--data", caches / "some", "--validation-data", caches / "others"]
    arguments += ["--output", tmp_path, "--steps", 2, "--batch-size", 2, "--keep", "best"]
    # A rate at which one step ruins the base: step 0 stays the best.
    done = CliRunner().invoke(app, [str(a) for a in [*arguments, "--learning-rate", 0.5]])
    assert done.exit_code == 0, done.output
    assert f"weights of step 0 in {tmp_path}" in done.output
    wrong = ["train", "--data", caches / "some", "--output", tmp_path / "x", "--patience", 2]
    done = CliRunner().invoke(app, [str(a) for a in wrong])
    assert done.exit_code != 0
    assert "need held-out clips" in done.output + str(done.exception)


# --- what the figures are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"normalize": True, "beta_audio": 5.0}, {"beta_video": 30.0}]
)
def test_figures_are_those_of_the_loss(settings):
    """Margins, accuracy and errors by `dpo_loss`, from the same draws, one clip after the other."""
    data, model = held_out(3), micro_model()
    own = validation(data, **settings)
    config = own.config
    policy = micro_model().transformer
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    reference, _ = own._errors(model.transformer)
    errors, valid = own._errors(policy)
    figures = own.figures(errors, reference, valid)
    margins = torch.zeros(3, len(DIFFICULTIES))
    winners, references = torch.zeros(3, 2), torch.zeros(3, 2)
    for clip in range(3):
        draw = own.draw(data.names[clip])
        for level in range(len(DIFFICULTIES)):
            clean = tuple(data[clip][name][None] for name in ("video", "audio"))
            pairs = draw.pairs[[level]].make(*clean)
            assert all(torch.equal(*same) for same in zip(pairs.win, clean, strict=True))
            noisy = ops.paired_noise(pairs.win, pairs.lose, draw.sigma, draw.seed)
            sigma = tuple(torch.cat([s, s]) for s in draw.sigma)
            with torch.no_grad():
                outputs = [
                    model.velocity(transformer, noisy, sigma, {})
                    for transformer in (policy, model.transformer)
                ]
            target = [
                ops.Velocity(torch.cat(both), draw.seed, m)
                for m, both in enumerate(zip(pairs.win, pairs.lose, strict=True))
            ]
            _, stats = ops.dpo_loss(
                *outputs,
                target,
                beta=(config.beta_video, config.beta_audio),
                normalize="reference" if config.normalize else None,
                return_stats=True,
            )
            margins[clip, level] = stats.margin.sum()
            winners[clip], references[clip] = stats.policy_win[:, 0], stats.reference_win[:, 0]
    for level, difficulty in enumerate(DIFFICULTIES):
        expected = margins[:, level].mean().item()
        assert figures[f"margin_{difficulty:g}"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        hits = (margins[:, level] > 0).float().mean().item()
        assert figures[f"accuracy_{difficulty:g}"] == pytest.approx(hits)
    assert margins.abs().min() > 1e-4  # nothing of this was a comparison of zeros
    ratios = winners.mean(0) / references.mean(0)
    assert figures["video_ratio"] == pytest.approx(ratios[0].item(), rel=1e-5)
    assert figures["audio_ratio"] == pytest.approx(ratios[1].item(), rel=1e-5)
    assert figures["winner_ratio"] == max(figures["video_ratio"], figures["audio_ratio"])
    assert figures["sft_loss"] == pytest.approx(winners.mean(0).sum().item(), rel=1e-5)


def test_a_ratio_of_few_clips_is_known_less_well():
    """At least 97 of 100 sets of clips have theirs below the ratio of all there could be."""
    chance = torch.Generator().manual_seed(0)
    below = torch.rand(100, 12, 2, generator=chance, dtype=torch.float64) ** 4 + 0.01
    above = 2 * below + 0.3 * torch.rand(100, 12, 2, generator=chance, dtype=torch.float64)
    whole = above.mean() / below.mean()
    found = [ratio_of_means(a, b) for a, b in zip(above, below, strict=True)]
    least = torch.stack([least for _, least in found])
    assert (least < whole).double().mean() >= 0.97
    assert least.median() > 0.5 * whole
    ratio, same = ratio_of_means(3 * below[0], below[0])  # the same factor for every clip
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0))
    torch.testing.assert_close(same, ratio)


def test_a_clip_has_its_draws_whatever_is_beside_it_and_in_whichever_batch():
    everything, model = held_out(7), micro_model()
    whole = validation(everything, batch_size=3)
    few = Named([everything[4], everything[1]], [everything.names[4], everything.names[1]])
    part = validation(few, batch_size=1)
    errors, valid = whole._errors(model.transformer)
    others, _ = part._errors(model.transformer)
    assert valid.all()
    assert errors.min() > 0
    for row, name in enumerate(part.names):
        torch.testing.assert_close(others[row], errors[whole.names.index(name)], rtol=1e-5, atol=0)
    again = validation(everything, batch_size=3, seed=1)
    reseeded, _ = again._errors(model.transformer)
    assert not torch.isclose(reseeded, errors, rtol=1e-6).any()


def test_the_model_is_left_as_it_was():
    own, model = validation(held_out()), micro_model()
    model.transformer.train()
    state = torch.get_rng_state()
    own._errors(model.transformer)
    assert model.transformer.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.transformer.parameters())


@pytest.mark.parametrize("method", ["sft", "syncdpo"])
def test_a_run_is_measured_against_its_beginning(tmp_path, method):
    _, rows = follow(tmp_path, method=method, held_out=held_out(), learning_rate=1e-2)
    first, *_, last = found(rows).values()
    assert first["winner_ratio"] == first["video_ratio"] == first["audio_ratio"] == 1
    for difficulty in DIFFICULTIES:
        assert first[f"margin_{difficulty:g}"] == 0
        assert first[f"accuracy_{difficulty:g}"] == 0.5
    assert last["audio_ratio"] < 0.97  # it learns what such clips have in common
    assert last["margin_0"] != 0
    assert last["sft_loss"] < first["sft_loss"]


def test_or_against_the_base_where_that_is_the_reference(tmp_path):
    follow(tmp_path / "first", method="sft", lora_rank=2, learning_rate=3e-2)
    lora = {"weights": str(tmp_path / "first"), "lora_rank": 2, "learning_rate": 1e-12}
    for reference in ("weights", "base"):
        folder = tmp_path / reference
        _, rows = follow(folder, held_out=held_out(), reference=reference, **lora)
        ratios = [figures["winner_ratio"] for figures in found(rows).values()]
        if reference == "weights":
            assert ratios == pytest.approx([1.0] * 4, abs=1e-6)
        else:
            assert max(ratios) < 0.99


def test_silent_clips_have_no_accuracy_and_are_never_the_best(tmp_path):
    silent = Named([clip | {"audio": torch.zeros_like(clip["audio"])} for clip in held_out()])
    result, rows = follow(tmp_path, held_out=silent, keep="best")
    for figures in found(rows).values():
        assert figures["valid"] == 0
        assert figures["accuracy_1"] is None
        assert figures["best_step"] is None
    assert result["kept_step"] == STEPS


def test_figures_stand_in_the_bar_and_among_the_curves(tmp_path, capsys):
    data, out = Named(random_latents(10)), held_out()
    config = TrainConfig(output=str(tmp_path), **QUICK)
    train(config, micro_model(), data, held_out=out)
    bar = capsys.readouterr().err
    last = found(read_rows(tmp_path))[STEPS]
    assert f"held-out={last['accuracy_1']:.2f}" in bar
    assert f"winners=×{last['winner_ratio']:.2f}" in bar
    events = EventAccumulator(str(tmp_path / "syncdpo")).Reload()
    curve = events.Scalars("validation/audio_ratio")
    assert [point.step for point in curve] == [0, 4, 8, 12]
    assert curve[-1].value == pytest.approx(last["audio_ratio"], rel=1e-6)


# --- how much it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "syncdpo"])
@pytest.mark.parametrize("clips", [4, 26, 1000])
@pytest.mark.parametrize(("steps", "batch_size"), [(60, 16), (1000, 8), (20_000, 64)])
def test_by_default_it_costs_a_twentieth_at_most(method, clips, steps, batch_size):
    config = TrainConfig(method=method, steps=steps, batch_size=batch_size)
    plan = Plan.of(config, clips, 1)
    times = len({0, steps, *range(0, steps, plan.every)})
    training = steps * batch_size * TRAINING_FORWARDS[method]
    assert times * plan.clips * FORWARDS <= 0.05 * training
    assert times >= 5
    assert plan.clips * plan.every > 0
    more = Plan(plan.clips + 1, plan.every) if plan.clips < clips else None
    if more:  # not idle either: one clip more would be too much, or nearly so
        assert times * (plan.clips + times) * FORWARDS > 0.8 * COST * training
    asked = Plan.of(TrainConfig(validate_every=7), clips, 1)
    assert asked == Plan(clips, 7)


def test_fewer_clips_than_were_held_out_are_said(tmp_path, capsys):
    follow(tmp_path, held_out=held_out(), validate_every=0)
    assert "validation: 1 of 5 held-out clips, every" in capsys.readouterr().err


# --- the best one ---------------------------------------------------------------------------------


def figures(accuracy, loss, ratio=1.0):
    return {"accuracy_1": accuracy, "sft_loss": loss, "winner_ratio_least": ratio}


def test_what_is_best():
    own = validation(held_out(), winner_bound=1.2, patience=2)
    assert own._is_best(0, figures(0.5, 3.0))
    assert own._is_best(4, figures(0.8, 3.5, 1.2))  # more of the pairs, within the bound
    assert not own._is_best(8, figures(0.9, 3.5, 1.21))
    assert own.state["without_better"] == 1
    assert own._is_best(12, figures(0.8, 3.4))  # of equals, who has forgotten less
    assert not own.out_of_patience
    assert not own._is_best(16, figures(0.8, 3.4))
    assert not own._is_best(20, figures(math.nan, math.nan, math.nan))
    assert own.out_of_patience
    assert own.state["best"]["step"] == 12


def test_sft_goes_by_its_loss():
    own = validation(held_out(), method="sft", winner_bound=1.2)
    assert own._is_best(0, figures(0.5, 3.0))
    assert not own._is_best(4, figures(0.9, 3.1))
    assert own._is_best(8, figures(0.4, 2.9))
    assert own._is_best(12, figures(None, 2.8))
    assert not own._is_best(16, figures(0.9, 2.7, 1.3))


def best_at(monkeypatch, *steps):
    """Runs find these steps the best so far, one after the other."""
    honest = Validation._is_best

    def is_best(self, step, figures):
        honest(self, step, figures)
        if step in steps:
            self.state["best"] = {"step": step, "accuracy": 1.0, "sft_loss": 1.0}
            self.state["without_better"] = 0
        else:
            self.state["best"] = self.state["best"] and dict(self.last)
        self.last = self.state["best"] or {}
        return step in steps

    monkeypatch.setattr(Validation, "_is_best", is_best)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_best_weights_are_left_in_the_end(tmp_path, monkeypatch, lora):
    follow(tmp_path / "last", held_out=held_out(), lora_rank=lora)
    best_at(monkeypatch, 0, 4, 8)
    settings = {"lora_rank": lora, "held_out": held_out(), "checkpoint_every": 8}
    result, rows = follow(tmp_path / "best", keep="best", **settings)
    assert result["kept_step"] == 8
    assert result["steps"] == STEPS
    assert [f["best_step"] for f in found(rows).values()] == [0, 4, 8, 8]
    file = LORA if lora else FULL
    kept = load_file(tmp_path / "best" / file)
    last = load_file(tmp_path / "last" / file)
    assert any(not torch.equal(tensor, last[name]) for name, tensor in kept.items())
    raw = load_file(tmp_path / "best" / "best-000008.safetensors")
    then = load_file(tmp_path / "best" / "checkpoint-000008.safetensors")
    assert all(torch.equal(tensor, then[f"weights/{name}"]) for name, tensor in raw.items())
    model = micro_model()
    model.load_weights(tmp_path / "best" / "best-000008.safetensors")  # as they are, too
    again = micro_model()
    again.load_weights(tmp_path / "best")
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(tensor, again.transformer.state_dict()[name])
    assert [p.name for p in (tmp_path / "best").glob("best-*")] == ["best-000008.safetensors"]
    assert "| weights of step | `8` |" in (tmp_path / "best" / "README.md").read_text()


def test_a_step_0_that_nothing_betters_is_what_is_left(tmp_path):
    """Winners that err more than the bound allows are no improvement, however well told apart."""
    result, rows = follow(
        tmp_path, held_out=held_out(), keep="best", winner_bound=0.5, method="sft", steps=4
    )
    assert result["kept_step"] == 4  # not even the start is within half its own error
    assert found(rows)[4]["best_step"] is None
    again, rows = follow(
        tmp_path / "again", held_out=held_out(), keep="best", learning_rate=3.0, steps=4
    )
    assert found(rows)[4]["winner_ratio"] > 2.5
    assert again["kept_step"] == 0
    start = micro_model().transformer.state_dict()
    weights = load_file(tmp_path / "again" / FULL)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights.items())


def test_patience_ends_a_run_and_the_same_command_does_not_go_on(tmp_path):
    settings = {"held_out": held_out(), "steps": 40, "learning_rate": 1.0, "schedule": "constant"}
    result, rows = follow(tmp_path, patience=2, **settings)
    best = result["steps"] - 8
    assert result["steps"] < 40
    assert found(rows)[result["steps"]]["best_step"] == best
    assert len(read_log(tmp_path)) == result["steps"]
    again, same = follow(tmp_path, patience=2, resume=True, **settings)
    assert (again["steps"], same) == (result["steps"], rows)
    on, _ = follow(tmp_path, patience=0, resume=True, **settings)
    assert on["steps"] == 40
    assert len(read_log(tmp_path)) == 40


def test_nothing_else_ends_a_run(tmp_path):
    result, _ = follow(tmp_path, held_out=held_out(), steps=24, learning_rate=1.0)
    assert result["steps"] == 24


# --- stopped and gone on --------------------------------------------------------------------------


WATCHED = {"validation": 0.4, "validate_every": 2, "keep": "best", "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_or_resume(folder, **WATCHED)
    return folder


@pytest.mark.parametrize("method", ["syncdpo", "sft"])
@pytest.mark.parametrize("every", [4, 5])
def test_a_resumed_run_finds_the_same_figures(tmp_path, monkeypatch, method, every):
    """Also where the last checkpoint is older than the last validation."""
    from syncdpo import train as module

    settings = {"method": method, "keep": "best", "held_out": held_out(), "checkpoint_every": every}
    whole, rows = follow(tmp_path / "whole", **settings)
    save_checkpoint = module.save_checkpoint

    def stop(config, policy, optimizer, difficulty, state, writes):
        if state["step"] > 8:
            raise KeyboardInterrupt
        save_checkpoint(config, policy, optimizer, difficulty, state, writes)

    monkeypatch.setattr(module, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path / "stopped", **settings)
    monkeypatch.undo()
    result, again = follow(tmp_path / "stopped", resume=True, **settings)
    assert again == rows
    assert result["kept_step"] == whole["kept_step"]
    (_, weights), (_, others) = (outcome(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_held_out_clips_are_not_exchanged_in_between(tmp_path):
    follow(tmp_path, held_out=held_out(5))
    with pytest.raises(ValueError, match="resume: expected the held-out clips that the run"):
        follow(tmp_path, held_out=held_out(4), resume=True)


def test_best_weights_that_were_not_kept_are_looked_for_anew(tmp_path, capsys):
    follow(tmp_path, held_out=held_out(), keep="last")
    result, _ = follow(tmp_path, held_out=held_out(), keep="best", resume=True)
    assert "keep: the weights of step 12, the best so far, are not in" in capsys.readouterr().err
    assert result["kept_step"] == STEPS


def test_the_best_weights_survive_sigkill(undisturbed, tmp_path):
    """Killed at random: whatever a checkpoint calls the best is there, and whole."""
    context, chance = processes(), random.Random(0)
    kills = 0
    while kills < 6:
        child = context.Process(target=run_or_resume, args=(tmp_path,), kwargs=WATCHED)
        child.start()
        before = {path.name for path in tmp_path.glob("*-0*")}
        deadline = time.monotonic() + 60
        while child.is_alive() and time.monotonic() < deadline:
            if {path.name for path in tmp_path.glob("*-0*")} != before:
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
        assert_best_is_there(tmp_path)
        if child.exitcode == 0:
            assert_same_run(undisturbed, tmp_path)
            for path in tmp_path.glob("*"):
                path.unlink()
    final = context.Process(target=run_or_resume, args=(tmp_path,), kwargs=WATCHED)
    final.start()
    final.join()
    assert final.exitcode == 0
    assert_same_run(undisturbed, tmp_path)


def assert_best_is_there(folder):
    for path in folder.glob("best-*"):
        assert load_file(path), path
    for path in folder.glob("checkpoint-*"):
        best = checkpoint_header(path)["progress"]["validation"]["best"]
        assert (folder / f"best-{best['step']:06d}.safetensors").is_file(), (path, best)


def checkpoint_header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["syncdpo"])


def assert_same_run(expected, folder):
    assert found(read_rows(folder)) == found(read_rows(expected))
    weights = load_file(folder / FULL)
    assert all(torch.equal(t, weights[name]) for name, t in load_file(expected / FULL).items())


# --- several processes ----------------------------------------------------------------------------


def test_processes_share_clips_and_have_as_many_forwards_each():
    shares = []
    for rank in range(3):
        own = validation(held_out(9), batch_size=2)
        own.accelerator = SimpleNamespace(num_processes=3, process_index=rank)
        shares.append(own._share())
    assert [len(share) for share in shares] == [2, 2, 2]  # five batches over three
    counted = sorted(row for share in shares for rows, counts in share if counts for row in rows)
    assert counted == list(range(9))
