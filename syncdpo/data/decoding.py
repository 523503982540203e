"""Media files decoded onto one time axis.

A file's timestamps are the only truth about what belongs together: time begins with the first
picture, and every sample of sound is placed by timestamps against that one origin. Encoder priming,
edit lists, reordered pictures, streams that start apart and variable frame rates are thereby all
the same case. Sound from before the first picture is cut, and what the sound does not cover is
silence, as in a player.

Where a container holds less than that, its own facts count instead: edit lists that FFmpeg would
round to a picture are read from the file (`syncdpo.data.edits`), AVI has the place of each picture
and no timestamp, and the stamps of sound are only measurements of its clock (`syncdpo.data.sound`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from syncdpo.data.edits import DamagedTables, Track, read_tracks
from syncdpo.data.sound import Sound
from syncdpo.data.wholeness import fault, pictures_begun

# swscale's exact paths: without them the mean colour drifts by 1 to 2 of 255.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP

_TRUNCATED = 0.25  # s missing against what the header says; priming and padding are below 0.1 s
_HOLE = 10.0  # s without a new picture; only a still if the sound goes on meanwhile
_COVERED = 0.9  # share of a still that has sound
_INTERLEAVED = 30.0  # s by which sound may lag behind the pictures in a file
_WORDS = {"video": "pictures", "audio": "sound"}
_AHEAD = 0.5  # s of sound read beyond what is asked for, more than any jitter of its stamps
_LOST = 0.01  # share of pictures that may fail to decode
_REGULAR = 0.005  # by which a header's or a usual frame rate may differ from the timestamps'
_CLOCK = 0.0011  # s by which steps may differ where a container rounds to a millisecond
_CHUNK_HEADER = 8  # bytes of an AVI's chunk before its data
_PLANES = 8  # of sound; PyAV reads beyond the frame for more
_LENGTHS = 0.25  # s by which an MP4's tables of samples may differ from the length its header gives
_NOT_FILM = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_BT2020 = 9  # AVCOL_SPC_BT2020_NCL
# Matrices that swscale knows, and the nearest of those that it does not; by AVCOL_SPC's numbers.
_KNOWN_MATRICES = {0, 1, 4, 5, 6, 7, 9}
_UNREADABLE_MATRICES = {8: "YCgCo", 11: "SMPTE 2085", 14: "ICtCp", 16: "YCgCo-R", 17: "YCgCo-R"}
_CONSTANT_LUMINANCE = 10
_BY_PRIMARIES = {12, 13}
# Samples of silence that FFmpeg's encoders begin with, which AVI has no place to note.
_PRIMING = {"mp3": 1105, "mp3float": 1105, "aac": 1024, "mp2": 481, "mp2float": 481}


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
) -> Streams:
    """All pictures and sound of a file, or enough of them for its first `seconds`.

    size: (height, width) of the pictures, as in `read_clip`. keep: what is held of each picture,
    made as it is decoded, one after the other as shown; the picture itself by default. A film at
    full size takes 6 MB a picture. Raises ClipError.
    """
    path = Path(path)
    if not path.is_file():
        raise ClipError(path, "no such file")
    if path.stat().st_size == 0:
        raise ClipError(path, "empty file")
    try:
        return _decode(path, seconds, size, keep)
    except av.FFmpegError as error:
        reason = f"damaged, truncated or not a media file ({error.strerror})"
        raise ClipError(path, reason) from error
    except _Refused as refused:
        raise ClipError(path, str(refused)) from refused


class _Refused(Exception):
    """A reason to refuse the file at hand."""


def _decode(path: Path, seconds: float | None, size, keep) -> Streams:
    chosen = _choose(path)
    options = {"ignore_editlist": "1"} if chosen.tracks else {}
    with _open(path, options) as container:
        video, audio = container.streams[chosen.video], container.streams[chosen.audio]
        reading = _Reading(container, video, audio, chosen, seconds, size, keep)
        reading.run()
        reading.check(path)
        return reading.streams()


def _open(path: Path, options: dict[str, str]):
    # The protocol is named, or a colon in the file's name would seem to end one.
    return av.open(f"file:{path}", options=options, metadata_errors="ignore")


def _packets(container, *streams) -> Iterator:
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except IndexError as error:  # PyAV looks for it among those known at the beginning
            raise _Refused("damaged: a stream of it begins in the middle") from error
        if packet is None:
            return
        yield packet


# --- which streams --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """Indices of both streams; tracks: their edit lists, where FFmpeg would not be exact;
    late: see `_late_pictures`."""

    video: int
    audio: int
    tracks: tuple[Track, Track] | None
    late: tuple[float, float]
    notes: tuple[str, ...]


def _choose(path: Path) -> _Chosen:
    with _open(path, {}) as container:
        has = container.streams
        films = _usable(has.video, "pictures")
        if len(films) > 1:
            films = _moving(container, films) or films
        sounds = _usable(has.audio, "sound")
        video, audio = min(films, key=_preference), min(sounds, key=_preference)
        notes = [*_note(video, films, "video"), *_note(audio, sounds, "sound")]
        tracks = None
        if container.format.name.startswith("mov"):
            tracks = _odd_edits(path, video, audio)
        late = (0.0, 0.0)
        if container.format.name == "avi":
            late = _late_pictures(container, video, audio)
        return _Chosen(video.index, audio.index, tracks, late, tuple(notes))


def _usable(streams, kind: str) -> list:
    """Those with a decoder; a cover picture is no video."""
    usable = [s for s in streams if s.codec_context and not s.disposition & _NOT_FILM]
    if not usable:
        raise _Refused(f"no {kind} (no such stream that can be decoded)")
    return usable


def _preference(stream) -> tuple[bool, int]:
    return not stream.disposition & Disposition.default, stream.index


def _note(stream, others: list, kind: str) -> Iterator[str]:
    if len(others) > 1:
        why = "marked default" if stream.disposition & Disposition.default else "the first"
        yield f"{kind} track {others.index(stream) + 1} of {len(others)} is read, {why}"


def _moving(container, films: list) -> list:
    """Those with more than one picture; a thumbnail not marked as one has no second."""
    packets = dict.fromkeys((film.index for film in films), 0)
    for packet in _packets(container, *films):
        packets[packet.stream_index] += packet.size > 0
        if min(packets.values()) > 1:
            break
    return [film for film in films if packets[film.index] > 1]


def _odd_edits(path: Path, video, audio) -> tuple[Track, Track] | None:
    try:
        tracks = read_tracks(path)
    except DamagedTables as error:
        raise _Refused(str(error)) from error
    if video.id not in tracks or audio.id not in tracks:
        return None
    pair = tracks[video.id], tracks[audio.id]
    for track, kind in zip(pair, ("pictures", "sound"), strict=True):
        if track.speed:
            raise _Refused(f"an edit of its {kind} plays at another speed, which is not supported")
        if abs(track.promised - track.summed) > _LENGTHS:
            raise _Refused(f"damaged: its header promises {track.promised:.2f} s of {kind}, its "
                           f"table of samples {track.summed:.2f} s")  # fmt: skip
        if max(edit.media + edit.length for edit in track.edits) > track.last + _LENGTHS:
            raise _Refused(f"damaged: its edit list shows more of its {kind} than there is")
    if not all(track.in_order() for track in pair):
        raise _Refused("its edit list shows parts again or out of order, which is not supported")
    plain = pair[0].is_plain(pictures=True) and pair[1].is_plain(pictures=False)
    return None if plain else pair


# --- when each picture and each sample is on ------------------------------------------------------


class _Stamps:
    """Frames → where they stand on the file's axis, (start, end) of each showing in seconds."""

    def __init__(self, frame_length: float):
        self.frame_length = frame_length

    def packet(self, packet) -> None:
        """Called for each packet before its frames."""

    def picture(self, frame) -> Iterator[tuple[float, float]]:
        if frame.pts is None:
            raise _Refused("its pictures carry no timestamps")
        start = float(frame.pts * frame.time_base)
        yield start, start + (float((frame.duration or 0) * frame.time_base) or self.frame_length)

    def sound(self, frame) -> Iterator[tuple[float, float, float]]:
        """(start, end, seconds skipped of the frame); NaN where it has no timestamp: it follows the
        one before it."""
        start = math.nan if frame.pts is None else float(frame.pts * frame.time_base)
        yield start, start + frame.samples / frame.sample_rate, 0.0


