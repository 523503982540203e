"""The detectors find what the renderer did, and the comparison says what was done to it."""

import itertools

import numpy as np
import pytest
import torch

from syncdpo.data.clips import Clip, read_clip, write_clip
from syncdpo.data.synthetic import render
from syncdpo.metrics import (
    ACCEPTABLE,
    UNDETECTABLE,
    ClipMetrics,
    av_align,
    clip_metrics,
    match_events,
    picture_events,
    sound_events,
    summarise,
)
from syncdpo.models import codec

CLIPS = 24
EDGE = 0.05  # s; an impact must be shown before and after to be found


@pytest.fixture(scope="module")
def rendered():
    return [render(seed) for seed in range(1000, 1000 + CLIPS)]


def degraded(clip: Clip) -> Clip:
    """As the embedded default decodes it: pictures of 8×8 cells, attacks smeared over 40 ms."""
    video = codec.decode_video(codec.encode_video(clip.video))
    audio = codec.decode_audio(codec.encode_audio(clip.audio[0]))
    return Clip(video, clip.fps, audio[None].float(), clip.sample_rate)


def shifted(clip: Clip, seconds: float) -> Clip:
    """The sound, later by `seconds`; silence where nothing is known."""
    steps = round(seconds * clip.sample_rate)
    audio = torch.zeros_like(clip.audio)
    if steps >= 0:
        audio[:, steps:] = clip.audio[:, : audio.shape[1] - steps]
    else:
        audio[:, :steps] = clip.audio[:, -steps:]
    return Clip(clip.video, clip.fps, audio, clip.sample_rate)


def found(clip: Clip, stream: str) -> np.ndarray:
    if stream == "picture":
        return picture_events(clip.video, clip.fps)
    return sound_events(clip.audio, clip.sample_rate)


# --- detectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", ["rendered", "mp4", "codec"])
@pytest.mark.parametrize(("stream", "spread"), [("picture", 13.0), ("sound", 6.0)])
def test_impacts_are_found_at_their_times(rendered, tmp_path, stream, spread, copy):
    """Spread: a picture's own 42 ms are uniform noise of 12 ms; smeared attacks make 4 ms."""
    errors, missed, extra = [], 0, 0
    for item in rendered:
        clip, times = item.clip, item.times.numpy()
        if copy == "mp4":
            write_clip(tmp_path / "a.mp4", clip)
            clip = read_clip(tmp_path / "a.mp4")
        elif copy == "codec":
            clip = degraded(clip)
        events = found(clip, stream)
        pairs = match_events(times, events, 0.06)
        errors += [1e3 * (events[j] - times[i]) for i, j in pairs]
        inside = {i for i, t in enumerate(times) if EDGE <= t <= 2 - EDGE}
        missed += len(inside - {i for i, _ in pairs})
        extra += len(events) - len(pairs)
    assert len(errors) > 3 * CLIPS
    assert missed <= 0.02 * len(errors)
    assert extra <= 0.02 * len(errors)
    assert abs(np.mean(errors)) < 5
    assert np.std(errors) < spread


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_sound_events_at_any_sample_rate(rate):
    """A click, a decaying tone and a tone that stays, alone and in noise at −40 dB."""
    time = torch.arange(2 * rate) / rate
    wave = torch.sin(2 * torch.pi * 600 * time)
    sounds = {
        "click": ((time >= 0.7) & (time < 0.702)).float(),
        "struck": 0.5 * wave * torch.exp(-(time - 0.7).clamp(min=0) / 0.1) * (time >= 0.7),
        "held": 0.5 * wave * (time >= 0.7),
    }
    noise = 0.005 * torch.randn(2 * rate, generator=torch.Generator().manual_seed(0))
    for sound, floor in itertools.product(sounds.values(), (0, noise)):
        events = sound_events((sound + floor)[None], rate)
        assert events == pytest.approx([0.7], abs=0.012)


@pytest.mark.parametrize("polarity", [1, -1])
def test_light_and_dark_are_events_alike(polarity):
    video = torch.full((48, 96, 160, 3), 128, dtype=torch.uint8)
    video[20:, 30:60, 40:90] += polarity * 60
    assert picture_events(video, 24.0) == pytest.approx([20 / 24], abs=0.5 / 24)


