"""Streams of unequal length: rules act where both have frames, and winners stay in step there."""

import os
from itertools import product

import pytest
import torch
from tiny_ltx2 import save_tiny_ltx2
from torch import Tensor

from syncdpo.models.ltx2 import LTX2
from syncdpo.negatives import Mixture, Pairs, Replace, Scale, Shift, Timeline, Warp, draw_pairs
from syncdpo.negatives.distortion import REPLACE, RULES
from syncdpo.train import train
from syncdpo.training.checkpoint import read_log
from syncdpo.training.config import TrainConfig

PLACED = Replace(placement="sound")
ALL = {
    **dict(zip(RULES, (Shift(), Scale(), Warp(), Replace()), strict=True)),
    "placed": PLACED,
    "mixture": Mixture([Shift(), Scale(), Warp(), PLACED]),
}
PICTURES = range(9, 258, 8)
FPS = (8.0, 10.0, 12.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 48.0, 50.0, 59.94, 60.0)
AUDIO_RATES = (25.0, 31.25, 43.07, 50.0)
FORMATS = list(product(PICTURES, FPS, AUDIO_RATES))
DEFAULT = (121, 24.0, 25.0)  # LTX-2's: 5.042 s of picture, 5.01 s of sound
NEAR = 1e-3  # frames by which float32 may put a time


