"""Training on clips of several formats: each as if it were alone, and however a run is cut."""

import itertools
import json
import math
import shutil
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from launching import assert_same, launch, losses
from micro import micro_model, outcome, random_latents
from tiny_ltx2 import save_tiny_ltx2
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.buckets import Bucket
from syncdpo.data.clips import write_clip
from syncdpo.data.latents import LatentDataset
from syncdpo.data.precomputed import open_latents
from syncdpo.data.synthetic import render
from syncdpo.models.ltx2 import LTX2
from syncdpo.negatives.curriculum import curriculum
from syncdpo.train import Learner, policy_and_reference, train
from syncdpo.training import validation
from syncdpo.training.checkpoint import read_figures, read_log
from syncdpo.training.config import TrainConfig
from syncdpo.training.dice import Dice, Order

WIDE, TALL, BRIEF = Bucket(41, 32, 64, 24.0), Bucket(41, 64, 32, 24.0), Bucket(17, 64, 64, 24.0)
MANY = [WIDE] * 7 + [TALL] * 3 + [BRIEF] * 4
STEPS = 12


class Latents(list):
    """What a cache of several formats gives; the clips of each format are always the same."""

    def __init__(self, buckets):
        self.buckets = list(buckets)
        numbers = Counter()
        for bucket in self.buckets:
            self.append(latents(bucket, numbers[bucket]))
            numbers[bucket] += 1


def latents(bucket, number):
    generator = torch.Generator().manual_seed(hash(bucket) % 2**31 + number)
    frames = (bucket.frames - 1) // 8 + 1
    tokens = bucket.height // 32 * bucket.width // 32
    video = torch.randn(frames, tokens, 8, generator=generator).cumsum(0) / 3
    audio = torch.randn(round(bucket.seconds * 25), 4, generator=generator).cumsum(0) / 4
    text = {
        "video_text": torch.randn(1024, 32, generator=generator),
        "audio_text": torch.randn(1024, 16, generator=generator),
    }
    return {"video": video.flatten(0, 1), "audio": audio} | text


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory):
    return save_tiny_ltx2(tmp_path_factory.mktemp("ltx2"), "2.3", layers=1)


def settings(**given):
    defaults = {"steps": STEPS, "batch_size": 2, "warmup": 2, "learning_rate": 1e-3, "lora_rank": 2}
    return TrainConfig(**defaults | given)


def order_of(config, buckets):
    return Order(config, len(buckets), Accelerator(cpu=True), buckets)


