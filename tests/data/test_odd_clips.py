"""Clips of odd kinds are read within 5 ms of the instants at which they were made, or refused with
the reason: see `odd_clips` for how they are made."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from odd_clips import (
    EVENTS,
    MILLISECONDS,
    bursts,
    copied,
    film,
    instants,
    pass_on,
    remux,
    restamped,
    with_edits,
    write,
)

from syncdpo.data.clips import read_clip
from syncdpo.data.decoding import ClipError, decode
from syncdpo.data.sound import Sound

SYNC = 0.005
B_FRAMES = {"bf": "3", "x264-params": "b-adapt=0"}


def assert_in_step(path: Path, events, **options):
    seen, heard, streams = instants(path, **options)
    assert seen == pytest.approx(events, abs=SYNC)
    assert heard == pytest.approx(events, abs=SYNC)
    return streams


def refused(path: Path, **options) -> str:
    with pytest.raises(ClipError) as caught:
        read_clip(path, **options)
    assert "\n" not in caught.value.reason
    return caught.value.reason


# --- AVI: no presentation times -------------------------------------------------------------------


@pytest.mark.parametrize("audio", ["pcm_s16le", "libmp3lame", "aac"])
@pytest.mark.parametrize(("codec", "fps"), [("libx264", 24), ("mpeg4", 30), ("libx264", 60)])
def test_avi_is_in_step(tmp_path, codec, fps, audio):
    path = write(tmp_path / "a.avi", film(fps), codec=codec, audio=audio)
    streams = assert_in_step(path, np.round(np.array(EVENTS) * fps) / fps)
    assert streams.fps == fps


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_with_reordered_pictures_is_refused(tmp_path, codec):
    options = B_FRAMES if codec == "libx264" else {"bf": "2"}
    path = write(tmp_path / "a.avi", film(), codec=codec, audio="pcm_s16le", options=options)
    assert "out of order (B-frames), and AVI does not say" in refused(path)


# --- edit lists -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("edits") / "a.mp4", film(), options=B_FRAMES)


@pytest.mark.parametrize("begin", [0.0, 0.01, 0.29, 1.1, 1.24, 1.25])
def test_an_edit_begins_between_two_pictures(whole, tmp_path, begin):
    path = with_edits(whole, tmp_path / "b.mp4", [(begin, 2.2)])
    # A flash that is on already when the clip begins cannot be seen to begin.
    events = [event - begin for event in EVENTS if begin + 0.005 < event < begin + 2.2]
    seen, heard, streams = instants(path)
    assert seen == pytest.approx(events, abs=SYNC)
    assert heard[-len(events) :] == pytest.approx(events, abs=SYNC)
    assert streams.seconds == pytest.approx(2.2, abs=0.5 / 24)
    assert streams.fps == 24


@pytest.mark.parametrize("begin", [0.0, 0.105, 0.14, 1.1])
@pytest.mark.parametrize("fps", [None, 24.0, 48.0])
def test_an_edit_that_begins_within_a_picture_moves_no_other(whole, tmp_path, begin, fps):
    """On a constant grid, too: it begins with the first picture that is whole."""
    path = with_edits(whole, tmp_path / "b.mp4", [(begin, 2.2)])
    for seconds in (None, 2.0):
        clip = read_clip(path, fps=fps, seconds=seconds)
        light = clip.video.float().mean((1, 2, 3))
        seen = (np.nonzero(np.diff(light) > 60)[0] + 1) / clip.fps
        heard = bursts(clip.audio.numpy(), clip.sample_rate)
        assert len(seen) >= 2
        assert heard[-len(seen) :] == pytest.approx(seen, abs=SYNC)


@pytest.mark.parametrize("nothing", [0.0, 0.3], ids=["at once", "after nothing"])
def test_several_edits(whole, tmp_path, nothing):
    empty = [(None, nothing)] if nothing else []
    path = with_edits(whole, tmp_path / "b.mp4", [*empty, (0.11, 0.6), (1.12, 1.1), (2.6, 0.7)])
    events = [0.5 - 0.11, 0.6 + 1.25 - 1.12, 0.6 + 2.0 - 1.12, 1.7 + 2.75 - 2.6]
    assert_in_step(path, events)
    assert_in_step(path, events[:3], seconds=1.6)


@pytest.mark.parametrize(
    ("edits", "speed", "reason"),
    [
        ([(1.1, 0.6), (0.1, 2.0)], 1, "again or out of order"),
        ([(0.1, 2.0)], 0.5, "plays at another speed"),
    ],
)
def test_edits_that_cannot_be_honoured_are_refused(whole, tmp_path, edits, speed, reason):
    assert reason in refused(with_edits(whole, tmp_path / "b.mp4", edits, speed))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data.replace(b"edts", b"edtx", 1), "its edit list is damaged"),
        (lambda data: data.replace(b"elst", b"elsx", 1), "its edit list is damaged"),
        (lambda data: after(data, b"stsz", 15, 1), "some lie within others"),
        (lambda data: after(data, b"stsz", 8, 1), "tables of times are damaged"),
        (lambda data: after(data, b"stsz", 11, -1), "disagree about their number"),
        (lambda data: after(data, b"stsc", 11, 1), "disagree about their number"),
        (lambda data: after(data, b"ctts", 12, 0x70), "far from all others"),
        (lambda data: after(data, b"mdhd", 13, 1), "shows more of its pictures than there is"),
        (lambda data: after(data, b"mdhd", 12, -1, zero=4), "a clock of 0 Hz"),
    ],
)
def test_damaged_tables_are_refused(whole, tmp_path, spoil, reason):
    """FFmpeg does without what it cannot read of them, and moves what comes after."""
    path = tmp_path / "b.mp4"
    path.write_bytes(spoil(whole.read_bytes()))
    assert reason in refused(path)


def after(data: bytes, name: bytes, place: int, change: int, zero=0) -> bytes:
    """A byte so far behind a box's name changed by so much, or some set to 0."""
    spoilt, at = bytearray(data), data.index(name) + 4 + place
    spoilt[at] = (spoilt[at] + change) % 256
    spoilt[at : at + zero] = bytes(zero)
    return bytes(spoilt)


