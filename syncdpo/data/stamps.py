"""When each picture and each sample of sound is on, by what a container holds of time.

Timestamps tell it in most files, edit lists where FFmpeg would round them to a picture, and in AVI
the place of each picture.
"""

import math
from collections.abc import Iterator

import numpy as np

from syncdpo.data.container import WORDS, Refused, packets_of
from syncdpo.data.edits import Track

_REGULAR = 0.005  # by which a header's or a usual frame rate may differ from the timestamps'
_CLOCK = 0.0011  # s by which steps may differ where a container rounds to a millisecond
_CHUNK_HEADER = 8  # bytes of an AVI's chunk before its data
# Samples of silence that FFmpeg's encoders begin with, which AVI has no place to note.
_PRIMING = {"mp3": 1105, "mp3float": 1105, "aac": 1024, "mp2": 481, "mp2float": 481}


class Stamps:
    """Frames → where they stand on the file's axis, (start, end) of each showing in seconds."""

    def __init__(self, frame_length: float):
        self.frame_length = frame_length

    def packet(self, packet) -> None:
        """Called for each packet before its frames."""

    def picture(self, frame) -> Iterator[tuple[float, float]]:
        if frame.pts is None:
            raise Refused("its pictures carry no timestamps")
        start = float(frame.pts * frame.time_base)
        yield start, start + (float((frame.duration or 0) * frame.time_base) or self.frame_length)

    def sound(self, frame) -> Iterator[tuple[float, float, float]]:
        """(start, end, seconds skipped of the frame); NaN where it has no timestamp: it follows the
        one before it."""
        start = math.nan if frame.pts is None else float(frame.pts * frame.time_base)
        yield start, start + frame.samples / frame.sample_rate, 0.0


class Edited(Stamps):
    """By the edit lists of an MP4; the demuxer gives media time, shifted where it goes below 0."""

    def __init__(self, tracks: tuple[Track, ...]):
        super().__init__(0.0)
        self.video, self.audio = tracks[0], tracks[-1]
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


class Counted(Stamps):
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
            kind = WORDS[packet.stream.type]
            raise Refused(f"damaged: some of its {kind} are not where its index has them")
        self.read[packet.stream_index] += packet.size
        if packet.stream.type == "video" and packet.dts is not None:
            packet.opaque = len(self.places)
            late = self.late if self.places else 0.0
            self.places.append(float(packet.dts * packet.time_base) - late)

    def picture(self, frame) -> Iterator[tuple[float, float]]:
        if frame.opaque is None or frame.opaque < self.last:
            raise Refused("its pictures are stored out of order (B-frames), and AVI does not say "
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


def late_pictures(container, video, audio) -> tuple[float, float]:
    """(late, priming) of `Counted`: (0, 0) but for what FFmpeg's writer of AVI does."""
    priming = _PRIMING.get(audio.codec_context.name, 0) / (audio.sample_rate or 1)
    if not priming or not container.metadata.get("software", "").startswith("Lavf"):
        return 0.0, 0.0
    places = []
    for packet in packets_of(container, video):
        places += [packet.dts] if packet.dts is not None and packet.size else []
        if len(places) == 2:
            break
    gap = np.diff(places).sum() - 1
    length = float(video.time_base)
    if gap < 1 or gap != math.ceil(priming / length):
        return 0.0, 0.0
    return gap * length, priming


def frame_rate(times: np.ndarray, header: float) -> float:
    """Pictures per second: the header's rate where the timestamps bear it out, else theirs."""
    steps = np.diff(times)
    steps = steps[steps > 0]
    if not len(steps):
        if not header:
            raise Refused("no frame rate (a single picture)")
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
