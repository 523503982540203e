"""Replace places its segments where there is something to hear, and gives nothing away by it."""

import pytest
import torch

from syncdpo.negatives import (
    Mixture,
    PairDraw,
    Replace,
    Scale,
    Timeline,
    draw_pairs,
    make_pairs,
    parse_rule,
)
from syncdpo.negatives.distortion import SCALE, Distortion, select
from syncdpo.negatives.probe import probe

CLIPS, FRAMES = 200, 96
TIMELINES = {
    "video_timeline": Timeline(48, 12.0, tokens=2),
    "audio_timeline": Timeline(FRAMES, 24.0),
}
ANYWHERE, SOUND = Replace(), Replace(placement="sound")


@pytest.fixture(scope="module")
def audio():
    """One hit in four seconds that dies away over half a second; the rest is silence."""
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(4, FRAMES - 16, (CLIPS, 1), generator=generator)
    since = torch.arange(FRAMES) - at
    level = torch.where(since >= 0, torch.exp(-since / 4), 0.0)
    timbre = torch.rand(CLIPS, 1, 3, generator=generator) + 0.5
    return level[..., None] * timbre


def pairs_of(rule, audio, difficulty=1.0, matched=1.0, seed=0, **options):
    video = torch.zeros(len(audio), 96, 1)
    generator = torch.Generator().manual_seed(seed)
    return make_pairs(
        video, audio, rule, difficulty, matched=matched, generator=generator, **TIMELINES, **options
    )


def draw(rule, count, seed=0, matched=1.0):
    generator = torch.Generator().manual_seed(seed)
    return draw_pairs(count, rule, 1.0, matched=matched, generator=generator, **TIMELINES)


@pytest.mark.parametrize("matched", [0.0, 1.0])
def test_few_pairs_are_wasted_on_silence(audio, matched):
    shares = [
        pairs_of(rule, audio.repeat(4, 1, 1), matched=matched).valid.float().mean()
        for rule in (ANYWHERE, SOUND)
    ]
    assert shares[0] < 0.7
    assert shares[1] > 0.95


@pytest.mark.parametrize("matched", [0.0, 1.0])
def test_a_pair_with_enough_to_hear_stays_where_it_was(audio, matched):
    anywhere, sound = (pairs_of(rule, audio, matched=matched) for rule in (ANYWHERE, SOUND))
    still = audio.mean(1, keepdim=True)
    spread = (audio - still).square().sum((1, 2))
    apart = (anywhere.win[1] - anywhere.lose[1]).square().sum((1, 2))
    share = draw(ANYWHERE, CLIPS, matched=matched).second.length / 4.0
    kept = apart >= share * spread
    assert 0.2 < kept.float().mean() < 0.8
    assert torch.equal(anywhere.lose[1][kept], sound.lose[1][kept])
    assert torch.equal(anywhere.win[0][kept], sound.win[0][kept])
    moved = (sound.win[1] - sound.lose[1]).square().sum((1, 2))
    assert (moved >= apart.minimum(share * spread) * 0.999).all()


def test_the_other_rules_and_all_lengths_draw_the_same_numbers(audio):
    draws = [draw(Mixture([rule, Scale()]), CLIPS) for rule in (ANYWHERE, SOUND)]
    assert torch.equal(draws[0].second.length, draws[1].second.length)
    pairs = [pairs_of(Mixture([rule, Scale()]), audio) for rule in (ANYWHERE, SOUND)]
    scaled = pairs[0].rule == SCALE
    assert 0 < scaled.sum() < CLIPS
    assert torch.equal(pairs[0].lose[1][scaled], pairs[1].lose[1][scaled])
    assert (pairs[0].lose[1][~scaled] != pairs[1].lose[1][~scaled]).any()


def test_every_try_lies_in_the_clip_and_keeps_the_gap():
    matched = torch.ones(2000, dtype=torch.bool)
    tries = SOUND.draw_tries(matched, 1.0, 4.0, generator=torch.Generator().manual_seed(0))
    assert len({first.start[0].item() for first, _ in tries}) == len(tries) > 4
    for first, second in tries:
        places = torch.stack([first.start, first.donor_start, second.donor_start], 1)
        assert places.min() >= 0
        assert (places + first.length[:, None]).max() <= 4 + 1e-5
        assert places.sort(1).values.diff(dim=1).min() >= 0.15 - 1e-5
        # Evenly over the clip, each as the first one.
        quartiles = (
            (places / (4 - first.length[:, None]))
            .flatten()
            .quantile(torch.tensor([0.25, 0.5, 0.75]))
        )
        torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.04)


def test_a_pair_does_not_depend_on_its_batch(audio):
    video, drawn = torch.zeros(CLIPS, 96, 1), draw(SOUND, CLIPS)
    rows = torch.tensor([5, 3, 100])
    some, every = drawn[rows].make(video[rows], audio[rows]), drawn.make(video, audio)
    assert torch.equal(some.lose[1], every.lose[1][rows])
    assert torch.equal(some.win[0], every.win[0][rows])
    assert torch.equal(some.strength, every.strength[rows])


