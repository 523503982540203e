import numpy as np
import pytest
import torch

from syncdpo.data.clips import Clip, read_clip, write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.data.winners import find_cuts, mistaken_rate, sound_lag, winner_flags


def flags_of(clip: Clip, path) -> list[str]:
    write_clip(path, clip)
    return winner_flags(read_clip(path), path)


def delayed(clip: Clip, seconds: float) -> Clip:
    sound = clip.audio.roll(round(seconds * clip.sample_rate), dims=1)
    return Clip(clip.video, clip.fps, sound, clip.sample_rate)


def longer(seeds) -> Clip:
    """Rendered clips, one after the other."""
    clips = [render_clip(seed) for seed in seeds]
    return Clip(
        torch.cat([clip.video for clip in clips]),
        clips[0].fps,
        torch.cat([clip.audio for clip in clips], dim=1),
        clips[0].sample_rate,
    )


def scene(seed: int, frames: int = 12) -> torch.Tensor:
    """A still of soft blobs, getting brighter: uint8 [T,64,64,3]."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.rand(1, 3, 8, 8, generator=generator)
    still = torch.nn.functional.interpolate(still, (64, 64), mode="bilinear")
    ramp = torch.linspace(0.5, 1, frames)[:, None, None, None]
    return (still.movedim(1, -1) * ramp * 255).to(torch.uint8)


def test_synchronised_clips_pass(tmp_path):
    for seed in range(3):
        assert flags_of(render_clip(seed), tmp_path / f"{seed}.mp4") == []


@pytest.mark.parametrize(("delay", "word"), [(0.3, "lags by 3"), (-0.25, "leads by 2")])
def test_moved_sound_is_named(tmp_path, delay, word):
    flags = flags_of(delayed(longer(range(3)), delay), tmp_path / "clip.mp4")
    assert any(flag.startswith(f"its sound {word}") for flag in flags)


@pytest.mark.parametrize("lag", [-0.4, -0.15, 0.25, 0.8])
def test_the_lag_is_recovered(lag):
    generator = np.random.default_rng(0)
    seen = np.cumsum(generator.uniform(0.2, 0.9, 8))
    heard = np.append(seen + lag + generator.normal(0, 0.01, 8), generator.uniform(0, 4, 2))
    assert sound_lag(seen, heard) == pytest.approx(lag, abs=0.02)


def test_a_lag_needs_evidence():
    generator = np.random.default_rng(0)
    seen = np.cumsum(generator.uniform(0.2, 0.9, 8))
    for lag in (-0.08, 0.0, 0.1, 0.18):
        assert sound_lag(seen, seen + lag) is None
    assert sound_lag(seen[:2], seen[:2] + 0.4) is None
    beat = np.arange(10) * 0.5  # every lag of half a second fits nearly as well as none
    assert sound_lag(beat, beat) is None
    assert sound_lag(np.empty(0), np.empty(0)) is None


def test_cuts_are_found_and_flashes_are_not():
    first, second = scene(0), scene(1)
    assert find_cuts(first) == []
    assert find_cuts(torch.cat([first, second])) == [12]
    flash = first.clone()
    flash[5] = (flash[5].float() * 0.5 + 120).to(torch.uint8)
    assert find_cuts(flash) == []
    assert find_cuts(first[:2]) == []


@pytest.mark.parametrize(
    ("fps", "pictures", "sound", "made"),
    [
        (24, 10 * 25 / 24, 10, 25),
        (25, 10 * 24 / 25, 10, 24),
        (30, 10 * 24 / 30, 10, 24),
        (24, 10.02, 10, None),
        (24, 10, 0, None),
        (24, 7.3, 10, None),
    ],
)
def test_a_mistaken_frame_rate_shows_in_the_lengths(fps, pictures, sound, made):
    assert mistaken_rate(fps, pictures, sound) == made


def test_a_mistaken_frame_rate_is_named(tmp_path):
    """250 pictures made at 25 fps and stored at 24, with their 10 s of sound."""
    video = torch.cat([scene(0, 125), scene(0, 125).flip(0)])
    sound = 0.1 * torch.rand(1, 160_000, generator=torch.Generator().manual_seed(0))
    flags = flags_of(Clip(video, 24.0, sound, 16_000), tmp_path / "clip.mp4")
    assert flags == ["its pictures and sound differ in length as if made at 25 fps"]
