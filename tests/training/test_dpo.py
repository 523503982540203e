"""DPO of given pairs: SyncDPO's own losers, written out, train as SyncDPO does."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from micro import micro_model, outcome, random_latents, random_pairs
from tiny_ltx2 import save_tiny_ltx2
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from syncdpo import ops
from syncdpo.cli import app
from syncdpo.data.clips import write_clip
from syncdpo.data.items import Item
from syncdpo.data.latents import LatentDataset, prepare_items
from syncdpo.data.synthetic import render
from syncdpo.models.ltx2 import LTX2
from syncdpo.models.model_card import model_card
from syncdpo.negatives import given_pairs
from syncdpo.negatives.curriculum import curriculum
from syncdpo.report import write_run_report
from syncdpo.train import train
from syncdpo.training.checkpoint import read_log, read_rows
from syncdpo.training.config import TrainConfig
from syncdpo.training.dice import Dice, Order
from syncdpo.training.memory import needed_bytes, size_of, step_flop
from syncdpo.training.validation import Plan
from syncdpo.training.watchdog import History, accuracy_stuck, pairs_alike, too_few_clips

CLIPS, STEPS, BATCH = 12, 9, 4
SETTINGS = {"steps": STEPS, "batch_size": BATCH, "warmup": 2, "learning_rate": 3e-4}


@dataclass(frozen=True)
class Written(Item):
    """Latents that go into a cache as they are."""

    latents: dict = field(default_factory=dict)

    def decode(self, formats):
        return None, self.latents

    def flags(self, latents):
        return []

    def encode(self, model, latents, caption):
        return latents

    def found(self, latents):
        return {"shared": [s for s in ("video", "audio") if f"{s}_lose" not in latents]}

    def notes(self, latents):
        return ()


def written(folder: Path, pairs: list[dict], **own) -> LatentDataset:
    """A cache on disk, of pairs, that holds these."""
    items = []
    for number, latents in enumerate(pairs):
        path = folder / f"{number:03d}"
        folder.mkdir(exist_ok=True)
        path.touch()
        target = folder / "cache" / "latents" / f"{number:03d}.safetensors"
        items.append(Written(path, path.name, None, target, latents=latents))
    out, own = folder / "cache", own or {"pairs": True}
    prepare_items(
        micro_model(),
        lambda: (items, []),
        out,
        captioned=False,
        own=own,
        progress=False,
        unit="pairs",
    )
    return LatentDataset(out, micro_model().identity())


def own_losers(config: TrainConfig, data: list[dict]) -> list[dict]:
    """The pairs that SyncDPO makes of these clips: in its one draw, or where each comes first."""
    order = Order(config, len(data), Accelerator(cpu=True))
    dice = Dice(config, micro_model(), curriculum(config.curriculum), order, torch.device("cpu"))
    if config.draws_per_clip:
        rolls = [dice.draw(0, list(range(len(data))))]
    else:
        rolls = [dice.roll(step, 0) for step in range(config.steps)]
    pairs = {}
    for roll in rolls:
        clips = roll.clips.tolist()
        made = roll.pairs.make(
            *(torch.stack([data[i][s] for i in clips]) for s in ("video", "audio"))
        )
        for row, clip in enumerate(clips):
            assert made.lose[0] is made.win[0] or torch.equal(made.lose[0], made.win[0])
            names = ("video", "audio", "audio_lose")
            tensors = (made.win[0], made.win[1], made.lose[1])
            pairs[clip] = {n: x[row].clone() for n, x in zip(names, tensors, strict=True)}
    return [pairs[clip] for clip in range(len(data))]


def trained(folder, data, config):
    config = replace(config, output=str(folder))
    result = train(config, micro_model(), data, progress=False)
    return *outcome(folder), result


def assert_same_training(first, second, rtol=1e-6):
    """Every figure of the log but the difficulty, and all weights as one vector."""
    for row, other in zip(first[0], second[0], strict=True):
        assert row.keys() - {"difficulty"} == other.keys()
        assert {k: row[k] for k in other} == pytest.approx(other, rel=rtol, abs=1e-6)
    assert first[1].keys() == second[1].keys()
    difference = sum((x - second[1][name]).square().sum() for name, x in first[1].items())
    size = sum(x.square().sum() for x in first[1].values())
    assert (difference / size).sqrt() <= rtol


@pytest.mark.parametrize(
    "settings",
    [
        {"draws": 1, "matched": 0.5},
        {"draws": 1, "matched": 0.0, "lora_rank": 2, "split_pair": True, "accumulation": 2,
         "batch_size": 2},
        {"draws": 1, "matched": 1.0, "logistic": "separate", "normalize": True, "beta_video": 5.0,
         "sft_weight": 0.1, "trained": "audio"},
        {"cache_reference": 1, "matched": 0.5, "beta_audio": 500.0},
        {"steps": 3, "matched": 0.5},  # each clip once, drawn anew at every step
    ],
    ids=["draws", "lora", "options", "cached reference", "drawn anew"],
)  # fmt: skip
def test_syncdpos_own_losers_written_out_train_as_syncdpo_does(tmp_path, settings):
    data = random_latents(CLIPS)
    syncdpo = TrainConfig(curriculum="constant", rules="replace+scale", **SETTINGS | settings)
    of_no_rule = {name: getattr(TrainConfig(), name) for name in ("rules", "matched", "curriculum")}
    dpo = replace(syncdpo, method="dpo", **of_no_rule)
    pairs = written(tmp_path / "pairs", own_losers(syncdpo, data))
    made = trained(tmp_path / "syncdpo", data, syncdpo)
    given = trained(tmp_path / "dpo", pairs, dpo)
    assert_same_training(made, given)
    assert made[0][-1]["margin"] != 0
    untrained = micro_model().transformer.state_dict()
    if not syncdpo.lora_rank:
        assert any(not torch.equal(x, untrained[name]) for name, x in given[1].items())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return written(tmp_path_factory.mktemp("pairs"), random_pairs(CLIPS))


def test_losers_of_both_streams_are_learnt(tmp_path, pairs):
    config = TrainConfig(
        method="dpo", steps=40, batch_size=4, learning_rate=1e-2, beta_video=200.0,
        beta_audio=200.0, sft_weight=0.0, output=str(tmp_path),
    )  # fmt: skip
    train(config, micro_model(), pairs, progress=False)
    log = read_log(tmp_path)
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert log[0]["video_error_win"] != log[0]["video_error_lose"]
    assert sum(row["implicit_accuracy"] for row in log[-15:]) / 15 > 0.8
    assert "difficulty" not in log[0]


def test_the_loss_is_that_of_the_pairs_by_hand(tmp_path, pairs):
    """The first step of all: the policy is the reference, the loss ln 2 and the winners' error."""
    config = TrainConfig(method="dpo", output=str(tmp_path), **SETTINGS | {"steps": 1})
    train(config, micro_model(), pairs, progress=False)
    [row] = read_log(tmp_path)
    order = Order(config, len(pairs), Accelerator(cpu=True))
    dice = Dice(config, micro_model(), curriculum("linear"), order, torch.device("cpu"))
    roll, model = dice.roll(0, 0), micro_model()
    batch = torch.utils.data.default_collate([pairs[i] for i in roll.clips.tolist()])
    for half, suffix in (("win", ""), ("lose", "_lose")):
        clean = [batch[f"{stream}{suffix}"] for stream in ("video", "audio")]
        noise = [ops.noise(x.shape, roll.seed, stream=m) for m, x in enumerate(clean)]
        levels = [sigma.view(-1, 1, 1) for sigma in roll.sigma]
        noisy = list(map(torch.lerp, clean, noise, levels))
        with torch.no_grad():
            velocity = model.velocity(model.transformer, noisy, roll.sigma, {})
        for m, stream in enumerate(("video", "audio")):
            error = (velocity[m] - (noise[m] - clean[m])).square().mean()
            assert row[f"{stream}_error_{half}"] == pytest.approx(error.item(), rel=1e-4)