def test_choosing_never_waits_for_the_device(monkeypatch):
    """A meta tensor has no values: anything that would read one raises."""
    drawn = draw_pairs(4, SOUND, 0.5, device="meta", **TIMELINES)
    # `replace_segments` reads no value on a device, and cannot run without one.
    monkeypatch.setattr(Distortion, "cut", lambda self, x, _: x * self.donor_start[:, None, None])
    first, second = drawn._chosen(torch.empty(4, FRAMES, 3, device="meta"))
    assert first.start.shape == second.donor_start.shape == (4,)


def test_the_picture_is_judged_where_the_picture_is_distorted(audio):
    video = torch.zeros(CLIPS, 48, 2, 1)
    video[torch.arange(CLIPS), audio[..., 0].argmax(1) // 2] = 1.0  # a flash at the hit
    shares = [
        make_pairs(
            video.flatten(1, 2), audio, rule, 1.0, streams="video",
            generator=torch.Generator().manual_seed(0), **TIMELINES,
        ).valid.float().mean()
        for rule in (ANYWHERE, SOUND)
    ]  # fmt: skip
    assert shares[0] < 0.65
    assert shares[1] > 0.85


def test_a_silent_clip_takes_the_first_try():
    silence = torch.zeros(4, FRAMES, 3)
    pairs = pairs_of(SOUND, silence)
    assert not pairs.valid.any()
    assert torch.equal(pairs.strength, pairs_of(ANYWHERE, silence).strength)


# Matched pairs stay exchangeable


def heard(audio, seed=0):
    finding = probe(audio, SOUND, 1.0, matched=1.0, steps=50, draws=12, seed=seed, **TIMELINES)
    return finding.accuracy, 0.5 / finding.pairs**0.5


def test_the_sound_of_matched_pairs_gives_nothing_away(audio):
    accuracy, error = heard(audio)
    assert abs(accuracy - 0.5) <= 3 * error
    assert accuracy <= 0.55
    assert error < 0.02


def test_a_choice_by_the_loser_alone_would_be_heard(audio, monkeypatch):
    """What the symmetry is for: place by what the loser sounds like, and a listener knows it."""

    def lopsided(self, x):
        tries = ((self.first, self.second), *self.others)
        loudness = [second.cut(x, self.timelines[1]).square().sum((1, 2)) for _, second in tries]
        choice = torch.stack(loudness).argmax(0)
        return tuple(select(choice, options) for options in zip(*tries, strict=True))

    monkeypatch.setattr(PairDraw, "_chosen", lopsided)
    accuracy, error = heard(audio)
    assert accuracy > 0.6 > 0.5 + 3 * error


def test_exchanging_the_donors_of_every_try_exchanges_those_chosen(audio):
    drawn = draw(SOUND, CLIPS)
    swapped = PairDraw(
        drawn.second, drawn.first, drawn.matched, drawn.difficulty, drawn.timelines,
        drawn.distorted, tuple((second, first) for first, second in drawn.others),
    )  # fmt: skip
    video = torch.zeros(CLIPS, 96, 1)
    pairs, other = drawn.make(video, audio), swapped.make(video, audio)
    assert torch.equal(pairs.win[1], other.lose[1])
    assert torch.equal(pairs.lose[1], other.win[1])
    assert torch.equal(pairs.valid, other.valid)


def test_pairs_are_valid_whichever_is_the_winner():
    """A loser much quieter or louder than its winner differs as much from it as the other way."""

    class Half(Distortion):
        def apply(self, x, timeline):
            return x * self.length[:, None, None]

    def make(first, second):
        fields = vars(draw(ANYWHERE, 100).first)
        one, other = (Half(**{**fields, "length": length}) for length in (first, second))
        nothing = torch.zeros(100)
        drawn = PairDraw(one, other, nothing, nothing, tuple(TIMELINES.values()), 1)
        return drawn.make(torch.zeros(100, 96, 1), torch.ones(100, FRAMES, 1)).valid

    size = torch.linspace(0.98, 1.02, 100)
    valid = make(size, torch.ones(100))
    assert torch.equal(valid, make(torch.ones(100), size))
    assert 0.3 < valid.float().mean() < 0.7


# By name


def test_options_by_name():
    rule = parse_rule("replace(placement='sound', crossfade=0.04) + scale(coarse=(1.2, 1.3))")
    assert rule.rules == (
        Replace(placement="sound", crossfade=0.04),
        Scale(coarse=(1.2, 1.3)),
    )
    assert parse_rule("replace") == ANYWHERE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replace(placement='quiet')", "placement: expected 'anywhere' or 'sound', got 'quiet'"),
        ("replace(place='sound')", "expected plain values for any of coarse, .* got .replace"),
        ("replace(placement=sound)", "expected plain values .* got 'replace.placement=sound.'"),
        ("replace('sound')", "expected plain values"),
        ("replace(", "expected shift, scale, warp, replace .* got 'replace.'"),
        ("replace * scale", "expected shift, scale"),
        ("", "expected shift, scale, warp, replace .* got ''"),
    ],
)
def test_bad_names_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(text)