# --- rates and stills -----------------------------------------------------------------------------


def browser(path: Path, given, jitter=0.006) -> Path:
    """Stamps in milliseconds with some jitter, a header that says 1000 pictures a second."""
    given.times = given.times + np.random.default_rng(5).uniform(-jitter, jitter, len(given.times))
    given.times[0] = 0.0
    return write(path, given, codec="libvpx", audio="libopus", rate=1000, clock=MILLISECONDS,
                 options={"deadline": "realtime", "cpu-used": "8", "b": "1M"},
                 container={"live": "1"})  # fmt: skip


def test_a_browser_recording_has_the_rate_of_its_timestamps(tmp_path):
    given = film(30)
    path = browser(tmp_path / "a.webm", given)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 1000
    seen, heard, streams = instants(path)
    assert streams.fps == 30
    events = [given.times[round(event * 30)] for event in EVENTS]
    assert seen == pytest.approx(events, abs=0.001)
    assert heard == pytest.approx(np.round(np.array(EVENTS) * 30) / 30, abs=SYNC)
    assert len(read_clip(path).video) == 105


def with_still(given, at: float, seconds: float):
    """The film's picture of that moment stays on while the sound goes on."""
    kept = (given.times <= at) | (given.times >= at + seconds)
    given.pictures, given.times = given.pictures[kept], given.times[kept]
    return given


def test_a_long_still_is_a_still(tmp_path):
    given = film(30, seconds=15.5, events=(0.5, 1.25, 14.0))
    path = browser(tmp_path / "a.webm", with_still(given, 2.0, 11.5), jitter=0.003)
    streams = assert_in_step(path, [0.5, 38 / 30, 14.0])
    assert streams.fps == 30
    assert len(read_clip(path).video) == 465


def test_a_jump_of_the_pictures_alone_is_none(tmp_path):
    given = with_still(film(30, seconds=15.5, events=(0.5, 14.0)), 2.0, 11.5)
    given.sound = given.sound[:, :96_000]
    assert "timestamps of its pictures jump" in refused(browser(tmp_path / "a.webm", given))


def test_variable_rate_takes_the_faster(tmp_path):
    given = film(30)
    kept = (given.times < 1) | (np.arange(105) % 2 == 0)
    given.pictures, given.times = given.pictures[kept], given.times[kept]
    streams = assert_in_step(write(tmp_path / "a.mp4", given), np.array([15, 38, 60, 82]) / 30)
    assert streams.fps == 30


# --- the clock of the sound -----------------------------------------------------------------------