@pytest.mark.parametrize("fps", [12.0, 24.0, 30.0, 60.0])
def test_motion_that_starts_is_an_event(fps):
    """A bright square, at rest for a second, sets off; the mean brightness stays as it is."""
    video = torch.full((round(2 * fps), 64, 64, 3), 20, dtype=torch.uint8)
    for k in range(len(video)):
        x = 4 + round(max(0.0, k / fps - 1) * 48)
        video[k, 24:40, x : x + 12] = 220
    events = picture_events(video, fps)
    assert len(events) >= 1
    assert abs(events[0] - 1) < 1.6 / fps + 0.02


def test_where_nothing_happens_nothing_is_found():
    generator = torch.Generator().manual_seed(0)
    still = torch.full((48, 64, 64, 3), 90, dtype=torch.uint8)
    grain = torch.randint(-3, 4, still.shape, generator=generator)
    assert not len(picture_events(still, 24.0))
    assert not len(picture_events((still + grain).to(torch.uint8), 24.0))
    assert not len(sound_events(torch.zeros(1, 32_000), 16_000))
    assert not len(sound_events(torch.sin(torch.arange(32_000) * 0.2)[None], 16_000))
    assert not len(sound_events(0.3 * torch.randn(1, 32_000, generator=generator), 16_000))


def test_too_short_to_tell():
    assert picture_events(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 24.0).dtype == np.float64
    assert not len(sound_events(torch.zeros(2, 100), 16_000))
    assert not len(sound_events(torch.zeros(2, 0), 16_000))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"video: expected \[T,H,W,3\], got \[3, 64, 64\]"):
        picture_events(torch.zeros(3, 64, 64, dtype=torch.uint8), 24.0)
    with pytest.raises(ValueError, match=r"audio: expected \[C,N\], got \[8\]"):
        sound_events(torch.zeros(8), 16_000)


# --- matching -------------------------------------------------------------------------------------


def best_by_trying_all(seen, heard, lead, lag):
    """(pairs, −Σ|Δ|) of the best one-to-one matching, by enumeration."""
    best = (0, 0.0)
    for n in range(1, min(len(seen), len(heard)) + 1):
        for i in itertools.combinations(range(len(seen)), n):
            for j in itertools.permutations(range(len(heard)), n):
                delta = heard[list(j)] - seen[list(i)]
                if ((delta >= -lead) & (delta <= lag)).all():
                    best = max(best, (n, -np.abs(delta).sum()))
    return best


