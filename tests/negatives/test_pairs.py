"""The rules draw what their ranges say; matched pairs are exchangeable; winners stay in step."""

import pytest
import torch

from syncdpo.negatives import Mixture, Replace, Scale, Shift, Timeline, Warp, make_pairs, parse_rule
from syncdpo.negatives.distortion import RULES, SCALE, SHIFT, Distortion

ALL = [Shift(), Scale(), Warp(), Replace()]
MIXTURE = Mixture(ALL)
TINY = Timeline(24, 12.0, tokens=4), Timeline(48, 24.0)
LTX2 = Timeline(16, 3.0, dim=2, first=1, stride=8), Timeline(126, 25.0)
MANY = 4000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_pair(rule, difficulty, duration=2.0, matched=True, count=MANY, grain=0.0):
    flags = torch.full((count,), matched)
    return rule.draw_pair(flags, difficulty, duration, grain=grain, generator=seeded())


def clock(timeline, batch):
    """A stream whose every entry tells its own time in seconds."""
    seconds = timeline.seconds(torch.arange(timeline.frames, dtype=torch.float32))
    shape = [batch, 3, 3, 3][: max(3, timeline.dim + 1)]
    shape[timeline.dim] = timeline.frames * timeline.tokens
    column = [1] * len(shape)
    column[timeline.dim] = -1
    return seconds.repeat_interleave(timeline.tokens).reshape(column).expand(shape).contiguous()


def times(x, timeline):
    """The time that each frame of a distorted clock tells, [B, T]."""
    frames = x.movedim(timeline.dim, 1).flatten(2)[:, :: timeline.tokens, 0]
    return frames


def pairs_of(rule, difficulty, timelines, batch=64, seed=0, **options):
    video, audio = (clock(timeline, batch) for timeline in timelines)
    return make_pairs(
        video,
        audio,
        rule,
        difficulty,
        video_timeline=timelines[0],
        audio_timeline=timelines[1],
        generator=seeded(seed),
        **options,
    )


# Ranges


@pytest.mark.parametrize(
    ("difficulty", "duration", "low", "high"),
    [(0.0, 5.0, 0.4, 1.0), (1.0, 5.0, 0.1, 0.2), (0.5, 2.0, 0.25, 0.6), (0.0, 1.0, 0.2, 0.5)],
)
def test_shift_draws_its_range_to_both_sides(difficulty, duration, low, high):
    distortion = Shift().draw(MANY, difficulty, duration, generator=seeded())
    later = distortion.displacement[:, 0] < 0
    assert 0.45 < later.float().mean() < 0.55
    for side, floor in ((later, 0.125), (~later, 0.045)):
        strength = distortion.strength[side]
        assert max(low, floor) - 1e-6 <= strength.min() < max(low, floor) + 0.02
        assert high - 0.02 < strength.max() <= high + 1e-6


@pytest.mark.parametrize(("difficulty", "low", "high"), [(0.0, 1.5, 2.0), (1.0, 1.08, 1.2)])
def test_scale_draws_rates_and_their_inverses(difficulty, low, high):
    knots = Scale().draw(MANY, difficulty, 4.0, generator=seeded()).knots
    rate = (knots[:, -1] - knots[:, 0]) / 4.0
    assert 0.45 < (rate > 1).float().mean() < 0.55
    rate = rate.maximum(1 / rate)
    assert low - 1e-4 <= rate.min() < low + 0.02
    assert high - 0.02 < rate.max() <= high + 1e-4


@pytest.mark.parametrize(
    ("difficulty", "duration", "largest"), [(0.0, 8.0, 0.5), (1.0, 8.0, 0.12), (1.0, 1.0, 0.06)]
)
def test_warp_keeps_its_ends_and_never_runs_backwards(difficulty, duration, largest):
    distortion = Warp().draw(MANY, difficulty, duration, generator=seeded())
    displacement = distortion.displacement
    assert displacement[:, [0, -1]].abs().max() < 1e-5
    assert distortion.strength.max() <= largest + 1e-5
    assert distortion.strength.median() == pytest.approx(largest, abs=1e-5)
    tempo = distortion.knots.diff(dim=1) * 64 / duration
    assert tempo.min() > 0.25 - 1e-3
    assert tempo.max() < 1.75 + 1e-3


