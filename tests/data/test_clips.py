"""Clips keep time through a file, whatever the container does to its streams."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from recordings import RATE, click_and_flash

from syncdpo.data.clips import Clip, read_clip, write_clip

SYNC = 0.005  # s; what a file may at most put between sound and picture


def flash_time(clip: Clip) -> float:
    return clip.video.float().mean((1, 2, 3)).argmax().item() / clip.fps


def delay(reference: torch.Tensor, heard: torch.Tensor, rate: int) -> float:
    """Seconds by which `heard` lags `reference`, at the peak of their cross-correlation."""
    n = 2 * max(reference.numel(), heard.numel())
    spectrum = torch.fft.rfft(heard.double(), n) * torch.fft.rfft(reference.double(), n).conj()
    lag = torch.fft.irfft(spectrum, n).argmax().item()
    return (lag - n if lag > n // 2 else lag) / rate


def write_raw(path, clip, *, video_at=0.0, audio_at=0.0, times=None, order="video", codec="libx264",
              options=None, audio_codec="aac", pixel="yuv420p", tags=None):  # fmt: skip
    """A file as others make them: B-frames, streams that start apart, variable frame rates."""
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=Fraction(clip.fps).limit_denominator(1001))
        video.height, video.width = clip.video.shape[1:3]
        video.pix_fmt, video.options = pixel, options or {}
        for name, value in (tags or {}).items():
            setattr(video.codec_context, name, value)
        layout = "mono" if clip.audio.shape[0] == 1 else "stereo"
        audio = out.add_stream(audio_codec, rate=clip.sample_rate, layout=layout)
        clock = Fraction(1, 90_000)
        video.codec_context.time_base = clock
        if times is None:
            times = [k / clip.fps for k in range(len(clip.video))]
        for picture, time in zip(clip.video, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.pts, frame.time_base = round((time + video_at) / clock), clock
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        size = audio.codec_context.frame_size or 1024
        for start in range(0, clip.audio.shape[1], size):
            chunk = np.ascontiguousarray(clip.audio[:, start : start + size].numpy())
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
            frame.sample_rate = clip.sample_rate
            frame.pts = start + round(audio_at * clip.sample_rate)
            frame.time_base = Fraction(1, clip.sample_rate)
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return path


@pytest.fixture
def clip():
    return click_and_flash(1.0)


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("fps", [24.0, 24000 / 1001, 30.0])
def test_written_and_read_back_keeps_sound_with_picture(tmp_path, fps, rate):
    wrote = click_and_flash(round(1.2 * fps) / fps, fps=fps, rate=rate, channels=2)
    write_clip(tmp_path / "a.mp4", wrote)
    read = read_clip(tmp_path / "a.mp4")
    assert read.video.shape == wrote.video.shape
    assert read.audio.shape[0] == 2
    assert abs(read.fps - fps) < 1e-6
    assert read.audio.shape[1] / rate == pytest.approx(read.seconds, abs=1 / rate)
    assert flash_time(read) == pytest.approx(flash_time(wrote), abs=1e-6)
    assert abs(delay(wrote.audio[0], read.audio[0], rate)) < SYNC


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
@pytest.mark.parametrize(("video_at", "audio_at"), [(0, 0), (0.5, 0.5), (0.25, 0), (0, 0.25)])
def test_one_origin_for_both_streams(tmp_path, clip, name, video_at, audio_at):
    """B-frames, first timestamps other than 0, streams that start apart: the timestamps rule."""
    path = write_raw(tmp_path / name, clip, video_at=video_at, audio_at=audio_at,
                     options={"bf": "3", "x264-params": "b-adapt=0"})  # fmt: skip
    with av.open(str(path)) as container:
        assert any(f.pict_type == 3 for f in container.decode(video=0)), "no B-frames to test with"
    read = read_clip(path)
    assert len(read.video) == 48
    assert flash_time(read) == pytest.approx(1.0)
    assert delay(clip.audio[0], read.audio[0], RATE) == pytest.approx(audio_at - video_at, abs=SYNC)


def test_opus_in_webm(tmp_path):
    wrote = click_and_flash(1.0, rate=48_000)
    path = write_raw(tmp_path / "a.webm", wrote, codec="libvpx", audio_codec="libopus")
    read = read_clip(path)
    assert flash_time(read) == pytest.approx(1.0)
    assert abs(delay(wrote.audio[0], read.audio[0], 48_000)) < SYNC


def test_gap_in_the_sound_is_silence(tmp_path, clip):
    """Lost packets leave a gap in the timestamps, and what follows keeps its place."""
    path = tmp_path / "a.mkv"
    whole = write_raw(tmp_path / "whole.mkv", clip, audio_codec="pcm_s16le")
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        copies = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            lost = packet.stream.type == "audio" and 0.3 < packet.pts * packet.time_base < 0.6
            if not lost:
                packet.stream = copies[packet.stream.index]
                out.mux(packet)
    assert abs(delay(clip.audio[0], read_clip(path).audio[0], RATE)) < SYNC


def test_variable_frame_rate_becomes_constant(tmp_path):
    """Whatever the spacing, picture k is the one on at (k + 0.5)/fps."""
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0.0], np.cumsum(rng.uniform(0.01, 0.12, 40))])
    levels = np.linspace(20, 230, len(starts)).round()
    video = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 64, 64, 3)
    wrote = Clip(video.contiguous(), 24.0, torch.zeros(1, 3 * RATE), RATE)
    path = write_raw(tmp_path / "a.mp4", wrote, times=starts)
    seconds = 1.8
    read = read_clip(path, seconds=seconds, fps=30)
    shown = np.searchsorted(starts, (np.arange(round(seconds * 30)) + 0.5) / 30, side="right") - 1
    seen = read.video.float().mean((1, 2, 3)).numpy()
    assert np.abs(seen - levels[shown]).max() < 2.5  # half the step between two pictures


@pytest.mark.parametrize("fps", [12, 20, 24, 25, 30, 60])
def test_resampled_frame_rate_is_out_by_half_a_picture_at_most(tmp_path, fps):
    """A brightness that rises with time rises at the same times at any other rate."""
    ramp = torch.linspace(20, 230, 48).round().to(torch.uint8)
    video = ramp[:, None, None, None].expand(-1, 64, 64, 3).contiguous()
    write_clip(tmp_path / "a.mp4", Clip(video, 24.0, torch.zeros(1, 2 * RATE), RATE))
    read = read_clip(tmp_path / "a.mp4", fps=fps)
    shown = ((read.video.float().mean((1, 2, 3)) - 20) / 210 * 47).round()
    error = (shown + 0.5) / 24 - (torch.arange(2 * fps) + 0.5) / fps
    assert len(read.video) == 2 * fps
    assert error.abs().max() < 0.5 / 24 + 1e-3
    if fps not in (12, 20):  # there centres fall on the seams between two pictures
        assert error.mean().abs() < SYNC


@pytest.mark.parametrize("rate", [8000, 22_050, 24_000, 44_100])
def test_resampled_sound_keeps_its_place_and_pitch(tmp_path, rate):
    wrote = click_and_flash(1.0)
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(2 * RATE) / RATE)
    write_clip(tmp_path / "a.mp4", Clip(wrote.video, 24.0, wrote.audio + tone * (wrote.audio == 0),
                                        RATE))  # fmt: skip
    read = read_clip(tmp_path / "a.mp4", sample_rate=rate)
    assert read.sample_rate == rate
    assert read.audio.shape == (1, 2 * rate)
    spectrum = torch.fft.rfft(read.audio[0]).abs()
    assert spectrum.argmax().item() / 2 == pytest.approx(440, abs=0.5)
    loudest = (read.audio[0].abs() > 0.6).nonzero()[0].item() / rate
    assert loudest == pytest.approx(1.001, abs=SYNC)


def test_first_seconds_of_a_longer_file(tmp_path):
    write_clip(tmp_path / "a.mp4", click_and_flash(0.5, seconds=4.0))
    read = read_clip(tmp_path / "a.mp4", seconds=1.0)
    assert read.video.shape[0] == 24
    assert read.audio.shape == (1, RATE)
    assert flash_time(read) == pytest.approx(0.5)


# --- pictures and channels ------------------------------------------------------------------------


def smooth_picture(height=64, width=64):
    x = torch.linspace(0, 1, width)[None].expand(height, -1)
    y = torch.linspace(0, 1, height)[:, None].expand(-1, width)
    return (torch.stack([x, y, 1 - 0.5 * (x + y)], -1) * 225 + 15).round().to(torch.uint8)


def test_colours_survive(tmp_path):
    video = smooth_picture().expand(12, -1, -1, -1).contiguous()
    write_clip(tmp_path / "a.mp4", Clip(video, 24.0, torch.zeros(1, RATE // 2), RATE))
    error = read_clip(tmp_path / "a.mp4").video.float() - video.float()
    assert error.mean((0, 1, 2)).abs().max() < 2
    assert error.abs().mean() < 2


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(("matrix", "tag"), [("709", 1), ("601", 6)])
def test_colours_are_read_by_their_tags(tmp_path, matrix, tag, full):
    """A file in either matrix and range, converted here from the standards' own coefficients."""
    kr, kb = {"709": (0.2126, 0.0722), "601": (0.299, 0.114)}[matrix]
    rgb = np.array([200.0, 60.0, 120.0])
    luma = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    chroma = np.array([(rgb[2] - luma) / (2 - 2 * kb), (rgb[0] - luma) / (2 - 2 * kr)])
    if not full:
        luma, chroma = 16 + luma * 219 / 255, chroma * 224 / 255
    planes = [np.full((64, 64), round(luma), np.uint8)]
    planes += [np.full((32, 32), round(c + 128), np.uint8) for c in chroma]
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("libx264", rate=24), out.add_stream("aac", rate=RATE)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        video.codec_context.colorspace, video.codec_context.color_range = tag, 1 + full
        frame = av.VideoFrame(64, 64, "yuv420p")
        for plane, values in zip(frame.planes, planes, strict=True):
            rows = np.zeros((plane.height, plane.line_size), np.uint8)
            rows[:, : plane.width] = values
            plane.update(rows.tobytes())
        frame.colorspace, frame.color_range = tag, 1 + full
        for k in range(12):
            frame.pts, frame.time_base = k, Fraction(1, 24)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 8000), np.float32), "fltp", "stereo")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    assert np.abs(read_clip(path).video.float().mean((0, 1, 2)).numpy() - rgb).max() < 2