class _Edited(_Stamps):
    """By the edit lists of an MP4; the demuxer gives media time, shifted where it goes below 0."""

    def __init__(self, tracks: tuple[Track, Track]):
        super().__init__(0.0)
        self.video, self.audio = tracks
        self.shift: dict[int, float] = {}

    def packet(self, packet) -> None:
        if packet.stream_index not in self.shift and packet.pts is not None:
            track = self.video if packet.stream.type == "video" else self.audio
            first = float(track.cts[0]) if len(track.cts) else 0.0
            shift = float(packet.pts * packet.time_base) - first
            self.shift[packet.stream_index] = self.shift[packet.stream.type] = shift

    def picture(self, frame) -> Iterator[tuple[float, float]]:
        for start, _ in super().picture(frame):
            yield from self.video.picture(start - self.shift["video"])

    def sound(self, frame) -> Iterator[tuple[float, float, float]]:
        for start, end, _ in super().sound(frame):
            yield from self.audio.stretch(start - self.shift["audio"], end - start)


class _Counted(_Stamps):
    """AVI has no timestamps: a picture's time is its packet's place, while none is reordered.

    FFmpeg's writer of AVI moves pictures back by the sound's priming, in whole pictures, and the
    first of them not at all. late: s by which that puts the others; priming: s that it stands for.
    """

    def __init__(self, frame_length: float, late: float, priming: float, streams):
        super().__init__(frame_length)
        self.late, self.priming = late, priming
        self.places: list[float] = []
        self.last = -1
        # What is lost shifts all that comes after it, and only the index knows.
        self.before = {stream.index: _bytes_before(stream) for stream in streams}
        self.read = dict.fromkeys(self.before, 0)

    def packet(self, packet) -> None:
        before = self.before[packet.stream_index]
        if before.get(packet.pos, self.read[packet.stream_index]) != self.read[packet.stream_index]:
            kind = _WORDS[packet.stream.type]
            raise _Refused(f"damaged: some of its {kind} are not where its index has them")
        self.read[packet.stream_index] += packet.size
        if packet.stream.type == "video" and packet.dts is not None:
            packet.opaque = len(self.places)
            late = self.late if self.places else 0.0
            self.places.append(float(packet.dts * packet.time_base) - late)

    def picture(self, frame) -> Iterator[tuple[float, float]]:
        if frame.opaque is None or frame.opaque < self.last:
            raise _Refused("its pictures are stored out of order (B-frames), and AVI does not say "
                           "when each is shown")  # fmt: skip
        self.last = frame.opaque
        start = self.places[frame.opaque]
        yield start, start + self.frame_length

    def sound(self, frame) -> Iterator[tuple[float, float, float]]:
        for start, end, skipped in super().sound(frame):
            yield start - self.priming, end - self.priming, skipped