def test_a_stream_that_one_pair_shares_stands_twice_and_one_that_all_share_once(tmp_path):
    some = random_pairs(4)
    del some[1]["video_lose"]
    mixed = written(tmp_path / "mixed", some)
    assert torch.equal(mixed[1]["video_lose"], mixed[1]["video"])
    assert {frozenset(pair) for pair in mixed} == {
        frozenset(("video", "audio", "video_lose", "audio_lose"))
    }
    for pair in some:
        pair.pop("video_lose", None)
    assert {frozenset(p) for p in written(tmp_path / "all", some)} == {
        frozenset(("video", "audio", "audio_lose"))
    }


def test_alike_pairs_do_not_count(pairs):
    batch = next(iter(DataLoader(pairs, batch_size=3)))
    win = (batch["video"], batch["audio"])
    lose = (batch["video"], batch["audio_lose"].clone())
    lose[1][1] = win[1][1]
    assert given_pairs(win, lose).valid.tolist() == [True, False, True]
    assert given_pairs(win, (batch["video_lose"], win[1])).valid.tolist() == [True] * 3


# --- what is not meant for it ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", [{"rules": "shift"}, {"matched": 0.0}, {"curriculum": "constant"}]
)
def test_settings_of_rules_are_refused(setting):
    [name] = setting
    with pytest.raises(ValueError, match=f"{name}: expected none with method: dpo"):
        TrainConfig(method="dpo", **setting)