def test_size_covers_and_crops_the_centre(tmp_path):
    wide = torch.zeros(12, 64, 160, 3, dtype=torch.uint8)
    wide[:, :, :48], wide[:, :, 48:112], wide[:, :, 112:] = 30, 128, 220
    write_clip(tmp_path / "a.mp4", Clip(wide, 24.0, torch.zeros(1, RATE // 2), RATE))
    read = read_clip(tmp_path / "a.mp4", size=(32, 32))
    assert read.video.shape[1:] == (32, 32, 3)
    assert (read.video[:, :, 2:-2].float() - 128).abs().max() < 6


def test_shrinking_does_not_alias(tmp_path):
    stripes = torch.zeros(12, 128, 128, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 240
    write_clip(tmp_path / "a.mp4", Clip(stripes, 24.0, torch.zeros(1, RATE // 2), RATE))
    read = read_clip(tmp_path / "a.mp4", size=(30, 30))
    assert (read.video[:, :, 2:-2].float() - 120).abs().max() < 6


def test_rotation_tag_is_honoured(tmp_path):
    video = torch.full((12, 64, 128, 3), 40, dtype=torch.uint8)
    video[:, :, :32] = 220  # the left end of the stored picture
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.set_display_rotation(90)  # counter-clockwise: the left end comes to the bottom
        audio = out.add_stream("aac", rate=RATE, layout="mono")
        for k, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    read = read_clip(path, size=(64, 32))
    assert read.video[:, -12:].float().mean() > 200
    assert read.video[:, :40].float().mean() < 60


def test_channels(tmp_path):
    wrote = click_and_flash(1.0, channels=2)
    time = torch.arange(2 * RATE) / RATE
    sound = torch.stack([torch.sin(2 * torch.pi * f * time) for f in (300, 700)]) * 0.4
    write_clip(tmp_path / "a.mp4", Clip(wrote.video, 24.0, sound, RATE))
    stereo, mono = read_clip(tmp_path / "a.mp4"), read_clip(tmp_path / "a.mp4", channels=1)
    assert (stereo.audio - sound).abs().mean() < 0.02
    assert mono.audio.shape == (1, 2 * RATE)
    assert torch.allclose(mono.audio[0], stereo.audio.mean(0), atol=1e-6)
    write_clip(tmp_path / "b.mp4", mono)
    twice = read_clip(tmp_path / "b.mp4", channels=2)
    assert torch.equal(twice.audio[0], twice.audio[1])
