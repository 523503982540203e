"""Media files decoded onto one time axis.

A file's timestamps are the only truth about what belongs together: time begins with the first
picture, and every sample of sound is placed by timestamps against that one origin. Encoder priming,
edit lists, reordered pictures, streams that start apart and variable frame rates are thereby all
the same case. Sound from before the first picture is cut, and what the sound does not cover is
silence, as in a player.

Where a container holds less than that, its own facts count instead: edit lists that FFmpeg would
round to a picture are read from the file (`syncdpo.data.edits`), AVI has the place of each picture
and no timestamp (`syncdpo.data.stamps`), and the stamps of sound are only measurements of its clock
(`syncdpo.data.sound`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor

from syncdpo.data.colours import ToRGB, turns_of
from syncdpo.data.container import WORDS, Refused, open_file, packets_of, promised_end
from syncdpo.data.edits import Track
from syncdpo.data.sound import Sound, samples_of
from syncdpo.data.stamps import Counted, Edited, Stamps, frame_rate
from syncdpo.data.tally import Tally
from syncdpo.data.tracks import Chosen, choose
from syncdpo.data.wholeness import fault, pictures_begun

TRUNCATED = 0.25  # s missing against what the header says; priming and padding are below 0.1 s
AHEAD = 0.5  # s of sound read beyond what is asked for, more than any jitter of its stamps

_HOLE = 10.0  # s without a new picture; only a still if the sound goes on meanwhile
_COVERED = 0.9  # share of a still that has sound
_INTERLEAVED = 30.0  # s by which sound may lag behind the pictures in a file


class ClipError(ValueError):
    """A file that cannot be used as a clip: `path`, and `reason` in one line."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass
class Streams:
    """Both streams on one time axis, in seconds from the first picture.

    fps: pictures per second; where the header's rate is not that of the timestamps, theirs, stills
    and dropped pictures apart. pictures: uint8 [H,W,3] each, or what was kept of it, on from
    picture_times[k] to the next one's. sound: float32 [C,N]. seconds: when the last picture ends.
    notes: which of several tracks were read, a sentence each.
    """

    fps: float
    sample_rate: int
    picture_times: list[float] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    sound: Tensor | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def decode(
    path: Path,
    seconds: float | None,
    size: tuple[int, int] | None,
    *,
    keep: Callable[[Tensor], Any] | None = None,
    needs_sound: bool = True,
) -> Streams:
    """All pictures and sound of a file, or enough of them for its first `seconds`.

    size: (height, width) of the pictures, as in `read_clip`. keep: what is held of each picture,
    made as it is decoded, one after the other as shown; the picture itself by default. A film at
    full size takes 6 MB a picture. needs_sound: False takes a file without sound, too; `sound` and
    `sample_rate` are then None and 0. Raises ClipError.
    """
    return from_file(path, lambda path: _decode(path, seconds, size, keep, needs_sound))


def shown_size(path: Path) -> tuple[int, int]:
    """(height, width) of a file's first picture upright, in square pixels. Raises ClipError."""
    return from_file(path, _shown_size)


