import pytest
import torch
import torchaudio

from syncdpo.data.synthetic import SAMPLE_RATE, draw_balls, render_audio
from syncdpo.negatives import Mixture, Replace, Scale, Shift, Timeline, Warp
from syncdpo.negatives.distortion import Distortion
from syncdpo.negatives.waveforms import WINDOW_SECONDS, distort_source, warp_keeping_pitch

RATE = 8000


def scaled(rate, seconds=1.0, count=1):
    """A scale around the middle of the clip by a given rate."""
    output = torch.linspace(0, seconds, 65).expand(count, -1)
    zero = torch.zeros(count)
    return Distortion(
        knots=seconds / 2 + rate * (output - seconds / 2),
        start=zero,
        length=zero,
        donor_start=zero,
        duration=zero + seconds,
        rule=torch.ones(count, dtype=torch.int64),
        boundary="edge",
        replaces=False,
    )


def pitch(wave):
    """The loudest frequency in Hz."""
    spectrum = torch.fft.rfft(wave * torch.hann_window(wave.shape[-1])).abs()
    return spectrum.argmax(-1).item() * RATE / wave.shape[-1]


def tone(frequency, seconds=1.0):
    return torch.sin(2 * torch.pi * frequency * torch.arange(int(seconds * RATE)) / RATE)