def timelines_of(pictures: int, fps: float, audio_rate: float, causal: bool = True):
    """The latents of a clip as LTX-2 counts them; its sound's first one a quarter of the others."""
    first = 1 if causal else 4
    return (
        Timeline((pictures - 1) // 8 + 1, fps / 8, first=1, stride=8),
        Timeline(round(pictures / fps * audio_rate), audio_rate, first=first, stride=4),
    )


def centres(timeline: Timeline) -> Tensor:
    return timeline.seconds(torch.arange(timeline.frames, dtype=torch.float32))


def begins(timeline: Timeline) -> Tensor:
    """Where each frame begins, and where the last one ends."""
    return timeline.begins(torch.arange(timeline.frames + 1, dtype=torch.float32))


def pairs_of(rule, timelines, streams="audio", draws=64, matched=0.5, difficulty=None, seed=0):
    """Pairs of clips whose every frame tells its own time, half of them matched."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(draws, generator=generator) if difficulty is None else difficulty
    drawn = draw_pairs(
        draws, rule, difficulty, video_timeline=timelines[0], audio_timeline=timelines[1],
        matched=matched, streams=streams, generator=generator,
    )  # fmt: skip
    return drawn.make(*(centres(t).expand(draws, -1)[..., None].contiguous() for t in timelines))


def assert_within(pairs: Pairs, timelines, streams: str) -> None:
    """What one stream has and the other has not is as it was; plain losers keep all of a frame."""
    end = min(timeline.duration for timeline in timelines)
    own = ("video", "audio").index(streams)
    for stream, timeline in enumerate(timelines):
        clock, near = centres(timeline), NEAR / timeline.rate
        ended = begins(timeline)[1:] <= end + near
        for half in (pairs.win, pairs.lose):
            told = half[stream][..., 0]
            assert torch.isfinite(told).all()
            changed = told != clock
            assert not changed[:, clock > end + near].any()
            if stream == own:
                assert not changed[~pairs.matched][:, ~ended].any()
    # The picture of a matched pair is cut at its own frames, so none of them lacks its sound.
    cut = pairs.matched & (pairs.rule == REPLACE)
    longer = min(timelines, key=lambda timeline: timeline.rate)
    changed = pairs.win[timelines.index(longer)][..., 0] != centres(longer)
    assert not changed[cut][:, begins(longer)[1:] > end + NEAR / longer.rate].any()


def assert_in_step(pairs: Pairs, timelines) -> list[float]:
    """Matched winners: picture and sound are moved alike; → shares of the frames compared."""
    video, audio = (
        (x[..., 0] - centres(t))[pairs.matched] for x, t in zip(pairs.win, timelines, strict=True)
    )
    cut = (pairs.rule == REPLACE)[pairs.matched]
    kinds = ((cut, _cut_alike), (~cut, _warped_alike))
    return [alike(video[kind], audio[kind], timelines) for kind, alike in kinds if kind.any()]


def half_a_frame(timelines) -> float:
    return (0.5 + NEAR) / max(timeline.rate for timeline in timelines)


def _cut_alike(video: Tensor, audio: Tensor, timelines) -> float:
    """Every frame of sound is moved as the frame of the picture that is seen in its middle."""
    at, borders = centres(timelines[1]), begins(timelines[0])
    seen = torch.bucketize(at, borders, right=True) - 1
    near = (at[:, None] - borders).abs().amin(1) * timelines[1].rate
    both = (at < borders[-1]) & (near > NEAR)
    apart = (audio[:, both] - video[:, seen[both]]).abs()
    assert (apart <= half_a_frame(timelines)).all()
    return both.float().mean().item()


def _warped_alike(video: Tensor, audio: Tensor, timelines) -> float:
    """At the centre of every frame of the picture the sound is moved as far."""
    at, heard = centres(timelines[0]), centres(timelines[1])
    after = torch.bucketize(at, heard).clamp(1, len(heard) - 1)
    here, there = audio[:, after - 1], audio[:, after]
    weight = (at - heard[after - 1]) / (heard[after] - heard[after - 1])
    # Where the stretch wraps around, neighbours are far apart; and beyond the centres of its first
    # and last frame a stream has nothing that tells the time.
    told = video + at
    fair = (there - here).abs() <= 1.5 / timelines[1].rate
    fair &= (told > at[0] + 1e-4) & (told < at[-1] - 1e-4) & (at >= heard[0]) & (at <= heard[-1])
    apart = (here + weight * (there - here) - video).abs()
    assert (apart[fair] <= half_a_frame(timelines)).all()
    return fair.float().mean().item()


def check(rule, form, streams, draws, causal=True, seed=0) -> None:
    timelines = timelines_of(*form, causal)
    pairs = pairs_of(rule, timelines, streams, draws=draws, seed=seed)
    assert_within(pairs, timelines, streams)
    compared = assert_in_step(pairs, timelines)
    if form[0] >= 41:
        assert min(compared) > 0.3


# Formats


@pytest.mark.parametrize("streams", ["audio", "video"])
@pytest.mark.parametrize("rule", ALL.values(), ids=ALL)
def test_some_formats(rule, streams):
    for number, form in enumerate([DEFAULT, *FORMATS[:: len(FORMATS) // 20]]):
        for causal in (True, False):
            check(rule, form, streams, 400, causal, seed=number)


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["audio", "video"])
def test_every_format(streams):
    """Of Replace, where it depends on the draw whether it fits, 2,000 plain and 2,000 matched."""
    for form in FORMATS:
        check(ALL["replace"], form, streams, 4000)


# SYNCDPO_DRAWS=4000 makes as many of every rule as of Replace, in an hour or two.
DRAWS = int(os.environ.get("SYNCDPO_DRAWS", 0))


@pytest.mark.slow
def test_every_format_with_every_rule():
    """In turn for the one and the other stream; with SYNCDPO_DRAWS for both, rule by rule."""
    cases = product(ALL.values(), ("audio", "video")) if DRAWS else [(ALL["mixture"], None)]
    for rule, streams in cases:
        for number, form in enumerate(FORMATS):
            check(rule, form, streams or ("audio", "video")[number % 2], DRAWS or 64, seed=number)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("streams", ["audio", "video"])
@pytest.mark.parametrize(("picture", "sound"), [(5.0, 4.0), (4.0, 5.0), (3.0, 0.5), (0.5, 3.0)])
@pytest.mark.parametrize("rule", ALL.values(), ids=ALL)
def test_one_stream_may_go_on_after_the_other(rule, picture, sound, streams, causal):
    """What goes on alone stays as it is: the wrap-around of a shift, too, is where both end."""
    timelines = (
        Timeline(round(picture * 3), 3.0, first=1 if causal else 8, stride=8),
        Timeline(round(sound * 25), 25.0, first=1 if causal else 4, stride=4),
    )
    pairs = pairs_of(rule, timelines, streams)
    assert_within(pairs, timelines, streams)
    assert_in_step(pairs, timelines)
    if min(picture, sound) > 1:
        assert pairs.valid.all()


@pytest.mark.parametrize("form", [DEFAULT, (121, 25.0, 43.07), (33, 59.94, 31.25)])
@pytest.mark.parametrize("matched", [0.0, 1.0])
def test_shifts_move_frames_onto_frames(form, matched):
    """Where the clip wraps around, too: only a first frame shorter than the others is blended."""
    timelines = timelines_of(*form)
    clock = centres(timelines[1])
    pairs = pairs_of(Shift(), timelines, matched=matched)
    for half in (pairs.win, pairs.lose):
        told = half[1][:, 1:, 0]
        near = (told[..., None] - clock).abs().amin(-1) * timelines[1].rate
        assert near.max() <= NEAR


def test_replacements_reach_the_last_frame_that_both_have():
    """To the end of the sound in plain pairs, in matched ones to that of the picture's frame 14."""
    timelines = timelines_of(*DEFAULT)
    pairs = pairs_of(Replace(), timelines, draws=4000)
    for kind, stream, last in ((~pairs.matched, 1, 125), (pairs.matched, 0, 14)):
        half = pairs.lose if stream else pairs.win
        changed = half[stream][..., 0] != centres(timelines[stream])
        assert changed[kind].any(0).nonzero().max() == last


# Training


def test_training_ltx2_at_its_default_clip(tmp_path):
    """200 steps with the default rules: 121 pictures at 24 fps, as few pixels as there can be."""
    model = LTX2(save_tiny_ltx2(tmp_path / "model", layers=1), frames=121, height=32, width=32)
    assert [timeline.frames for timeline in model.timelines] == [16, 126]
    generator = torch.Generator().manual_seed(0)
    sizes = {"video": (16, 8), "audio": (126, 4), "video_text": (2, 32), "audio_text": (2, 16)}
    clips = [
        {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        for _ in range(8)
    ]
    for clip in clips:
        model.check_latents(clip)
    config = TrainConfig(output=str(tmp_path / "run"), steps=200, batch_size=8)
    assert train(config, model, clips, progress=False)["skipped"] == 0
    log = read_log(tmp_path / "run")
    assert len(log) == 200
    # Of no pair both halves came out the same.
    assert all(entry["valid"] == 1 for entry in log)
