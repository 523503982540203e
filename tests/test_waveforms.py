import pytest
import torch

from syncdpo.distortion import Distortion
from syncdpo.negatives import Mixture, Replace, Scale, Shift
from syncdpo.timeline import Timeline
from syncdpo.waveforms import HOP, distort_source, warp_keeping_pitch

RATE = 8000


def scaled(rate, seconds=1.0):
    """A scale around the middle of the clip by a given rate."""
    output = torch.linspace(0, seconds, 65)[None]
    zero = torch.zeros(1)
    return Distortion(
        knots=seconds / 2 + rate * (output - seconds / 2),
        start=zero,
        length=zero,
        donor_start=zero,
        duration=zero + seconds,
        rule=torch.ones(1, dtype=torch.int64),
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
        assert abs(centre - expected - 0.025) <= HOP / RATE
        assert energy.sum() > 50


@pytest.mark.parametrize("count", [RATE, RATE - 3])
def test_identity_returns_the_waveform(count):
    wave = torch.randn(3, count, generator=torch.Generator().manual_seed(0))
    still = Shift().draw(3, 0.5, 1.0)
    still = Distortion(**{**vars(still), "knots": still.knots - still.displacement})
    returned = warp_keeping_pitch(wave, still, RATE)
    assert returned.shape == wave.shape
    # Phases are locked to neighbours, not copied: noise keeps its level and its envelope, not its
    # every sample.
    level = [x.square().mean(1).sqrt() for x in (returned, wave)]
    torch.testing.assert_close(*level, rtol=0.25, atol=0)


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