def test_matching_is_optimal():
    rng = np.random.default_rng(0)
    for _ in range(60):
        seen, heard = (np.sort(rng.uniform(0, 1, rng.integers(0, 5))) for _ in range(2))
        pairs = match_events(seen, heard, (0.1, 0.3))
        cost = -sum(abs(heard[j] - seen[i]) for i, j in pairs)
        assert pairs == sorted(pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        assert (len(pairs), cost) == pytest.approx(best_by_trying_all(seen, heard, 0.1, 0.3))


def test_windows_are_asymmetric():
    for (lead, lag), allowed in ((UNDETECTABLE, (-0.045, 0.125)), (ACCEPTABLE, (-0.09, 0.185))):
        assert (-lead, lag) == allowed
        for offset in (-lead + 1e-3, -lead - 1e-3, lag - 1e-3, lag + 1e-3):
            pairs = match_events(np.array([1.0]), np.array([1 + offset]), (lead, lag))
            assert bool(pairs) == (-lead <= offset <= lag)
    assert match_events(np.array([1.0]), np.array([0.95]), 0.06) == [(0, 0)]


# --- summaries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-0.2, -0.06, 0.0, 0.08, 0.15])
def test_planted_offset_is_recovered(rendered, offset):
    report = summarise([clip_metrics(shifted(item.clip, offset)) for item in rendered])
    assert report["offset_ms"] == pytest.approx(1e3 * offset, abs=5)
    assert report["clips"] == CLIPS
    if offset == 0:
        assert report["f1"] > 0.96
        assert report["f1_undetectable"] > 0.96
        assert report["onset_error_ms"] < 15
    if offset == -0.2:
        assert report["f1"] < 0.1
    if offset == 0.15:
        assert report["f1"] > 0.9
        assert report["f1_undetectable"] < 0.5


def test_sound_of_another_clip_is_near_chance(rendered):
    metrics = [clip_metrics(item.clip) for item in rendered]
    right = summarise(metrics)
    others = metrics[1:] + metrics[:1]
    wrong = summarise([ClipMetrics(a.seen, b.heard, a.seconds)
                       for a, b in zip(metrics, others, strict=True)])  # fmt: skip
    # Events 0.35 to 0.8 s apart meet a window of 0.275 s about half of the time.
    assert 0.25 < wrong["f1"] < 0.65
    assert wrong["onset_error_ms"] > 80 > 5 * right["onset_error_median_ms"]
    assert wrong["events_per_clip"] == right["events_per_clip"]


def test_summary_of_known_events():
    clips = [
        ClipMetrics(np.array([0.5, 1.5]), np.array([0.45, 1.6]), 2.0),  # −50 and +100 ms
        ClipMetrics(np.array([1.0]), np.array([]), 2.0),  # seen, not heard: half of 2 s
        ClipMetrics(np.array([]), np.array([0.3]), 2.0),  # heard, not seen
        ClipMetrics(np.array([0.1]), np.array([1.9]), 2.0),  # 1.8 s off counts as 1 s
        ClipMetrics(np.array([1.0]), np.array([1.02]), 2.0),
    ]
    assert summarise(clips) == pytest.approx({
        "f1": 2 * 3 / (5 + 5), "f1_undetectable": 2 * 2 / (5 + 5),
        "onset_error_ms": (50 + 100 + 1000 + 1000 + 20) / 5, "onset_error_median_ms": 100,
        "offset_ms": 70 / 3, "offset_spread_ms": 2.5, "events_per_clip": 1.0, "seen_per_clip": 1.0,
        "clips": 5,
    })  # fmt: skip


def test_a_sound_while_nothing_can_be_seen_counts_only_with_a_partner():
    early, partner = np.array([0.03, 0.5]), np.array([0.07, 0.5])

    def f1(seen, blind):
        return summarise([ClipMetrics(seen, early, 2.0, blind)])["f1"]

    assert f1(np.array([0.5]), 0.0) == pytest.approx(2 / 3)
    assert f1(np.array([0.5]), 0.06) == 1  # neither right nor wrong
    assert f1(partner, 0.06) == 1  # one pair more
    assert f1(np.array([]), 0.06) == 0  # the one at 0.5 s is wrong still
    assert summarise([ClipMetrics(np.array([]), early[:1], 2.0, 0.06)])["f1"] is None


def test_no_event_is_seen_while_blind():
    for seed in range(40):
        metrics = clip_metrics(render(seed).clip)
        assert (metrics.seen >= metrics.blind).all()


def test_summary_of_nothing():
    nothing = ClipMetrics(np.array([]), np.array([]), 2.0)
    report = summarise([nothing])
    for name in (
        "f1",
        "f1_undetectable",
        "onset_error_ms",
        "onset_error_median_ms",
        "offset_ms",
        "offset_spread_ms",
    ):
        assert report[name] is None
    assert report["events_per_clip"] == report["seen_per_clip"] == 0
    with pytest.raises(ValueError, match="got none"):
        summarise([])


def test_av_align_tells_sync_from_mistiming(rendered):
    pytest.importorskip("librosa", reason="AV-Align needs the extra eval")
    pytest.importorskip("cv2", reason="AV-Align needs the extra eval")
    clips = [item.clip for item in rendered[:4]]
    right = np.mean([av_align(clip) for clip in clips])
    wrong = np.mean([av_align(shifted(clip, 0.15)) for clip in clips])
    assert 0 <= wrong < right <= 1
    still = torch.zeros(24, 64, 64, 3, dtype=torch.uint8)
    assert av_align(Clip(still, 24.0, torch.zeros(1, 16_000), 16_000)) == 0
