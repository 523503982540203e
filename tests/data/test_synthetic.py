"""Rendered clips: what is seen and heard follows from the seed, and belongs together."""

import pytest
import torch

from syncdpo.data.clips import read_clip
from syncdpo.data.synthetic import (
    FPS,
    PITCHES,
    SAMPLE_RATE,
    draw_balls,
    draw_offset,
    render,
    render_folder,
)


def loudness(audio, window=80):
    return audio[0].unfold(0, window, window).square().mean(1).sqrt()


def test_same_seed_same_clip_and_others_differ():
    first, again, other = render(3).clip, render(3).clip, render(4).clip
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)
    assert not torch.equal(first.video, other.video)


def test_format_is_two_seconds_of_pictures_and_sound():
    clip = render(0).clip
    assert clip.video.shape == (48, 64, 64, 3)
    assert clip.audio.shape == (1, 32_000)
    assert (clip.fps, clip.sample_rate) == (24, 16_000)


@pytest.mark.parametrize("seed", range(5))
def test_each_impact_is_heard_when_it_happens(seed):
    rendered = render(seed)
    level = loudness(rendered.clip.audio)  # every 5 ms
    for time in rendered.times.tolist():
        if 0.02 < time < 1.97:
            place = int(time * SAMPLE_RATE / 80)
            assert level[place + 1 : place + 3].max() > 3 * level[place - 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_floor_lights_up_when_the_ball_strikes(seed):
    rendered = render(seed)
    floor = rendered.clip.video[:, 58:].float().mean((1, 2, 3))
    rising = floor.diff().clamp(min=0)
    for time in rendered.times.tolist():
        frame = int(time * FPS + 0.5)  # the first picture that shows the lit floor
        if 2 <= frame < len(floor):
            assert rising[frame - 1] == rising[max(0, frame - 3) : frame + 2].max()


def test_offset_delays_the_sound_only():
    plain, late = render(7), render(7, offset=0.25)
    assert torch.equal(plain.clip.video, late.clip.video)
    samples = SAMPLE_RATE // 4
    torch.testing.assert_close(
        late.clip.audio[:, samples:], plain.clip.audio[:, :-samples], atol=2e-3, rtol=0
    )


def test_stems_sum_to_the_mix_and_balls_differ_in_pitch():
    rendered = render(5, balls=2)
    torch.testing.assert_close(torch.stack(rendered.stems).sum(0)[None], rendered.clip.audio)
    first, second = draw_balls(5, 2)
    assert first.pitch != second.pitch


def test_pitch_is_what_the_ball_says():
    [ball] = draw_balls(11)
    spectrum = torch.fft.rfft(render(11).clip.audio[0]).abs()
    heard = spectrum.argmax().item() / 2.0  # Hz, of 2 s
    assert abs(heard - PITCHES[ball.pitch]) < 15


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="balls: expected 1 or 2, got 3"):
        render(0, balls=3)
    with pytest.raises(ValueError, match="offset: expected at most"):
        render(0, offset=1.5)


def test_folder_keeps_what_is_there(tmp_path):
    render_folder(tmp_path, range(2))
    before = (tmp_path / "000001.mp4").stat().st_mtime_ns
    render_folder(tmp_path, range(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:06d}.mp4" for i in range(3)]
    assert (tmp_path / "000001.mp4").stat().st_mtime_ns == before


def test_offsets_of_a_folder_are_those_that_were_drawn(tmp_path):
    offsets = torch.tensor([draw_offset(seed, 0.06) for seed in range(512)])
    assert offsets.mean().abs() < 0.01  # four standard errors
    assert 0.052 < offsets.std() < 0.068
    assert draw_offset(3, 0.0) == 0
    render_folder(tmp_path, range(2), offset_spread=0.2)
    for seed in range(2):
        clip, plain = read_clip(tmp_path / f"{seed:06d}.mp4"), render(seed).clip
        late = render(seed, offset=draw_offset(seed, 0.2)).clip
        wrong, right = ((clip.audio - x.audio).square().mean() for x in (plain, late))
        assert right < 0.05 * wrong