@pytest.mark.parametrize(
    ("difficulty", "share", "gap"), [(0.0, (0.5, 0.8), 0.4), (1.0, (0.1, 0.25), 0.15)]
)
def test_replace_draws_its_share_from_another_moment(difficulty, share, gap):
    duration = 10.0
    distortion = Replace().draw(MANY, difficulty, duration, generator=seeded())
    length = distortion.length / duration
    assert share[0] - 1e-6 <= length.min() < share[0] + 0.02
    assert share[1] - 0.02 < length.max() <= share[1] + 1e-6
    assert distortion.strength.min() >= gap - 1e-5
    for start in (distortion.start, distortion.donor_start):
        assert start.min() >= 0
        assert (start + distortion.length).max() <= duration + 1e-5
    assert 0.45 < (distortion.donor_start > distortion.start).float().mean() < 0.55


def test_difficulty_and_duration_may_differ_by_sample():
    difficulty, duration = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([5.0, 5.0, 0.5])
    for rule in ALL:
        draws = [rule.draw(3, difficulty, duration, generator=seeded(i)) for i in range(50)]
        strength = torch.stack([draw.strength for draw in draws]).mean(0)
        assert strength[2] < strength[0]
        if not isinstance(rule, Replace):  # there d is the share replaced, not its displacement
            assert strength[1] < strength[0]


# Mixture


def test_mixture_draws_by_weight_and_each_sample_as_its_rule():
    mixture = Mixture([Replace(), Scale()], weights=[1, 3])
    distortion = mixture.draw(MANY, 0.5, 2.0, generator=seeded())
    names = [RULES[code] for code in distortion.rule.tolist()]
    assert set(names) == {"scale", "replace"}
    assert 0.72 < names.count("scale") / MANY < 0.78
    scaled = distortion.rule == SCALE
    assert (distortion.length[scaled] == 0).all()
    assert (distortion.length[~scaled] > 0).all()
    assert (distortion.displacement[~scaled] == 0).all()
    assert (distortion.displacement[scaled].abs().amax(1) > 0).all()


@pytest.mark.parametrize("text", [*RULES, "replace+scale", "shift+warp+replace"])
def test_rules_by_name(text):
    rule = parse_rule(text)
    codes = rule.draw(200, 0.5, 2.0, generator=seeded()).rule.unique()
    assert {RULES[code] for code in codes.tolist()} == set(text.split("+"))


# Matched pairs


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", ALL, ids=RULES)
def test_matched_distortions_are_exchangeable(rule, difficulty):
    """Every statistic of φ₁ given φ₂ keeps its distribution when both change places."""
    first, second = draw_pair(rule, difficulty, matched=True)
    timelines = TINY[1], TINY[0], torch.ones(MANY, dtype=torch.bool)
    for φ1, φ2 in ((first, second), (first.aligned(*timelines), second.aligned(*timelines))):
        for of in (
            lambda φ: φ.displacement[:, 3],
            lambda φ: φ.displacement[:, 40],
            lambda φ: φ.displacement.square().mean(1),
            lambda φ: φ.donor_start - φ.start,
            lambda φ: φ.donor_start,
        ):
            a, b = of(φ1), of(φ2)
            for difference in (a - b, a.square() * b - b.square() * a):
                error = difference.std() / MANY**0.5
                assert difference.mean().abs() <= 4 * error + 1e-9
        assert torch.equal(φ1.start, φ2.start)
        assert torch.equal(φ1.length, φ2.length)


@pytest.mark.parametrize("rule", ALL, ids=RULES)
def test_matched_distortions_are_noticeably_apart_and_plain_ones_start_from_identity(rule):
    for matched in (True, False):
        first, second = draw_pair(rule, 1.0, matched=matched, duration=4.0)
        gap = (second.knots - first.knots).abs().amax(1)
        gap = gap.maximum((second.donor_start - first.donor_start).abs())
        assert gap.min() > 0.09
        if not matched:
            assert (first.displacement == 0).all()
            assert (first.length == 0).all()