def dice_of(config, buckets, model):
    order = order_of(config, buckets)
    difficulty = curriculum(config.curriculum)
    return Dice(config, model, difficulty, order, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(ltx2):
    def run(folder, buckets=MANY, **given):
        config = settings(output=str(folder), **given)
        train(config, LTX2(ltx2), Latents(buckets), progress=False)
        return outcome(folder)

    return run


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


# --- which clips a step sees ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_clip_once_an_epoch_and_none_is_lost(batch, seed):
    order = order_of(settings(batch_size=batch, seed=seed), MANY)
    seen = Counter()
    steps, total = 0, 60 * len(MANY)
    while sum(seen.values()) < total:
        clips = order.step(steps)
        assert len({MANY[clip] for clip in clips}) == 1
        assert len(clips) == batch
        seen.update(clips)
        steps += 1
        epochs = sum(seen.values()) / len(MANY)
        for group in order.groups.values():  # no format runs ahead by more than its turn
            counts = [seen[clip] for clip in group]
            assert max(counts) - min(counts) <= math.ceil(batch / len(group))
    epochs = total / len(MANY)
    for group in order.groups.values():
        share = sum(seen[clip] for clip in group)
        assert abs(share - epochs * len(group)) <= 2 * batch


def test_within_an_epoch_the_formats_are_shuffled():
    order = order_of(settings(batch_size=1), [WIDE] * 20 + [TALL] * 20)
    turns = [order.turn(step)[0] for step in range(40)]
    assert Counter(turns) == {WIDE: 20, TALL: 20}
    changes = sum(one != other for one, other in itertools.pairwise(turns))
    assert 10 <= changes <= 30
    other = [order.turn(step)[0] for step in range(40, 80)]
    assert Counter(other) == {WIDE: 20, TALL: 20}
    assert other != turns


def test_a_format_has_the_clips_of_a_run_of_its_own():
    order = order_of(settings(), MANY)
    owns = Counter()
    for step in range(50):
        bucket, own = order.turn(step)
        assert own == owns[bucket]
        owns[bucket] += 1
        group = [clip for clip, mine in enumerate(MANY) if mine == bucket]
        alone = order_of(settings(), [bucket] * len(group))
        assert order.step(step) == [group[clip] for clip in alone.step(own)]


def test_one_format_keeps_the_order_that_it_had():
    """The permutation of each epoch, cut into steps: whether a bucket is named or not."""
    config = settings(batch_size=4, seed=3)
    for buckets in (None, [None] * 10, [WIDE] * 10):
        order = Order(config, 10, Accelerator(cpu=True), buckets)
        found = [clip for step in range(25) for clip in order.step(step)]
        for epoch in range(10):
            assert sorted(found[10 * epoch : 10 * epoch + 10]) == list(range(10))
    # As it was drawn before there were several formats.
    assert found[:10] == [4, 3, 9, 2, 5, 6, 0, 7, 8, 1]


def test_every_process_has_the_same_format_at_once():
    config = settings(batch_size=1, accumulation=2)
    whole = order_of(settings(batch_size=4), MANY)
    parts = []
    for rank in range(2):
        order = order_of(config, MANY)
        order.rank, order.world, order.batch = rank, 2, 4
        parts.append(order)
    for step in range(30):
        clips = [
            parts[rank].step(step)[row]
            for micro in range(2)
            for rank in range(2)
            for row in parts[rank].rows(micro)
        ]
        assert clips == whole.step(step)


def test_the_reference_sees_every_clip_once():
    """In as many batches of as many clips on every process."""
    shares, counted = [], Counter()
    for rank in range(4):
        order = order_of(settings(batch_size=2), MANY)
        order.rank, order.world = rank, 4
        shares.append(order.shares())
        for share in shares[-1]:
            assert len({MANY[clip] for clip, _ in share}) == 1
            counted.update(clip for clip, counts in share if counts)
    assert counted == dict.fromkeys(range(len(MANY)), 1)
    assert len({tuple(map(len, share)) for share in shares}) == 1


# --- what is drawn for a clip ---------------------------------------------------------------------


def assert_same_roll(one, other):
    assert torch.equal(one.seed, other.seed)
    for mine, theirs in zip(one.sigma, other.sigma, strict=True):
        assert torch.equal(mine, theirs)
    for name in ("knots", "start", "length", "donor_start", "rule"):
        assert torch.equal(getattr(one.pairs.second, name), getattr(other.pairs.second, name))
    assert torch.equal(one.pairs.matched, other.pairs.matched)
    assert one.pairs.timelines == other.pairs.timelines


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("kind", [WIDE, TALL, BRIEF], ids=str)
def test_draws_are_those_of_a_run_on_the_format_alone(draws, kind, ltx2):
    """σ by the shift of its own tokens, noise, distortions: the same bits whichever others share
    the epoch. Steps are the format's own, at the difficulty of the run's, here a constant."""
    config = settings(draws=draws, curriculum="constant", steps=40)
    mixed, model = dice_of(config, MANY, LTX2(ltx2)), LTX2(ltx2)
    model.set_format(*kind)  # as a cache of one format does, which names no buckets
    alone = dice_of(config, [None] * MANY.count(kind), model)
    if draws:
        group = mixed.order.groups[kind]
        for stage in range(draws):
            assert_same_roll(mixed.draw(stage, group), alone.draw(stage, list(range(len(group)))))
        return
    compared = 0
    for step in range(40):
        bucket, own = mixed.order.turn(step)
        if bucket == kind:
            assert_same_roll(mixed.roll(step, 0), alone.roll(own, 0))
            compared += 1
    assert compared > 5


def sigma_of(model, *buckets):
    """[buckets, streams, clips], from the same random numbers for each."""
    clips = [bucket for bucket in buckets for _ in range(64)]
    dice = dice_of(settings(draws=1), clips, model)
    return [dice.draw(0, dice.order.groups[bucket]).sigma for bucket in buckets]


def test_sigma_is_shifted_by_the_tokens_of_the_batch(ltx2):
    """Four thousand against three, 126 of sound against 18: higher noise, but for the tenth that is
    uniform whatever the shift. A bound below both leaves nothing to tell them by."""
    large, small = Bucket(121, 512, 512, 24.0), Bucket(17, 32, 32, 24.0)
    for high, low in zip(*sigma_of(LTX2(ltx2), large, small), strict=True):
        assert (high >= low).all()
        assert 0.8 < (high > low).float().mean() < 1
    for high, low in zip(*sigma_of(LTX2(ltx2, shift_bound=3), large, small), strict=True):
        assert torch.equal(high, low)


# --- losses ---------------------------------------------------------------------------------------


def reference_errors(ltx2, folder, buckets):
    """Those of the untrained model, by format and number within it."""
    config = settings(output=str(folder), cache_reference=2)
    model, data = LTX2(ltx2), Latents(buckets)
    policy, reference = policy_and_reference(config, model)
    learner = Learner(config, Accelerator(cpu=True), model, policy, reference, False)
    dice = dice_of(config, buckets, model)
    learner.cache_reference(data, dice)
    return {
        (buckets[clip], dice.order.number[clip]): learner.reference_errors[:, clip]
        for clip in range(len(buckets))
    }


def test_a_clip_has_the_same_loss_whichever_others_share_its_epoch(ltx2, tmp_path):
    """Of errors for every clip and draw, to the last bit: in any company, and in any order."""
    mixed = reference_errors(ltx2, tmp_path, MANY)
    company = {
        "alone": [TALL] * 3,
        "with one other": [TALL] * 3 + [BRIEF] * 9,
        "in between": [WIDE, TALL, BRIEF, TALL, WIDE, TALL],
    }
    for buckets in company.values():
        found = reference_errors(ltx2, tmp_path, buckets)
        for number in range(3):
            assert torch.equal(found[TALL, number], mixed[TALL, number])
    assert not torch.equal(mixed[TALL, 0], mixed[TALL, 1])


def test_the_losses_of_a_format_are_those_of_a_run_on_it_alone(run, tmp_path):
    """Step by step; the learning rate is so small that the weights stay as they are."""
    still = {"learning_rate": 1e-12, "curriculum": "constant", "steps": 20}
    mixed, _ = run(tmp_path / "mixed", **still)
    order = order_of(settings(**still), MANY)
    for kind in (WIDE, BRIEF):
        alone, _ = run(tmp_path / str(kind), [kind] * MANY.count(kind), **still)
        pairs = [
            (mixed[step]["loss"], alone[own]["loss"])
            for step in range(20)
            for bucket, own in [order.turn(step)]
            if bucket == kind
        ]
        assert len(pairs) >= 5
        torch.testing.assert_close(*torch.tensor(pairs, dtype=torch.float64).T, rtol=1e-6, atol=0)


def test_killed_and_resumed_it_ends_in_the_same_bits(run, undisturbed, tmp_path):
    run(tmp_path, checkpoint_every=5)
    max(tmp_path.glob("checkpoint-*")).unlink()
    log, weights = run(tmp_path, checkpoint_every=5, resume=True)
    assert torch.equal(losses(log), losses(undisturbed[0]))
    assert all(torch.equal(tensor, undisturbed[1][name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "way",
    [{"batch_size": 1, "accumulation": 2}, {"split_pair": True}, {"workers": 1}],
    ids=["micro-steps", "halves", "reading ahead"],
)
def test_however_a_step_is_cut_it_is_the_same(way, run, undisturbed, tmp_path):
    log, _ = run(tmp_path, **way)
    torch.testing.assert_close(losses(log), losses(undisturbed[0]), rtol=1e-5, atol=0)


def test_a_cached_reference_changes_nothing(run, tmp_path):
    given = {"beta_audio": 10.0, "learning_rate": 3e-5}
    plain, cached = (run(tmp_path / name, **{name: 3}, **given)[0]
                     for name in ("draws", "cache_reference"))  # fmt: skip
    torch.testing.assert_close(losses(plain), losses(cached), rtol=1e-6, atol=0)


def test_the_adaptive_curriculum_and_sft_take_several_formats(run, tmp_path):
    log, _ = run(tmp_path / "adaptive", curriculum="adaptive", sigma="separate")
    assert len(log) == STEPS
    log, _ = run(tmp_path / "sft", method="sft", steps=60, learning_rate=1e-2)
    loss = losses(log)
    assert loss[-20:].mean() < 0.97 * loss[:20].mean()


def test_a_model_of_one_format_needs_nothing_for_it(tmp_path):
    """`tiny` has no `set_format`, and is never asked for one."""
    assert not hasattr(micro_model(), "set_format")
    config = TrainConfig(output=str(tmp_path), steps=2, batch_size=2)
    train(config, micro_model(), random_latents(4), progress=False)
    assert len(read_log(tmp_path)) == 2


# --- from the command line ------------------------------------------------------------------------


def invoke(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def cache(ltx2, tmp_path_factory):
    """Eight clips of 2 s and two of 1 s, in two buckets."""
    clips, out = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("cache")
    for seed in range(10):
        write_clip(clips / f"{seed}.mp4", render(seed, seconds=1.0 if seed < 2 else 2.0).clip)
    buckets = ("--bucket", "41x64x64", "--bucket", "17x32x64")
    said = invoke("prepare", clips, "--output", out, "--model", ltx2, *buckets)
    assert "2 in 17x32x64" in said
    assert "8 in 41x64x64" in said
    return out


def test_two_processes_train_as_one(ltx2, cache, tmp_path):
    common = ("--model", ltx2, "--data", cache, "--steps", 20, "--lora-rank", 2)
    invoke("train", *common, "--output", tmp_path / "one", "--batch-size", 2)
    two = ("train", *common, "--output", tmp_path / "two", "--batch-size", 1)
    launch("ddp_8_gpus.yaml", "-m", "syncdpo", *two)
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))


def test_a_cache_of_several_formats_opens_for_its_model(ltx2, cache, tmp_path):
    model = LTX2(ltx2)
    data = open_latents(cache, model)
    assert Counter(data.buckets) == {Bucket(41, 64, 64, 24.0): 8, Bucket(17, 32, 64, 24.0): 2}
    assert (model.clip_format.height, model.latent_size) == (64, (6, 2, 2))  # the commonest's
    with pytest.raises(ValueError, match="buckets is"):
        LatentDataset(cache, model.identity())
    other = save_tiny_ltx2(tmp_path / "other", "2.3", seed=1, layers=1)
    with pytest.raises(ValueError, match=r"vae is .* in the cache"):
        open_latents(cache, LTX2(other))
    # A file that is not in the bucket that the index says.
    broken = shutil.copytree(cache, tmp_path / "broken")
    index = json.loads((broken / "index.json").read_text())
    for clip in index["clips"]:
        clip["bucket"] = [17, 32, 64, 24.0]
    (broken / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="8 of 10 files are missing, damaged or of another"):
        open_latents(broken, LTX2(ltx2))


def test_buckets_and_parts_of_a_model_go_together(ltx2, tmp_path):
    other = save_tiny_ltx2(tmp_path / "other", "2.3", seed=1, layers=1) / "vae"
    for seed, seconds in enumerate((1.0, 2.0)):
        write_clip(tmp_path / f"{seed}.mp4", render(seed, seconds=seconds).clip)
    model, cache = ("--model", ltx2), tmp_path / "cache"
    buckets = ("--bucket", "41x64x64", "--bucket", "17x32x64")
    invoke("prepare", tmp_path, "--output", cache, *model, "--video-vae", other, *buckets)
    run = ("train", *model, "--data", cache, "--output", tmp_path / "run", "--batch-size", 1)
    run += ("--steps", 2, "--lora-rank", 2)
    with pytest.raises(ValueError, match=r"vae is .* in the cache"):
        open_latents(cache, LTX2(ltx2))
    invoke(*run, "--video-vae", other)
    assert len(read_log(tmp_path / "run")) == 2


def test_the_probe_listens_to_every_format(ltx2, cache):
    """And says of which there are too few clips."""
    said = invoke("probe", cache, "--model", ltx2, "--steps", 2, "--rule", "shift").splitlines()
    assert "8 clips of 41x64x64 at 24 fps:" in said
    assert "2 clips of 17x32x64 at 24 fps: not listened to, too few (8 at least)" in said
    assert sum("shift" in line for line in said) == sum("%" in line for line in said) >= 1


# --- held-out clips -------------------------------------------------------------------------------


def test_held_out_clips_of_several_formats_change_no_step(ltx2, undisturbed, tmp_path):
    held_out = Latents([BRIEF, WIDE, BRIEF, TALL, WIDE])
    train(settings(output=str(tmp_path), validate_every=4), LTX2(ltx2), Latents(MANY),
          held_out=held_out, progress=False)  # fmt: skip
    assert losses(outcome(tmp_path)[0]).equal(losses(undisturbed[0]))
    figures = dict(read_figures(tmp_path, "validation"))
    assert [*figures] == [0, 4, 8, 12]
    assert {found["clips"] for found in figures.values()} == {5}
    assert figures[0]["winner_ratio"] == 1
    assert figures[12]["winner_ratio"] != 1


def test_held_out_clips_of_another_format_than_the_trained(ltx2, run, tmp_path, monkeypatch):
    """A cache of one format leaves the model in it; the training goes on in its own."""

    def opened(folder, model, **_):
        model.set_format(*BRIEF)
        brief = Latents([BRIEF] * 3)
        brief.buckets = [None] * 3
        return brief

    alone = run(tmp_path / "alone", [WIDE] * 6)
    monkeypatch.setattr(validation, "open_latents", opened)
    model = LTX2(ltx2)
    model.set_format(*WIDE)
    wide = Latents([WIDE] * 6)
    wide.buckets = [None] * 6
    config = settings(output=str(tmp_path / "both"), validation_data="elsewhere", validate_every=5)
    train(config, model, wide, progress=False)
    assert losses(outcome(tmp_path / "both")[0]).equal(losses(alone[0]))
    assert all(f["clips"] == 3 for _, f in read_figures(tmp_path / "both", "validation"))