def _bytes_before(stream) -> dict[int, int]:
    """Place in the file → bytes of the stream before it, for each packet in an AVI's index."""
    before, total = {}, 0
    for entry in stream.index_entries:
        before[entry.pos + _CHUNK_HEADER] = total
        total += entry.size
    return before


def _late_pictures(container, video, audio) -> tuple[float, float]:
    """(late, priming) of `_Counted`: (0, 0) but for what FFmpeg's writer of AVI does."""
    priming = _PRIMING.get(audio.codec_context.name, 0) / (audio.sample_rate or 1)
    if not priming or not container.metadata.get("software", "").startswith("Lavf"):
        return 0.0, 0.0
    places = []
    for packet in _packets(container, video):
        places += [packet.dts] if packet.dts is not None and packet.size else []
        if len(places) == 2:
            break
    gap = np.diff(places).sum() - 1
    length = float(video.time_base)
    if gap < 1 or gap != math.ceil(priming / length):
        return 0.0, 0.0
    return gap * length, priming


# --- reading --------------------------------------------------------------------------------------


class _Reading:
    """One pass over a file: what is shown within `seconds` of the first picture, and no more."""

    def __init__(self, container, video, audio, chosen: _Chosen, seconds: float | None, size, keep):
        self.container, self.video, self.audio = container, video, audio
        self.chosen, self.seconds = chosen, math.inf if seconds is None else seconds
        self.keep = keep or (lambda picture: picture)
        self.to_rgb = _ToRGB(size, video.sample_aspect_ratio)
        self.header_rate = float(video.average_rate or video.guessed_rate or 0)
        self.stamps = self._stamps()
        self.times: list[float] = []
        self.pictures: list[Any] = []
        self.sounds: Sound | None = None
        self.limit = math.inf  # s on the file's axis; nothing from then on is wanted
        self.ends = {"video": -math.inf, "audio": -math.inf}
        self.partial = {"video": False, "audio": False}  # whether the last packet was
        self.suspect = False  # whether a transport stream has lost packets, or was joined
        self.done = {"video": False, "audio": False}
        self.sent: list[float] = []  # when the pictures are shown that were given to the decoder
        self.decoded: list[float] = []
        self.failed = self.packets = 0  # of pictures
        self.interlaced = False

    def _stamps(self) -> _Stamps:
        length = 1 / self.header_rate if self.header_rate else 0.04
        if self.chosen.tracks:
            return _Edited(self.chosen.tracks)
        if self.container.format.name == "avi":
            self.video.codec_context.copy_opaque = True
            both = self.video, self.audio
            return _Counted(float(self.video.time_base), *self.chosen.late, both)
        return _Stamps(length)

    def run(self) -> None:
        for packet in _packets(self.container, self.video, self.audio):
            kind = packet.stream.type
            if not packet.size and packet.dts is not None:
                continue  # "the same as before", in Theora and in AVI; decoders take it for the end
            if packet.size:
                self.partial[kind] = packet.is_corrupt
                self.suspect |= packet.is_corrupt
            self.stamps.packet(packet)
            if kind == "video" and packet.size:
                self._count(packet)
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
            self.failed += 1  # how many of how many is worth more than the first of them
            return []

    def _count(self, packet) -> None:
        """Pictures that are to come, from the first that can be decoded by itself; none comes of
        what an edit list hides, nor of the frames that VP8 only refers to."""
        self.packets += 1
        if self.done["video"] or packet.is_discard or packet.pts is None:
            return
        hidden = self.video.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10
        if not hidden and (packet.is_keyframe or self.sent):
            self.sent.append(float(packet.pts * packet.time_base))

    def _sound_is_over(self, packet) -> bool:
        """Pictures go on and on after all that is wanted of them, and no sound comes any more."""
        if not self.done["video"] or packet.dts is None:
            return False
        return float(packet.dts * packet.time_base) > self.limit + _INTERLEAVED

    def _picture(self, frame) -> None:
        if frame.pts is not None:
            self.decoded.append(float(frame.pts * frame.time_base))
        self.interlaced |= bool(frame.interlaced_frame)
        picture = None
        for start, end in self.stamps.picture(frame):
            if frame.is_corrupt:
                raise _Refused(f"damaged or truncated picture at {start:.2f} s")
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
        if frame.sample_rate != rate:
            raise _Refused(f"its sample rate changes from {rate} to {frame.sample_rate} Hz")
        if frame.format.is_planar and frame.layout.nb_channels > _PLANES:
            channels = frame.layout.nb_channels
            raise _Refused(f"its sound has {channels} channels, {_PLANES} at most can be read")
        samples = _samples(frame)
        for start, end, skipped in self.stamps.sound(frame):
            self.ends["audio"] = float(np.fmax(self.ends["audio"], end))
            if start > self.limit + _AHEAD:
                self.done["audio"] = True
                continue
            part = samples
            if self.chosen.tracks:
                first = round(skipped * rate)
                part = samples[:, first : first + round((end - start) * rate)]
            if not start >= self.limit and not part.isfinite().all():
                raise _Refused(f"its sound is NaN or infinite at {start:.2f} s of the file")
            self.sounds.append(start, part)

    # --- afterwards

    def check(self, path: Path) -> None:
        """Refuses what is not whole, or hardly anything of which could be decoded."""
        self._check_decoded()
        for found, kind in ((self.times, "video"), (self.sounds and self.sounds.chunks, "audio")):
            if not found:
                raise _Refused(f"no {_WORDS[kind]} (the stream is empty)")
        if all(self.done.values()):
            return
        for kind in (kind for kind, partial in self.partial.items() if partial):
            raise _Refused(f"truncated: it ends in the middle of its {_WORDS[kind]}")
        reason = fault(path, self.container.format.name)
        if reason is not None:
            raise _Refused(reason)
        if self.container.format.name == "mpegts" and not self.interlaced:
            # A picture without a beginning runs into the next, which then is shown in its place.
            lost = pictures_begun(path, self.video.id) - self.packets
            if lost > 0:
                raise _Refused(f"damaged: {lost} of its pictures have no beginning")
        for stream, track in zip((self.video, self.audio), self.chosen.tracks or (None, None),
                                 strict=True):  # fmt: skip
            if not self.done[stream.type]:
                self._check_whole(stream, track)
        self._check_container()

    def _check_decoded(self) -> None:
        # Decoders give frames in the order shown, so all from before the last of them have come.
        # Before the first there may be some that refer to what was cut off.
        first = min(self.decoded, default=-math.inf)
        last = max(self.decoded, default=math.inf) if self.done["video"] else math.inf
        wanted = sum(first <= time < last for time in self.sent)
        lost = wanted - sum(time < last for time in self.decoded)
        # Interlaced pictures may come as two fields, a packet each.
        few = lost > _LOST * wanted and not (self.interlaced and lost <= 0.55 * wanted)
        if few or self.failed:
            raise _Refused(f"damaged or truncated: {max(lost, self.failed)} of {wanted} pictures "
                           "could not be decoded")  # fmt: skip

    def _check_whole(self, stream, track: Track | None) -> None:
        """A truncated file decodes without complaint; only its header knows what is missing."""
        if track is not None:
            promised = track.end
        elif stream.duration is not None:
            promised = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
        else:
            return
        self._check_end(self.ends[stream.type], promised, _WORDS[stream.type])

    def _check_container(self) -> None:
        """Matroska has one length for all; what other streams there are may be the longest."""
        container = self.container
        alone = len(container.streams) == 2
        if container.duration is None or not alone or any(self.done.values()):
            return
        promised = container.duration / av.time_base  # from 0 on, not from the first picture
        if self.video.duration is None and self.audio.duration is None:
            self._check_end(max(self.ends.values()), promised, "pictures and sound")

    def _check_end(self, end: float, promised: float, what: str) -> None:
        if end < promised - _TRUNCATED - self.stamps.frame_length:
            raise _Refused(f"truncated: {what} end at {end:.2f} s of {promised:.2f} s")

    def streams(self) -> Streams:
        """Both streams, counted from the first picture."""
        origin, end = self.times[0], self.ends["video"]
        self._check_steps(np.array([*self.times, min(end, max(self.limit, self.times[-1]))]))
        fps = _rate(np.array(self.times), self.header_rate)
        if fps != self.header_rate:  # then the last picture's length is not known, either
            end = max(end, self.times[-1] + 1 / fps)
        seconds = end - origin
        try:
            sound = self.sounds.joined(origin, min(seconds, self.seconds))
        except ValueError as error:
            raise _Refused(str(error)) from error
        if self.suspect and (self.sounds.gaps or np.diff(self.times).max() > 1.5 / fps):
            raise _Refused("damaged: some of its packets are missing")
        return Streams(
            fps=fps,
            sample_rate=self.sounds.sample_rate,
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
            raise _Refused("the timestamps of its pictures jump")
        for index in np.nonzero(steps > _HOLE)[0]:
            covered = self.sounds.covered(times[index], times[index + 1])
            if covered < _COVERED * steps[index]:
                raise _Refused("the timestamps of its pictures jump")


def _rate(times: np.ndarray, header: float) -> float:
    """Pictures per second: the header's rate where the timestamps bear it out, else theirs."""
    steps = np.diff(times)
    steps = steps[steps > 0]
    if not len(steps):
        if not header:
            raise _Refused("no frame rate (a single picture)")
        return header
    # The shorter of the usual steps, over four pictures each: jitter weighs less there, and stills,
    # dropped pictures and a slower stretch are not the rate at which a picture can come.
    reach = min(4, len(steps))
    usual = np.quantile(np.convolve(steps, np.ones(reach), "valid"), 0.2) / reach
    near = steps[np.abs(steps / usual - 1) < 0.4]
    near = near if len(near) else np.array([usual])
    even = near[np.abs(near - np.median(near)) < _CLOCK]
    if len(even) > 0.8 * len(near):  # no jitter but rounding; what else there is are cuts
        near = even
    rate = 1 / near.mean()
    whole = max(round(rate), 1)
    doubt = 3 * near.std() / near.sum()  # what jitter of the first and the last makes of the mean
    usual_rates = sorted((whole, whole * 1000 / 1001), key=lambda known: abs(known - rate))
    if abs(whole / rate - 1) < doubt:
        usual_rates = [whole]
    near_rates = (known for known in (header, *usual_rates) if abs(known / rate - 1) < _REGULAR)
    return float(next(near_rates, rate))


# --- pictures -------------------------------------------------------------------------------------


class _ToRGB:
    """Frame → uint8 [H,W,3]: colours by the frame's tags, then upright, scaled and cropped."""

    def __init__(self, size: tuple[int, int] | None, pixel_aspect: Fraction | None):
        self.size = size
        self.pixel_width = float(pixel_aspect or 1)
        self.reformatter = VideoReformatter()

    def __call__(self, frame) -> Tensor:
        turns = round(frame.rotation / 90) % 4  # counter-clockwise quarters
        height, width = frame.height, round(frame.width * self.pixel_width)
        if self.size is not None:
            target = self.size if turns % 2 == 0 else self.size[::-1]
            ratio = max(target[0] / height, target[1] / width)
            height, width = round(height * ratio), round(width * ratio)
        picture = self.reformatter.reformat(
            frame, width=width, height=height, format="rgb24",
            src_colorspace=_matrix(frame), src_color_range=_range(frame),
            dst_color_range=ColorRange.JPEG, interpolation=Interpolation.BICUBIC | EXACT,
        )  # fmt: skip
        picture = torch.from_numpy(np.rot90(picture.to_ndarray(), turns).copy())
        if self.size is None:  # a stream may change its size: the first picture's counts
            self.size = tuple(picture.shape[:2])
        return _centre(picture, self.size)


def _matrix(frame) -> int:
    """The frame's matrix, or the nearest that swscale knows; untagged pictures are Rec. 709 from
    720 lines on and Rec. 601 below, as players assume."""
    matrix = int(frame.colorspace)
    if matrix in _UNREADABLE_MATRICES:
        raise _Refused(f"its colours are {_UNREADABLE_MATRICES[matrix]}, which cannot be read")
    if matrix in _BY_PRIMARIES:  # the primaries' own coefficients: Rec. 709 is 1 in both lists
        matrix = int(frame.color_primaries)
    if matrix == _CONSTANT_LUMINANCE:
        return _BT2020
    if matrix in _KNOWN_MATRICES:
        return matrix
    return Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601


def _range(frame) -> int:
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full or frame.format.is_rgb else ColorRange.MPEG


def _centre(picture: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(picture.shape, size, strict=False))
    return picture[top : top + size[0], left : left + size[1]].contiguous()


def _samples(frame) -> Tensor:
    """Decoded sound, packed or planar, integer or float, as float32 [C,N]."""
    x = torch.from_numpy(frame.to_ndarray())
    if not frame.format.is_planar:
        x = x.view(-1, frame.layout.nb_channels).T
    if x.is_floating_point():
        return x.float()
    scale = 2.0 ** (8 * x.element_size() - 1)
    return x.float() / scale - (1.0 if x.dtype == torch.uint8 else 0.0)