def played(jitter=0.0, *, lost=(), drift=0.0, seconds=10.0, rounded=None, packet=960, rate=48_000):
    """(milliseconds by which each 50 ms of a tone of 440 Hz come late, seconds of silence)."""
    dice = np.random.default_rng(0)
    count = int(seconds * rate)
    tone = np.sin(2 * np.pi * 440 * np.arange(count) / rate).astype(np.float32)
    sound = Sound(rate)
    for k in set(range(count // packet)) - set(lost):
        stamp = 0.3 + k * packet / rate * (1 + drift) + dice.uniform(-jitter, jitter)
        stamp = round(stamp / rounded) * rounded if rounded else stamp
        sound.append(stamp, torch.from_numpy(tone[None, k * packet : (k + 1) * packet]))
    out = sound.joined(0.3, seconds)[0].numpy()[: count // 2400 * 2400].reshape(-1, 2400)
    at = np.arange(out.size).reshape(out.shape) / rate / (1 + drift)
    phase = np.angle((out * np.exp(-2j * np.pi * 440 * at)).mean(1)) + np.pi / 2
    quiet = np.convolve(np.abs(out.ravel()) < 1e-6, np.ones(48), "valid") == 48
    return -1000 * phase / (2 * np.pi * 440), quiet.sum() / rate


@pytest.mark.parametrize("jitter", [0.0, 0.001, 0.003, 0.006, 0.010, 0.021])
@pytest.mark.parametrize("case", ["whole", "lost", "drift"])
def test_jittered_stamps_of_continuous_sound(jitter, case):
    lost = {100, 101, 300} if case == "lost" else ()
    late, silent = played(jitter, lost=lost, drift=3e-4 if case == "drift" else 0.0)
    # 440 Hz tells lateness up to 1.1 ms either way; what is further out shows as such.
    assert np.abs(late).max() < (0.5 if jitter < 0.01 else 2.2)
    assert silent == pytest.approx(0.02 * len(lost), abs=0.004)


def test_a_slow_drift_is_followed_for_long():
    late, silent = played(0.006, drift=5e-4, seconds=60.0, rounded=0.001)
    assert np.abs(late).max() < 1
    assert silent < 0.001


def test_rounding_and_single_slips_leave_no_seam():
    late, silent = played(rounded=0.001)
    assert np.abs(late).max() < 0.6
    assert silent == 0
    sound = Sound(48_000)
    for k in range(100):
        sound.append(k * 0.02 + (0.5 if k == 40 else 0.0), torch.ones(1, 960))
    assert torch.equal(sound.joined(0.0, 2.0), torch.ones(1, 96_000))


@pytest.mark.parametrize(
    ("stamps", "reason"),
    [
        (lambda k: 0.02 * k * 1.1, "its sound is .* slower or faster"),
        (lambda k: 0.02 * k * 1.6, "disagree with its length"),
        (lambda k: 0.02 * k - (1.0 if k >= 50 else 0.0), "jump back"),
        (lambda k: float("nan"), "no timestamps"),
    ],
)
def test_stamps_that_contradict_the_samples_are_refused(stamps, reason):
    sound = Sound(48_000)
    for k in range(100):
        sound.append(stamps(k), torch.ones(1, 960))
    with pytest.raises(ValueError, match=reason):
        sound.joined(0.0, 2.0)


@pytest.mark.parametrize("jitter", [0.003, 0.006, 0.009])
def test_jittered_packets_in_a_file(tmp_path, jitter):
    """A burst at the instant of its flash, and no onset or hole besides."""
    given = film(30, seconds=6.0, events=(0.5, 1.25, 2.0, 2.75, 4.0, 5.0))
    whole = write(tmp_path / "a.webm", given, codec="libvpx", audio="libopus")
    dice = np.random.default_rng(1)

    def shaken(packet):
        if packet.stream.type == "video" or packet.pts <= 0:
            return packet
        return restamped(packet, dice.uniform(-jitter, jitter))

    path = remux(whole, tmp_path / "b.webm", shaken)
    assert_in_step(path, np.array([15, 38, 60, 82, 120, 150]) / 30)


# --- what is not whole ----------------------------------------------------------------------------


def noisy_film(**options):
    given = film(**options)
    given.pictures = np.random.default_rng(2).integers(0, 256, given.pictures.shape, np.uint8)
    return given


@pytest.mark.parametrize(
    ("name", "codec", "audio", "container"),
    [("a.mkv", "libx264", "aac", {}), ("a.webm", "libvpx", "libopus", {"live": "1"}),
     ("a.ts", "libx264", "aac", {}), ("a.flv", "libx264", "aac", {}),
     ("a.avi", "mpeg4", "libmp3lame", {}), ("a.mp4", "libx264", "aac", {"movflags": "faststart"}),
     ("a.mp4", "libx264", "aac", {"movflags": "frag_keyframe+empty_moov"})],
)  # fmt: skip
def test_a_file_that_was_cut_off_is_named(tmp_path, name, codec, audio, container):
    path = write(tmp_path / name, noisy_film(), codec=codec, audio=audio, container=container)
    data = path.read_bytes()
    assert len(decode(path, None, None).pictures) == 84
    for share in (0.3, 0.6, 0.9):
        length = int(share * len(data)) // 188 * 188 + 7  # in the middle of a packet of TS, too
        path.write_bytes(data[:length])
        assert "truncated" in refused(path)


def test_a_live_recording_that_ends_well_is_one(tmp_path):
    path = write(tmp_path / "a.webm", film(seconds=7.0), codec="libvpx", audio="libopus",
                 container={"live": "1", "cluster_time_limit": "1000"})  # fmt: skip
    data = path.read_bytes()
    clusters = [at for at in range(len(data)) if data[at : at + 4] == b"\x1f\x43\xb6\x75"]
    path.write_bytes(data[: clusters[3]])
    assert 2.1 < assert_in_step(path, EVENTS[:3]).seconds < 2.7


def test_pictures_that_cannot_be_decoded_are_counted(tmp_path):
    whole = write(tmp_path / "a.mkv", film(), options={"bf": "0", "g": "12"})

    def emptied(packet):
        if packet.stream.type == "video" and packet.pts > 100 and not packet.is_keyframe:
            packet.update(bytes(packet)[:4] + b"\x00" * (packet.size - 4))
        return packet

    path = remux(whole, tmp_path / "b.mkv", emptied)
    assert "of 84 pictures could not be decoded" in refused(path)


# --- streams that change midway -------------------------------------------------------------------


def joined_ts(folder: Path, first: dict, second: dict) -> Path:
    """Two transport streams of two seconds, the second's stamps after the first's."""
    parts = []
    for number, options in enumerate((first, second)):
        given = film(seconds=2.0, events=(0.5, 1.25), **options)
        whole = write(folder / f"{number}.ts", given, audio="ac3")
        later = remux(whole, folder / f"{number}b.ts", lambda p, n=number: restamped(p, 2.0 * n),
                      container={"mpegts_copyts": "1"})  # fmt: skip
        parts.append(later.read_bytes())
    path = folder / "joined.ts"
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("channels", [(1, 2), (2, 1), (2, 6), (6, 2)])
def test_channels_that_change_are_mixed(tmp_path, channels):
    path = joined_ts(tmp_path, *({"channels": number} for number in channels))
    streams = assert_in_step(path, [0.5, 1.25, 2.5, 3.25])
    assert streams.sound.shape[0] == channels[0]


def test_a_size_that_changes_is_the_first(tmp_path):
    path = joined_ts(tmp_path, {"size": (48, 64)}, {"size": (96, 128)})
    assert_in_step(path, [0.5, 1.25, 2.5, 3.25])
    video = read_clip(path).video
    assert video.shape[1:3] == (48, 64)
    still = (video[40].float() - video[90].float()).abs().mean()
    assert still < 12  # the same scene at the same scale


def test_a_sample_rate_that_changes_is_refused(tmp_path):
    path = joined_ts(tmp_path, {"rate": 48_000}, {"rate": 32_000})
    assert "its sample rate changes from 48000 to 32000 Hz" in refused(path)


# --- sound that is none, tracks that are not meant ------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sound_that_is_no_number_is_refused_where_it_is_wanted(tmp_path, bad):
    given = film()
    given.sound[0, 96_000] = bad
    path = write(tmp_path / "a.mkv", given, audio="pcm_f32le")
    assert "its sound is NaN or infinite at" in refused(path)
    assert read_clip(path, seconds=1.0).audio.isfinite().all()


@pytest.mark.parametrize("default", [0, 1, None])
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_of_several_sounds_the_default_is_read(tmp_path, name, default):
    comment = film(events=(0.25, 1.6))
    given = film()
    both = write(tmp_path / f"both{Path(name).suffix}", given, sounds=[comment])
    with av.open(str(both)) as source, av.open(str(tmp_path / name), "w") as out:
        copies = copied(source, out)
        for number, stream in enumerate(s for s in copies.values() if s.type == "audio"):
            stream.disposition = 1 if number == default else 0
        pass_on(source, out, copies)
    seen, heard, streams = instants(tmp_path / name)
    assert seen == pytest.approx(EVENTS, abs=SYNC)
    assert heard == pytest.approx(EVENTS if default == 1 else (0.25, 1.6), abs=0.03)
    # Matroska and MP4 say of a track whether it is; the writer of MP4 marks the first if none is.
    unmarked = default is None and name == "a.mkv"
    why = "the first" if unmarked else "marked default"
    number = 2 if default == 1 else 1
    assert streams.notes == (f"sound track {number} of 2 is read, {why}",)
    assert read_clip(tmp_path / name).notes == streams.notes


def test_a_still_thumbnail_is_not_the_film(tmp_path):
    whole = write(tmp_path / "whole.mkv", film())
    with av.open(str(whole)) as source, av.open(str(tmp_path / "a.mkv"), "w") as out:
        still = out.add_stream("mjpeg", rate=24)
        still.width, still.height, still.pix_fmt = 64, 48, "yuvj420p"
        copies = copied(source, out)
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1, 24)
        for packet in [*still.encode(frame), *still.encode(None)]:
            out.mux(packet)
        pass_on(source, out, copies)
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == [
            "mjpeg",
            "h264",
        ]
    assert_in_step(tmp_path / "a.mkv", EVENTS)


# --- tags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [10, 12, 13])
def test_colours_of_matrices_that_swscale_lacks(tmp_path, matrix):
    """By the nearest it knows: from constant to non-constant luminance, or by the primaries."""
    read = {}
    for tag in (matrix, 9):
        tags = {"colorspace": tag, "color_primaries": 9}
        path = write(tmp_path / f"{tag}.mp4", film(), tags=tags)
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.colorspace == tag
        read[tag] = read_clip(path).video
    assert torch.equal(read[matrix], read[9])


@pytest.mark.parametrize(("matrix", "name"), [(8, "YCgCo"), (11, "SMPTE 2085"), (14, "ICtCp")])
def test_colours_that_cannot_be_read_are_refused(tmp_path, matrix, name):
    path = write(tmp_path / "a.mp4", film(), tags={"colorspace": matrix})
    assert refused(path) == f"its colours are {name}, which cannot be read"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_metadata_that_is_not_utf8_is_ignored(tmp_path, name):
    path = tmp_path / name
    whole = write(tmp_path / f"whole{path.suffix}", film())
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        out.metadata["title"] = "a title of these bytes"
        pass_on(source, out, copied(source, out))
    data = path.read_bytes()
    assert b"title of" in data
    path.write_bytes(data.replace(b"title of", b"\x83\x65\xff\xfe\x83\x58of"))
    assert_in_step(path, EVENTS)


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", film()).rename(tmp_path / "take: 2.mp4")
    monkeypatch.chdir(tmp_path)
    assert_in_step(Path("take: 2.mp4"), EVENTS)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("sound", [1.0, 6.0])
def test_nothing_past_the_seconds_asked_for_is_held(tmp_path, name, sound):
    """Even where the sound ends before, and the file would have to be read to the end for it."""
    given = film(seconds=6.0)
    given.sound = given.sound[:, : round(sound * 48_000)]
    path = write(tmp_path / name, given)
    made = []
    decode(path, 2.0, None, keep=made.append)
    assert len(made) == 48
    assert len(read_clip(path, seconds=2.0).video) == 48
    streams = decode(path, 2.0, None)
    assert len(streams.pictures) == 48
    assert streams.sound.shape == (2, 96_000)
    assert bursts(streams.sound.numpy(), 48_000) == pytest.approx(
        [event for event in EVENTS[:2] if event < sound], abs=SYNC
    )


def test_a_film_is_not_held_twice(tmp_path):
    """Pictures are let go as the clip is made of them, each after its last use."""
    streams = decode(write(tmp_path / "a.mp4", film()), None, None)
    video = read_clip(tmp_path / "a.mp4", fps=60).video
    shown = np.floor((np.arange(210) + 0.5) / 60 * 24 + 0.02).astype(int)
    assert torch.equal(video, torch.stack([streams.pictures[k] for k in shown]))