@pytest.mark.parametrize("timelines", [TINY, LTX2], ids=["tiny", "ltx2"])
@pytest.mark.parametrize("difficulty", [0.0, 1.0])
@pytest.mark.parametrize("rule", ALL, ids=RULES)
def test_matched_winners_stay_in_step(rule, difficulty, timelines):
    """Sound and picture of a winner tell the same time at the same time."""
    pairs = pairs_of(rule, difficulty, timelines, matched=1.0)
    video, audio = (times(x, t) for x, t in zip(pairs.win, timelines, strict=True))
    at = [t.seconds(torch.arange(t.frames, dtype=torch.float32)) for t in timelines]
    near = timelines[1].position(at[0]).round().clamp(0, timelines[1].frames - 1).long()
    lag = (video - at[0]) - (audio[:, near] - at[1][near])
    # Next to a cut, and where the clip wraps around, one stream is a frame ahead of the other.
    smooth = torch.ones_like(lag, dtype=torch.bool)
    for x, rate in ((video, timelines[0].rate), (audio[:, near], timelines[0].rate)):
        jump = ((x.diff(dim=1) * rate - 1).abs() > 1.0).float()
        cut = torch.nn.functional.pad(jump, (1, 1))
        smooth &= (cut[:, 1:] + cut[:, :-1]) == 0
    smooth[:, [0, -1]] = False
    assert smooth.float().mean() > 0.4
    assert lag[smooth].abs().max() <= 1.01 / timelines[1].rate


@pytest.mark.parametrize("timelines", [TINY, LTX2], ids=["tiny", "ltx2"])
@pytest.mark.parametrize("rule", [*ALL, MIXTURE], ids=[*RULES, "mixture"])
def test_strength_is_the_misalignment_of_the_loser(rule, timelines):
    pairs = pairs_of(rule, 0.7, timelines, matched=0.5)
    apart = (times(pairs.lose[1], timelines[1]) - times(pairs.win[1], timelines[1])).abs()
    longest = timelines[1].duration
    apart = apart.minimum((apart - longest).abs())  # where one of them has wrapped around
    inside = pairs.strength <= longest / 2
    worst = (apart.amax(1) - pairs.strength)[inside]
    assert worst.max() <= 2 / timelines[1].rate
    assert pairs.valid.all()
    assert (apart.amax(1) > 0.04).all()


# Pairs


def test_plain_pairs_leave_winner_and_picture_alone():
    video, audio = torch.randn(8, 96, 5), torch.randn(8, 48, 7)
    options = {"video_timeline": TINY[0], "audio_timeline": TINY[1]}
    pairs = make_pairs(video, audio, MIXTURE, 0.3, matched=0.0, generator=seeded(), **options)
    assert pairs.win[0] is video
    assert pairs.win[1] is audio
    assert pairs.lose[0] is video
    assert (pairs.lose[1] != audio).flatten(1).any(1).all()
    swapped = make_pairs(
        video, audio, MIXTURE, 0.3, matched=0.0, streams="video", generator=seeded(), **options
    )
    assert swapped.lose[1] is audio
    assert (swapped.lose[0] != video).flatten(1).any(1).all()


def test_half_of_the_pairs_are_matched_and_only_they_touch_the_picture():
    video, audio = torch.randn(200, 96, 2), torch.randn(200, 48, 2)
    pairs = make_pairs(
        video,
        audio,
        MIXTURE,
        0.3,
        video_timeline=TINY[0],
        audio_timeline=TINY[1],
        generator=seeded(),
    )
    assert 0.4 < pairs.matched.float().mean() < 0.6
    untouched = (pairs.win[0] == video).flatten(1).all(1)
    assert torch.equal(untouched, ~pairs.matched)
    assert torch.equal(pairs.lose[0], pairs.win[0])


def test_shifts_move_whole_frames_and_blur_nothing():
    audio = torch.randn(32, 48, 4)
    pairs = make_pairs(
        torch.randn(32, 96, 4),
        audio,
        Shift(),
        1.0,
        video_timeline=TINY[0],
        audio_timeline=TINY[1],
        generator=seeded(),
    )
    for b in range(32):
        frames = {row.numpy().tobytes() for row in audio[b]}
        for x in (pairs.win[1], pairs.lose[1]):
            assert {row.numpy().tobytes() for row in x[b]} == frames


