"""Families of rendered clips: each a function of its seed, seen and heard where it says."""

import colorsys
from collections import defaultdict

import numpy as np
import pytest
import torch

from syncdpo.data.families import (
    FAMILIES,
    OUT_OF_DISTRIBUTION,
    PAUSE,
    SYLLABLE_GAP,
    UNSEEN_PITCHES,
    find_family,
    speech,
    weak,
)
from syncdpo.data.synthetic import SAMPLE_RATE, render
from syncdpo.metrics import clip_metrics, match_events
from syncdpo.models import codec

ALL = FAMILIES | OUT_OF_DISTRIBUTION
every_family = pytest.mark.parametrize("family", ALL.values(), ids=ALL)
SEEDS = range(6)


@every_family
def test_same_seed_same_clip_and_others_differ(family):
    first, again, other = family(3), family(3), family(4)
    assert torch.equal(first.clip.video, again.clip.video)
    assert torch.equal(first.clip.audio, again.clip.audio)
    assert torch.equal(first.times, again.times)
    assert not torch.equal(first.clip.video, other.clip.video)
    assert not torch.equal(first.clip.audio, other.clip.audio)


@every_family
def test_format_is_the_embedded_models(family):
    clip = family(0).clip
    assert clip.video.shape == (48, 64, 64, 3)
    assert clip.audio.shape == (1, 32_000)
    assert (clip.fps, clip.sample_rate) == (24, 16_000)
    assert clip.audio.abs().max() < 1


@every_family
def test_what_happens_is_seen_and_heard_where_it_says(family):
    """Two detectors that know nothing of families; events at the ends have no beginning there."""
    found = defaultdict(int)
    for seed in SEEDS:
        happened, metrics = family(seed), clip_metrics(family(seed).clip)
        times = {"seen": happened.times, "heard": torch.cat([happened.times, happened.unseen])}
        for way, true in times.items():
            true = true.sort().values.numpy()
            detected = getattr(metrics, way)
            found[f"{way} wrongly"] += len(detected) - len(match_events(true, detected, 0.05))
            inner = true[(true > 0.1) & (true < 1.9)]
            found[way] += len(match_events(inner, detected, 0.05))
            found[f"{way} at best"] += len(inner)
    assert found["seen at best"] > 12
    for way in ("seen", "heard"):
        assert found[way] > 0.9 * found[f"{way} at best"]
        assert found[f"{way} wrongly"] <= 0.03 * found[way]


@every_family
def test_stems_sum_to_the_sound(family):
    happened = family(5)
    total = torch.stack(happened.stems).sum(0)[None]
    torch.testing.assert_close(total, happened.clip.audio)
    assert all(stem.abs().max() > 0.05 for stem in happened.stems)


@every_family
@pytest.mark.parametrize("offset", [0.25, -0.5])
def test_an_offset_moves_the_sound_by_exactly_that(family, offset):
    plain, moved = family(7), family(7, offset=offset)
    assert torch.equal(plain.clip.video, moved.clip.video)
    assert torch.equal(plain.times, moved.times)
    samples = round(offset * SAMPLE_RATE)
    late, early = (moved, plain) if samples > 0 else (plain, moved)
    difference = late.clip.audio[:, abs(samples) :] - early.clip.audio[:, : -abs(samples)]
    assert difference.abs().max() < (2e-3 if family is render else 1e-6)  # balls' time is float32


@every_family
def test_what_an_offset_lets_in_comes_from_a_scene_that_goes_on(family):
    early = torch.cat([family(seed, offset=0.9).clip.audio[0, :14_400] for seed in SEEDS])
    late = torch.cat([family(seed, offset=-0.9).clip.audio[0, -14_400:] for seed in SEEDS])
    usual = torch.cat([family(seed).clip.audio[0] for seed in SEEDS]).square().mean()
    for part in (early, late):
        assert 0.5 * usual < part.square().mean() < 2 * usual


@every_family
def test_offset_beyond_the_scene_is_named(family):
    with pytest.raises(ValueError, match=r"offset: expected at most 1.0 s either way, got -1.5"):
        family(0, offset=-1.5)


@every_family
def test_latents_are_about_standard_normal(family):
    clips = [family(seed).clip for seed in range(12)]
    video = torch.stack([codec.encode_video(clip.video) for clip in clips])
    luma = codec.PICTURES * codec.CELLS**2 // codec.VIDEO_TOKENS
    audio = torch.stack([codec.encode_audio(clip.audio[0]) for clip in clips])
    for part in (video[..., :luma], video[..., luma:], audio):
        assert part.mean().abs() < 0.6
        assert 0.2 < part.std() < 1.4


@pytest.mark.parametrize("name", ["impacts", "speech", "weak", "blinds"])
def test_a_colour_has_a_pitch(name):
    pitches = defaultdict(set)
    for seed in range(16):
        happened = ALL[name](seed)
        pitches[hue(happened.clip.video)].add(pitch(happened.stems[0]))
    assert len(pitches) >= 4
    assert all(len(heard) == 1 for heard in pitches.values())
    assert len(set.union(*pitches.values())) == len(pitches)


def hue(video) -> int:
    """In 24ths, of the most colourful pixel."""
    pixels = video.flatten(0, 2).float() / 255
    colourful = (pixels.max(1).values - pixels.min(1).values).argmax()
    return round(24 * colorsys.rgb_to_hsv(*pixels[colourful].tolist())[0]) % 24


def pitch(sound) -> int:
    """The codec's band that its loudest frequency is in."""
    frequency = torch.fft.rfft(sound).abs().argmax().item() * SAMPLE_RATE / len(sound)
    return round(15 * np.log(frequency / 200) / np.log(30))


def test_syllables_come_three_to_six_a_second_in_words_voiced_and_unvoiced():
    gaps = torch.cat([speech(seed).times.diff() for seed in range(16)])
    pauses = gaps > SYLLABLE_GAP[1]
    assert gaps.min() >= SYLLABLE_GAP[0]
    assert gaps[pauses].min() >= SYLLABLE_GAP[0] + PAUSE[0]
    assert 0.1 < pauses.double().mean() < 0.5
    kinds = []
    for seed in SEEDS:
        happened = speech(seed)
        for time in happened.times[happened.times < 1.95].tolist():
            place = slice(int(time * SAMPLE_RATE) + 200, int(time * SAMPLE_RATE) + 600)
            kinds.append(int(np.argmax([stem[place].square().sum() for stem in happened.stems])))
    assert 0.15 < np.mean(kinds) < 0.5


def test_the_unseen_third_is_heard_below_the_others_and_leaves_no_picture():
    for seed in SEEDS:
        happened = FAMILIES["several"](seed)
        assert len(happened.unseen) >= 1
        assert len(happened.stems) == 3
        assert pitch(happened.stems[2]) < len(UNSEEN_PITCHES)
        assert min(pitch(stem) for stem in happened.stems[:2]) >= len(UNSEEN_PITCHES)
        seen = clip_metrics(happened.clip).seen
        assert not match_events(happened.unseen.numpy(), seen, 0.05)


def test_weak_events_change_a_few_per_cent_of_the_picture():
    for seed in SEEDS:
        luma = weak(seed).clip.video.float().mean(-1)
        changed = (luma.amax(0) - luma.amin(0) > 8).float().mean()
        assert 0.01 < changed < 0.05


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"family: expected one of impacts, .*, got 'drums'"):
        find_family("drums")