def from_file(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file; what keeps it from that is a ClipError with the reason."""
    path = Path(path)
    if not path.is_file():
        raise ClipError(path, "no such file")
    if path.stat().st_size == 0:
        raise ClipError(path, "empty file")
    try:
        return read(path)
    except av.FFmpegError as error:
        reason = f"damaged, truncated or not a media file ({error.strerror})"
        raise ClipError(path, reason) from error
    except Refused as refused:
        raise ClipError(path, str(refused)) from refused


def joined_sound(sounds: Sound, origin: float, seconds: float) -> Tensor:
    """`Sound.joined`; what contradicts itself there is a reason to refuse the file."""
    try:
        return sounds.joined(origin, seconds)
    except ValueError as error:
        raise Refused(str(error)) from error


def _shown_size(path: Path) -> tuple[int, int]:
    chosen = choose(path, needs_sound=False)
    with open_file(path, {}) as container:
        video = container.streams[chosen.video]
        pixel_width = float(video.sample_aspect_ratio or 1)
        for packet in packets_of(container, video):
            try:
                frame = next(iter(packet.decode()), None)
            except av.InvalidDataError:  # the first may refer to what was cut off
                continue
            if frame is not None:
                size = frame.height, round(frame.width * pixel_width)
                return size if turns_of(frame) % 2 == 0 else size[::-1]
    raise Refused(f"no {WORDS['video']} (the stream is empty)")


def _decode(path: Path, seconds: float | None, size, keep, needs_sound: bool) -> Streams:
    chosen = choose(path, needs_sound)
    options = {"ignore_editlist": "1"} if chosen.tracks else {}
    with open_file(path, options) as container:
        video = container.streams[chosen.video]
        audio = None if chosen.audio is None else container.streams[chosen.audio]
        reading = _Reading(container, video, audio, chosen, seconds, size, keep)
        reading.run()
        reading.check(path)
        return reading.streams()


class _Reading:
    """One pass over a file: what is shown within `seconds` of the first picture, and no more."""

    def __init__(self, container, video, audio, chosen: Chosen, seconds: float | None, size, keep):
        self.container, self.video, self.audio = container, video, audio
        self.chosen, self.seconds = chosen, math.inf if seconds is None else seconds
        self.keep = keep or (lambda picture: picture)
        self.to_rgb = ToRGB(size, video.sample_aspect_ratio)
        self.header_rate = float(video.average_rate or video.guessed_rate or 0)
        self.streams_read = [video] if audio is None else [video, audio]
        self.stamps = self._stamps()
        self.tally = Tally()
        self.times: list[float] = []
        self.pictures: list[Any] = []
        self.sounds: Sound | None = None
        self.limit = math.inf  # s on the file's axis; nothing from then on is wanted
        self.ends = {"video": -math.inf, "audio": -math.inf}
        self.partial = {"video": False, "audio": False}  # whether the last packet was
        self.suspect = False  # whether a transport stream has lost packets, or was joined
        self.done = {"video": False, "audio": audio is None}

    def _stamps(self) -> Stamps:
        if self.chosen.tracks:
            return Edited(self.chosen.tracks)
        if self.container.format.name == "avi":
            self.video.codec_context.copy_opaque = True
            late = self.chosen.late
            return Counted(float(self.video.time_base), *late, self.streams_read)
        return Stamps(1 / self.header_rate if self.header_rate else 0.04)

    def run(self) -> None:
        for packet in packets_of(self.container, *self.streams_read):
            kind = packet.stream.type
            if not packet.size and packet.dts is not None:
                continue  # "the same as before", in Theora and in AVI; decoders take it for the end
            if packet.size:
                self.partial[kind] = packet.is_corrupt
                self.suspect |= packet.is_corrupt
            self.stamps.packet(packet)
            if kind == "video" and packet.size:
                self.tally.packet(packet, wanted=not self.done["video"])
            if not self.done[kind]:
                for frame in self._frames(packet):
                    (self._picture if kind == "video" else self._sound)(frame)
            if all(self.done.values()) or self._sound_is_over(packet):
                break

    def _frames(self, packet) -> list:
        try:
            return packet.decode()
        except av.InvalidDataError:
            if packet.stream is self.audio:
                raise
            self.tally.failed += 1  # how many of how many is worth more than the first of them
            return []

    def _sound_is_over(self, packet) -> bool:
        """Pictures go on and on after all that is wanted of them, and no sound comes any more."""
        if not self.done["video"] or packet.dts is None:
            return False
        return float(packet.dts * packet.time_base) > self.limit + _INTERLEAVED

    def _picture(self, frame) -> None:
        self.tally.picture(frame)
        picture = None
        for start, end in self.stamps.picture(frame):
            if frame.is_corrupt:
                raise Refused(f"damaged or truncated picture at {start:.2f} s")
            if not self.times:
                self._begin(start)
            self.ends["video"] = max(self.ends["video"], end)
            if start >= self.limit:
                self.done["video"] = True
                continue
            picture = self.to_rgb(frame) if picture is None else picture
            self.times.append(start)
            self.pictures.append(self.keep(picture))

    def _begin(self, start: float) -> None:
        """The first picture settles where time begins."""
        if self.chosen.tracks:
            start = self.chosen.tracks[0].first_picture()
        self.limit = start + self.seconds

    def _sound(self, frame) -> None:
        if self.sounds is None:
            self.sounds = Sound(frame.sample_rate)
        rate = self.sounds.sample_rate
        samples = samples_of(frame, rate)
        for start, end, skipped in self.stamps.sound(frame):
            self.ends["audio"] = float(np.fmax(self.ends["audio"], end))
            if start > self.limit + AHEAD:
                self.done["audio"] = True
                continue
            part = samples
            if self.chosen.tracks:
                first = round(skipped * rate)
                part = samples[:, first : first + round((end - start) * rate)]
            wanted = not start >= self.limit  # also where it has no timestamp, NaN
            if wanted and not part.isfinite().all():
                raise Refused(f"its sound is NaN or infinite at {start:.2f} s of the file")
            self.sounds.append(start, part)

    # --- afterwards

    def check(self, path: Path) -> None:
        """Refuses what is not whole, or hardly anything of which could be decoded."""
        self.tally.check(stopped=self.done["video"])
        found = {"video": self.times, "audio": self.sounds and self.sounds.chunks}
        for kind in (stream.type for stream in self.streams_read):
            if not found[kind]:
                raise Refused(f"no {WORDS[kind]} (the stream is empty)")
        if all(self.done.values()):
            return
        for kind in (kind for kind, partial in self.partial.items() if partial):
            raise Refused(f"truncated: it ends in the middle of its {WORDS[kind]}")
        reason = fault(path, self.container.format.name)
        if reason is not None:
            raise Refused(reason)
        if self.container.format.name == "mpegts" and not self.tally.interlaced:
            # A picture without a beginning runs into the next, which then is shown in its place.
            lost = pictures_begun(path, self.video.id) - self.tally.packets
            if lost > 0:
                raise Refused(f"damaged: {lost} of its pictures have no beginning")
        tracks = self.chosen.tracks or [None] * len(self.streams_read)
        for stream, track in zip(self.streams_read, tracks, strict=True):
            if not self.done[stream.type]:
                self._check_whole(stream, track)
        self._check_container()

    def _check_whole(self, stream, track: Track | None) -> None:
        """A truncated file decodes without complaint; only its header knows what is missing."""
        promised = promised_end(stream) if track is None else track.end
        if promised is not None:
            self._check_end(self.ends[stream.type], promised, WORDS[stream.type])

    def _check_container(self) -> None:
        """Matroska has one length for all; what other streams there are may be the longest."""
        container = self.container
        streams = self.streams_read
        alone = len(container.streams) == len(streams)
        if container.duration is None or not alone or any(self.done[s.type] for s in streams):
            return
        promised = container.duration / av.time_base  # from 0 on, not from the first picture
        if all(stream.duration is None for stream in streams):
            what = " and ".join(WORDS[stream.type] for stream in streams)
            self._check_end(max(self.ends.values()), promised, what)

    def _check_end(self, end: float, promised: float, what: str) -> None:
        if end < promised - TRUNCATED - self.stamps.frame_length:
            raise Refused(f"truncated: {what} end at {end:.2f} s of {promised:.2f} s")

    def streams(self) -> Streams:
        """Both streams, counted from the first picture."""
        origin, end = self.times[0], self.ends["video"]
        self._check_steps(np.array([*self.times, min(end, max(self.limit, self.times[-1]))]))
        fps = frame_rate(np.array(self.times), self.header_rate)
        if fps != self.header_rate:  # then the last picture's length is not known, either
            end = max(end, self.times[-1] + 1 / fps)
        seconds = end - origin
        sound, gaps = None, 0
        if self.sounds is not None:
            sound = joined_sound(self.sounds, origin, min(seconds, self.seconds))
            gaps = self.sounds.gaps
        if self.suspect and (gaps or np.diff(self.times).max() > 1.5 / fps):
            raise Refused("damaged: some of its packets are missing")
        return Streams(
            fps=fps,
            sample_rate=0 if self.sounds is None else self.sounds.sample_rate,
            picture_times=[start - origin for start in self.times],
            pictures=self.pictures,
            sound=sound,
            seconds=seconds,
            notes=self.chosen.notes,
        )

    def _check_steps(self, times: np.ndarray) -> None:
        """Pictures follow each other; a still of any length is one while there is sound to it."""
        steps = np.diff(times)
        if steps.min() < 0:
            raise Refused("the timestamps of its pictures jump")
        for index in np.nonzero(steps > _HOLE)[0]:
            heard = self.sounds
            covered = heard.covered(times[index], times[index + 1]) if heard else 0.0
            if covered < _COVERED * steps[index]:
                raise Refused("the timestamps of its pictures jump")