@pytest.mark.parametrize("rate", [0.5, 0.8, 1.25, 2.0])
@pytest.mark.parametrize("frequency", [220.0, 431.0, 1500.0])
def test_a_warped_tone_keeps_its_pitch_where_resampling_changes_it(rate, frequency):
    wave = tone(frequency)
    middle = slice(RATE // 4, 3 * RATE // 4)
    kept = warp_keeping_pitch(wave[None], scaled(rate), RATE)[0]
    resampled = scaled(rate).apply(wave[None], Timeline(RATE, float(RATE)))[0]
    assert abs(pitch(kept[middle]) - frequency) <= 3
    assert abs(pitch(resampled[middle]) - rate * frequency) <= 3 * rate
    assert kept[middle].square().mean().item() == pytest.approx(0.5, rel=0.1)


def test_events_move_as_the_distortion_says():
    wave = torch.zeros(RATE)
    for seconds in (0.4, 0.5, 0.6):
        start = int(seconds * RATE)
        wave[start : start + 200] += tone(1000.0)[:200]
    kept = warp_keeping_pitch(wave[None], scaled(0.5), RATE)[0]
    seconds = torch.arange(RATE) / RATE
    for expected in (0.3, 0.5, 0.7):  # 0.5 + (t - 0.5) / 0.5
        near = (seconds - expected - 0.025).abs() < 0.1  # a burst of 25 ms now lasts 50
        energy = kept[near].square()
        centre = (energy * seconds[near]).sum() / energy.sum()
        assert abs(centre - expected - 0.025) <= WINDOW_SECONDS / 2
        assert energy.sum() > 50


@pytest.mark.parametrize("count", [RATE, RATE - 3])
def test_identity_returns_the_waveform(count):
    wave = torch.randn(3, count, generator=torch.Generator().manual_seed(0))
    still = Shift().draw(3, 0.5, 1.0)
    still = Distortion(**{**vars(still), "knots": still.knots - still.displacement})
    returned = warp_keeping_pitch(wave, still, RATE)
    torch.testing.assert_close(returned, wave, rtol=0, atol=5e-4)


def by_torchaudio(wave, rate):
    """A scale around the middle, by the vocoder of torchaudio at its best window for attacks."""
    stretch = torchaudio.transforms.TimeStretch(hop_length=128, n_freq=257)
    margin = round(wave.shape[1] * max(rate - 1, 0) / 2) + 512
    padded = torch.nn.functional.pad(wave, (margin, margin))
    window = torch.hann_window(512)
    spectrum = torch.stft(padded, 512, 128, window=window, return_complex=True)
    length = round(padded.shape[1] / rate)
    out = torch.istft(stretch(spectrum, rate), 512, 128, window=window, length=length)
    start = (out.shape[1] - wave.shape[1]) // 2
    return out[:, start : start + wave.shape[1]]


def attacks(wave, impacts, rate):
    """Per impact how late half its peak is reached, and how long 10 to 90 % take, in ms."""
    found = []
    envelope = torch.nn.functional.max_pool1d(wave.abs()[None], 33, 1, 16)[0]
    for b, times in enumerate(impacts):
        for time in 1 + (times - 1) / rate:
            if not 0.1 < time < 1.85:
                continue
            first = round((time.item() - 0.08) * SAMPLE_RATE)
            near = envelope[b, first : first + round(0.16 * SAMPLE_RATE)]
            low, half, high = (
                int((near >= share * near.max()).nonzero()[0]) for share in (0.1, 0.5, 0.9)
            )
            late = (first + half) / SAMPLE_RATE - time
            found.append((late.abs().item() * 1e3, (high - low) / SAMPLE_RATE * 1e3))
    return torch.tensor(found).mean(0).tolist()


@pytest.mark.parametrize("rate", [0.5, 2 / 3, 1 / 1.1, 1.1, 1.5, 2.0])
def test_attacks_stay_sharper_and_more_punctual_than_torchaudio_keeps_them(rate):
    balls = [draw_balls(seed)[0] for seed in range(8)]
    wave = torch.stack([render_audio(ball) for ball in balls])
    impacts = [ball.impacts[(ball.impacts > 0.02) & (ball.impacts < 1.98)] for ball in balls]
    ours = warp_keeping_pitch(wave, scaled(rate, 2.0, len(wave)), SAMPLE_RATE)
    late, attack = attacks(ours, impacts, rate)
    late_there, attack_there = attacks(by_torchaudio(wave, rate), impacts, rate)
    assert late < late_there
    assert late < 5
    assert attack < 15
    if 0.6 < rate < 1.6:
        assert attack < attack_there / 1.3


def test_a_map_that_jumps_and_wraps_stays_finite_and_as_loud():
    wave = render_audio(draw_balls(1)[0])[None].repeat(16, 1)
    for rule in (Shift(), Warp(), Scale()):
        distortion = rule.draw(16, 0.0, 2.0, generator=torch.Generator().manual_seed(0))
        out = warp_keeping_pitch(wave, distortion, SAMPLE_RATE)
        assert torch.isfinite(out).all()
        assert 0.5 < out.square().mean() / wave.square().mean() < 2


def test_one_source_moves_and_the_others_stay():
    stems = torch.randn(4, 3, 100, 2, generator=torch.Generator().manual_seed(0))
    source = torch.tensor([0, 2, 1, 2])
    timeline = Timeline(100, 50.0)
    rule = Mixture([Replace(), Scale()])
    distortion = rule.draw(4, 0.2, 2.0, generator=torch.Generator().manual_seed(1))
    mix = distort_source(stems, source, distortion, timeline)
    for b, s in enumerate(source.tolist()):
        others = sum(stems[b, i] for i in range(3) if i != s)
        moved = distortion.apply(stems[torch.arange(4), source], timeline)[b]
        torch.testing.assert_close(mix[b] - others, moved, rtol=0, atol=2e-6)
        assert (mix[b] - stems[b].sum(0)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warp_keeping_pitch(torch.zeros(8), scaled(1.0), RATE), r"shape \[B, N\]"),
        (
            lambda: warp_keeping_pitch(torch.zeros(2, 8), Replace().draw(2, 0.5, 1.0), RATE),
            "one with Replace",
        ),
        (
            lambda: distort_source(
                torch.zeros(2, 2, 50), torch.zeros(2).long(), scaled(1.0), Timeline(60, 60.0)
            ),
            "60 along axis 1, got 50",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