@pytest.mark.parametrize("rule", [*ALL, MIXTURE], ids=[*RULES, "mixture"])
def test_pairs_that_came_out_the_same_are_not_valid(rule):
    audio = torch.stack(
        [
            torch.zeros(48, 4),
            torch.full((48, 4), 3.0) + 1e-3 * torch.randn(48, 4),
            1e-5 * torch.randn(48, 4),
            torch.randn(48, 4),
        ]
    )
    pairs = make_pairs(
        torch.randn(4, 96, 4),
        audio,
        rule,
        0.5,
        video_timeline=TINY[0],
        audio_timeline=TINY[1],
        generator=seeded(),
    )
    assert pairs.valid.tolist() == [False, False, False, True]


@pytest.mark.parametrize("rule", [*ALL, MIXTURE], ids=[*RULES, "mixture"])
def test_a_seed_tells_everything(rule):
    pairs = [pairs_of(rule, 0.5, TINY, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(pairs[0].lose[1], pairs[1].lose[1])
    assert torch.equal(pairs[0].win[0], pairs[1].win[0])
    assert not torch.equal(pairs[0].lose[1], pairs[2].lose[1])


@pytest.mark.parametrize("duration", [0.2, 0.6, 30.0])
@pytest.mark.parametrize("rule", ALL, ids=RULES)
def test_short_and_long_clips(rule, duration):
    timelines = (
        Timeline(max(2, round(duration * 12)), 12.0),
        Timeline(round(duration * 25), 25.0),
    )
    for difficulty in (0.0, 1.0):
        pairs = pairs_of(rule, difficulty, timelines)
        assert torch.isfinite(pairs.lose[1]).all()
        assert pairs.strength.max() <= duration


@pytest.mark.parametrize("rule", [*ALL, MIXTURE], ids=[*RULES, "mixture"])
def test_drawing_never_waits_for_the_device(rule):
    """A meta tensor has no values: anything that would read one raises."""
    matched = torch.zeros(4, dtype=torch.bool, device="meta")
    first, second = rule.draw_pair(matched, 0.5, 2.0, grain=0.1)
    second = second.aligned(TINY[1], TINY[0], matched)
    assert second.strength.shape == first.rule.shape == (4,)
    if second.warps:
        assert second._warp(torch.empty(4, 48, 2, device="meta"), TINY[1]).shape == (4, 48, 2)


def test_distortions_are_immutable_and_apply_to_any_axis():
    distortion = Shift().draw(3, 0.5, 2.0, generator=seeded())
    assert isinstance(distortion, Distortion)
    assert (distortion.rule == SHIFT).all()
    x = torch.randn(3, 48, 5)
    last = distortion.apply(x.transpose(1, 2), Timeline(48, 24.0, dim=-1))
    assert torch.equal(last, distortion.apply(x, TINY[1]).transpose(1, 2))


# Bad input

V, A = torch.zeros(2, 96, 3), torch.zeros(2, 48, 3)


def paired(video=V, audio=A, rule=MIXTURE, difficulty=0.5, **options):
    timelines = {"video_timeline": TINY[0], "audio_timeline": TINY[1]}
    return make_pairs(video, audio, rule, difficulty, **{**timelines, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired(streams="both"), "streams: expected 'audio' or 'video', got 'both'"),
        (lambda: paired(matched=1.5), "matched: expected a share"),
        (lambda: paired(difficulty=1.2), "difficulty: expected"),
        (lambda: paired(difficulty=torch.zeros(3)), r"difficulty: expected shape \[2\]"),
        (lambda: paired(audio=A[:1]), "one batch"),
        (lambda: paired(audio=A[:, :40]), "48 along axis 1, got 40"),
        (lambda: Shift().draw(2, 0.5, 0.0), "duration: expected .* got 0.0"),
        (lambda: Mixture([]), "weights"),
        (lambda: Mixture(ALL, weights=[1.0]), "got 1 for 4"),
        (lambda: Mixture([Shift()], weights=[-1.0]), "none below 0"),
        (lambda: Mixture([Shift(boundary="edge"), Scale(boundary="wrap")]), "one boundary"),
        (lambda: parse_rule("replace+reverse"), "got 'replace.reverse'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
