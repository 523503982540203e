"""Clips of the odd kinds that people have, made here so that their true instants are known.

In every film the picture jumps to white, and fades, at `EVENTS`; a burst of 1 kHz with an attack of
a millisecond begins at the same instants. `instants` reads both back.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from syncdpo.data.decoding import Streams, decode

EVENTS = (0.5, 1.25, 2.0, 2.75)
MILLISECONDS = Fraction(1, 1000)
Change = Callable[[av.Packet], av.Packet | None]


@dataclass
class Film:
    """pictures [T,H,W,3] uint8 with the time of each; sound [C,N] float32."""

    pictures: np.ndarray
    times: np.ndarray
    sound: np.ndarray
    rate: int
    fps: float


def film(fps=24, seconds=3.5, rate=48_000, channels=2, size=(48, 64), events=EVENTS) -> Film:
    """Events stand on a picture's beginning, the nearest."""
    times = np.arange(round(seconds * fps)) / fps
    events = [round(event * fps) / fps for event in events if event < seconds - 0.2]
    since = np.stack([times - event + 1e-9 for event in events])
    glow = np.where(since >= 0, 1 - since * fps / 8, 0).clip(0, 1).max(0)
    still = np.random.default_rng(0).integers(20, 60, (*size, 3))
    pictures = still + (235 - still) * glow[:, None, None, None]
    sound = np.zeros(round(seconds * rate))
    for event in events:
        start = round(event * rate)
        time = np.arange(min(round(0.2 * rate), len(sound) - start)) / rate
        burst = 0.8 * np.sin(2 * np.pi * 1000 * time + 1.2) * np.exp(-time / 0.04)
        sound[start : start + len(time)] += burst
    sound = np.repeat(sound[None], channels, 0).astype(np.float32)
    return Film(pictures.round().astype(np.uint8), times, sound, rate, fps)


def write(path: Path, film: Film, *, codec="libx264", audio="aac", options=None, container=None,
          clock=None, rate=None, sounds: Iterable[Film] = (), tags=None) -> Path:  # fmt: skip
    """codec, audio: encoders. container: options of the format. clock: of the pictures' stamps.
    rate: what the header says. sounds: films whose sound is a track of its own before the film's.
    tags: attributes of the video encoder."""
    layouts = {1: "mono", 2: "stereo", 6: "5.1"}
    clock = clock or (1 / Fraction(film.fps) if path.suffix == ".avi" else Fraction(1, 90_000))
    with av.open(str(path), "w", options=container or {}) as out:
        video = out.add_stream(codec, rate=rate or Fraction(film.fps).limit_denominator(1001))
        video.height, video.width = film.pictures.shape[1:3]
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        video.options = options or ({"bf": "0", "g": "24"} if codec == "libx264" else {})
        if path.suffix != ".avi":
            video.codec_context.time_base = clock
        for name, value in (tags or {}).items():
            setattr(video.codec_context, name, value)
        tracks = []
        for source in (*sounds, film):
            layout = layouts[len(source.sound)]
            tracks.append((out.add_stream(audio, rate=source.rate, layout=layout), source))
        packets = []
        for picture, time in zip(film.pictures, film.times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = (
                clock if path.suffix != ".avi" else Fraction(1, 1) / Fraction(film.fps)
            )
            frame.pts = round(float(time) / frame.time_base)
            packets += video.encode(frame)
        packets += video.encode(None)
        for stream, source in tracks:
            packets += encoded(stream, source)
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            out.mux(packet)
    return path


def encoded(stream, film: Film) -> list[av.Packet]:
    layout = stream.codec_context.layout.name
    size = stream.codec_context.frame_size or 1024
    packets = []
    for start in range(0, film.sound.shape[1], size):
        chunk = np.ascontiguousarray(film.sound[:, start : start + size])
        frame = av.AudioFrame.from_ndarray(chunk, "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = film.rate, start, Fraction(1, film.rate)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def remux(source: Path, target: Path, change: Change, container=None) -> Path:
    """The same packets, each as `change` gives it back; None leaves one out."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=container or {}) as out:
        pass_on(given, out, copied(given, out), change)
    return target


def copied(source, out) -> dict:
    return {stream.index: out.add_stream_from_template(stream) for stream in source.streams}


def pass_on(source, out, copies: dict, change: Change = lambda packet: packet) -> None:
    for packet in source.demux():
        if packet.dts is not None:
            index = packet.stream.index
            packet = change(packet)
            if packet is not None:
                packet.stream = copies[index]
                out.mux(packet)


def restamped(packet: av.Packet, seconds: float) -> av.Packet:
    """The packet, later by so much."""
    later = round(seconds / packet.time_base)
    packet.pts, packet.dts = packet.pts + later, packet.dts + later
    return packet


# --- edit lists -----------------------------------------------------------------------------------


def with_edits(
    source: Path, target: Path, edits: list[tuple[float | None, float]], speed=1
) -> Path:
    """An mp4 whose tracks show these stretches of themselves, (begin, length) in seconds of the
    film, one after the other; a begin of None is nothing at all."""
    data = source.read_bytes()
    at = data.index(b"moov") - 4
    assert at + struct.unpack_from(">I", data, at)[0] == len(data), "moov is not the last box"
    scale = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    target.write_bytes(data[:at] + _edited(data[at:], scale, edits, speed))
    return target


def _edited(data: bytes, scale: int, edits, speed) -> bytes:
    """The boxes in `data` with every edit list replaced; the first sample shown is at 0 s."""
    out, at = b"", 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + length]
        if kind == b"trak":
            media_scale = struct.unpack_from(">I", body, body.index(b"mdhd") + 16)[0]
            begins = struct.unpack_from(">i", body, body.index(b"elst") + 16)[0]
            body = _edited(body, scale, [(begins, media_scale), *edits], speed)
        elif kind in (b"moov", b"edts"):
            body = _edited(body, scale, edits, speed)
        elif kind == b"elst":
            (begins, media_scale), *edits = edits
            rows = b"".join(
                struct.pack(">IiI", round(long * scale), -1 if begin is None
                            else begins + round(begin * media_scale), round(speed * 0x10000))
                for begin, long in edits
            )  # fmt: skip
            body = struct.pack(">II", 0, len(edits)) + rows
        out += struct.pack(">I4s", 8 + len(body), kind) + body
        at += length
    return out


# --- reading back ---------------------------------------------------------------------------------


def instants(path: Path, seconds: float | None = None) -> tuple[np.ndarray, np.ndarray, Streams]:
    """(when the picture jumps, when a burst begins), by the reader."""
    streams = decode(path, seconds, None)
    light = np.array([picture.float().mean().item() for picture in streams.pictures])
    seen = np.array(streams.picture_times)[1:][np.diff(light) > 60]
    return seen, bursts(streams.sound.numpy(), streams.sample_rate), streams


def bursts(sound: np.ndarray, rate: int) -> np.ndarray:
    loud = np.nonzero(np.abs(sound).max(0) > 0.1)[0] / rate
    return loud[np.diff(loud, prepend=-1.0) > 0.15]