@pytest.mark.parametrize("held_out", [False, True])
def test_clips_are_refused_for_dpo(tmp_path, pairs, held_out):
    clips = written(tmp_path / "clips", random_latents(4), trigger="x")
    config = TrainConfig(method="dpo", output=str(tmp_path / "run"), **SETTINGS)
    data = {"data": pairs, "held_out": clips} if held_out else {"data": clips}
    name = "held_out" if held_out else "data"
    with pytest.raises(ValueError, match=f"{name}: expected a cache of pairs for method: dpo"):
        train(config, micro_model(), **data, progress=False)
    with pytest.raises(ValueError, match="got clips in data"):
        train(config, micro_model(), random_latents(4), progress=False)


@pytest.mark.parametrize("method", ["sft", "syncdpo"])
def test_other_methods_train_on_the_winners_and_say_so(tmp_path, pairs, capsys, method):
    winners = [{s: pair[s] for s in ("video", "audio")} for pair in random_pairs(CLIPS)]
    config = TrainConfig(method=method, validation=0.3, validate_every=4, **SETTINGS)
    named = written(tmp_path / "winners", winners, trigger="x")
    of_winners = trained(tmp_path / "clips", named, config)
    fresh = LatentDataset(pairs.folder)
    config = replace(config, output=str(tmp_path / "run"))
    train(config, micro_model(), fresh, progress=True)
    assert "holds pairs, and method: " + method in capsys.readouterr().err
    log, weights = outcome(tmp_path / "run")
    assert log == of_winners[0]
    assert all(torch.equal(x, of_winners[1][name]) for name, x in weights.items())
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "clips")


# --- held-out pairs, resumption, what is said -----------------------------------------------------


def test_held_out_pairs_have_one_accuracy_and_change_nothing(tmp_path, pairs):
    half = [pairs[i] for i in range(8)]
    rest = [pairs[i] for i in range(8, 12)]
    config = TrainConfig(
        method="dpo", validate_every=3, beta_video=50.0, beta_audio=50.0, **SETTINGS
    )
    plain = trained(tmp_path / "plain", half, config)
    watched = replace(config, keep="best", output=str(tmp_path / "watched"), winner_bound=1e9)
    result = train(watched, micro_model(), half, held_out=rest, progress=False)
    assert read_log(tmp_path / "watched") == plain[0]
    found = {row["step"]: row["validation"] for row in read_rows(tmp_path / "watched")
             if "validation" in row}  # fmt: skip
    assert sorted(found) == [0, 3, 6, 9]
    names = {name for name in found[0] if name.startswith(("accuracy", "margin"))}
    assert names == {"accuracy_pairs", "margin_pairs"}
    assert found[0]["accuracy_pairs"] == 0.5
    assert found[0]["margin_pairs"] == 0
    assert found[0]["valid"] == 1
    assert found[9]["margin_pairs"] != 0
    best = max(found, key=lambda s: (found[s]["accuracy_pairs"], -found[s]["sft_loss"], -s))
    assert result["kept_step"] == best == found[9]["best_step"]


def test_a_held_out_share_takes_all_pairs_of_a_winner(tmp_path):
    """As it goes by the winner's name."""
    cache = written(tmp_path / "pairs", random_pairs(4))
    for clip, win in zip(cache.clips, ("a", "b", "a", "b"), strict=True):
        clip["win"] = win
    assert cache.names == ["a", "b", "a", "b"]


def test_what_a_validation_costs_counts_its_two_forwards():
    costs = {
        method: Plan.of(TrainConfig(method=method, steps=100), 1000, 1).clips
        for method in ("syncdpo", "dpo")
    }
    assert costs["dpo"] == pytest.approx(2 * costs["syncdpo"], abs=2)


def test_a_killed_run_goes_on_exactly(tmp_path, monkeypatch, pairs):
    from syncdpo import train as module

    config = TrainConfig(method="dpo", validation=0.3, checkpoint_every=4, **SETTINGS)
    whole = trained(tmp_path / "whole", pairs, config)
    save_checkpoint = module.save_checkpoint

    def stop_after_checkpoint(*arguments):
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", stop_after_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", pairs, config)
    monkeypatch.undo()
    resumed = trained(tmp_path / "stopped", pairs, replace(config, resume=True))
    assert resumed[0] == whole[0]
    assert all(torch.equal(x, resumed[1][name]) for name, x in whole[1].items())
    assert read_rows(tmp_path / "stopped") == read_rows(tmp_path / "whole")


def test_the_card_says_what_it_is_and_nothing_of_rules(tmp_path, pairs):
    trained(tmp_path, pairs, TrainConfig(method="dpo", **SETTINGS | {"steps": 1}))
    card = (tmp_path / "README.md").read_text()
    assert "DPO (Diffusion-DPO's loss" in card
    assert f"| pairs | {CLIPS} |" in card
    facts = card.partition("## All settings")[0]
    assert "| beta audio |" in facts
    assert not any(f"| {name} |" in facts for name in ("rules", "matched", "curriculum"))
    base = {"name": "tiny", "repository": None, "version": None, "fingerprint": "0"}
    settings = json.loads(json.dumps(vars(TrainConfig())))
    assert "| rules |" in model_card("x", base, settings, 3, "")


def test_warnings_speak_of_pairs():
    config = TrainConfig(method="dpo", steps=8, batch_size=100)
    history = History(config, 4, 100)
    for step in range(8):
        row = {"step": step, "skipped": 0, "valid": 0.6, "implicit_accuracy": 0.5, "loss": 0.7}
        history.add(row)
    assert "winners of data are the better ones" in accuracy_stuck(history)
    assert "4 pairs, each seen 200 times" in too_few_clips(history)
    history.steps = [row | {"valid": 0.1} for row in history.steps]
    assert "set data to pairs that differ" in pairs_alike(history)


@pytest.mark.parametrize("more", [{}, {"split_pair": True}, {"cache_reference": 2}])
def test_it_needs_what_syncdpo_needs(more):
    configs = [TrainConfig(method=method, **more) for method in ("syncdpo", "dpo")]
    sizes = [size_of(config, micro_model()) for config in configs]
    memory, work = (
        [needed(config, size, 96, 50) for config, size in zip(configs, sizes, strict=True)]
        for needed in (needed_bytes, step_flop)
    )
    assert memory[0] == memory[1]
    assert work[0] == work[1]


def test_a_page_of_such_a_run(tmp_path, pairs):
    config = TrainConfig(method="dpo", validation=0.3, validate_every=4, **SETTINGS)
    trained(tmp_path, pairs, config)
    text = write_run_report(tmp_path).read_text()
    assert "dpo, model tiny, 9 of 9 steps" in text
    assert "Held-out clips" in text


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def test_pairs_of_several_formats_on_ltx2(tmp_path, monkeypatch):
    """By the shipped configuration; a caption is encoded once, for both clips of a pair."""
    asked, conditions = [], LTX2.conditions
    monkeypatch.setattr(
        LTX2, "conditions", lambda self, texts: asked.append(texts) or conditions(self, texts)
    )
    model = save_tiny_ltx2(tmp_path / "model")
    rows = ["win,lose,caption"]
    for seed in range(4):
        for side, offset in (("win", 0.0), ("lose", 0.3)):
            seconds = 2.0 if seed % 2 else 0.8
            clip = render(seed, offset=offset, seconds=seconds).clip
            write_clip(tmp_path / f"{side}{seed}.mp4", clip)
        rows.append(f"win{seed}.mp4,lose{seed}.mp4,ball {seed}")
    (tmp_path / "PAIRS.csv").write_text("\n".join(rows))
    buckets = ("--bucket", "41x64x64", "--bucket", "17x64x64")
    made = ("prepare-pairs", tmp_path / "PAIRS.csv", "-o", tmp_path / "pairs", "--model", model)
    assert "2 in 17x64x64" in invoke(*made, *buckets)
    assert asked == [[f"ball {seed}"] for seed in range(4)]
    config = Path(__file__).parents[2] / "configs" / "ltx2_dpo.yaml"
    invoke(
        "train", "--config", config, "--model", model, "--data", tmp_path / "pairs", "--output",
        tmp_path / "run", "--steps", 4, "--accumulation", 1, "--mixed-precision", "fp32",
        "--warmup", 0, "--learning-rate", 1e-2, "--workers", 0, "--lora-rank", 2,
    )  # fmt: skip
    log = read_log(tmp_path / "run")
    assert len(log) == 4
    assert all(row["valid"] == 1 and math.isfinite(row["loss"]) for row in log)
    assert log[-1]["margin"] != 0
