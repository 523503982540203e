"""Edit lists and sample tables of MP4 and QuickTime files (ISO 14496-12), as written in the file.

FFmpeg's demuxer moves the first whole picture of an edit to the edit's beginning, which is up to a
picture late where an edit begins between two pictures. So lists of that kind are read here, and the
demuxer is told to leave them alone. It also does without a list or a part of a table where those
are damaged, and moves all that comes after; so tables that contradict each other are refused.
"""

import bisect
import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ROUNDING = 1e-6  # s
_NEAR = 0.001  # s; an edit that begins this near a picture begins with it
_FAR = 5.0  # s by which reordering may put a picture outside its track
_HEADERS = 4096  # bytes of a track within which its edit list is
_LARGEST = 1 << 28  # bytes of a `moov`; hours of film take 20 MiB


class DamagedTables(ValueError):
    """Why the tables of a file cannot be followed, in one line."""


@dataclass(frozen=True)
class Edit:
    """[media, media + length) of a track is shown from `start` on; all in seconds."""

    start: float
    media: float
    length: float


@dataclass
class Track:
    """One track's times: its edits, and, for each sample in the order stored, when it is shown.

    shown: seconds of media time. promised, summed: its length by its header and by its samples;
    last: when the last of them ends.
    speed: whether an edit plays at another speed than 1, which a held picture is, too.
    """

    edits: list[Edit]
    cts: np.ndarray
    promised: float
    summed: float
    last: float
    speed: bool

    def __post_init__(self):
        self.shown = np.unique(self.cts)

    def is_plain(self, *, pictures: bool) -> bool:
        """Whether FFmpeg's demuxer is exact: one edit; of pictures, one that begins with one."""
        if len(self.edits) > 1:
            return False
        if not pictures or not len(self.shown):
            return True
        return bool(np.abs(self.shown - self.edits[0].media).min() < _NEAR)

    def in_order(self) -> bool:
        """Whether the edits go forwards in the track and show nothing twice."""
        return all(
            one.media + one.length <= following.media + _NEAR
            for one, following in itertools.pairwise(self.edits)
        )

    def picture(self, media: float) -> Iterator[tuple[float, float]]:
        """(start, end) of each showing of the picture whose media time is `media`."""
        index = bisect.bisect_right(self.shown, media + _ROUNDING)
        following = self.shown[index] if index < len(self.shown) else math.inf
        for start, end, _ in self.stretch(media, following - media):
            yield start, end

    def stretch(self, media: float, length: float) -> Iterator[tuple[float, float, float]]:
        """(start, end, seconds skipped of it) of each showing of [media, media + length)."""
        for edit in self.edits:
            begin, end = max(media, edit.media), min(media + length, edit.media + edit.length)
            if end > begin + _ROUNDING:
                yield edit.start + begin - edit.media, edit.start + end - edit.media, begin - media

    def first_picture(self) -> float:
        """When the first picture is shown."""
        showings = (start for media in self.shown for start, _ in self.picture(media))
        return min(showings, default=0.0)

    @property
    def end(self) -> float:
        return max(edit.start + edit.length for edit in self.edits)


def read_tracks(path: Path) -> dict[int, Track]:
    """Track number → its times; empty where the file is not of this family, or is fragmented.

    Raises DamagedTables where they contradict themselves or each other.
    """
    try:
        moov = _moov(path)
        if moov is None or b"mvex" in {kind for kind, _ in _boxes(moov)}:
            return {}
        scale = _timescale(_first(moov, b"mvhd"))
        tracks = [box for kind, box in _boxes(moov) if kind == b"trak"]
        tracks = [box for box in tracks if _find(box, b"mdia", b"mdhd")]
        chunks = [chunk for box in tracks for chunk in _chunks(_stbl(box))]
        _check_chunks(chunks, path.stat().st_size)
        return dict(_track(box, scale) for box in tracks)
    except DamagedTables:
        raise
    except (struct.error, IndexError, ValueError) as error:  # what a table of the wrong size gives
        raise DamagedTables(f"its tables of times are damaged ({error})") from error


def _track(trak: memoryview, scale: int) -> tuple[int, Track]:
    header = _first(trak, b"tkhd")
    number = struct.unpack_from(">I", header, 20 if header[0] else 12)[0]
    media_header = _find(trak, b"mdia", b"mdhd")
    media_scale = _timescale(media_header)
    promised = struct.unpack_from(*((">Q", media_header, 24) if media_header[0]
                                    else (">I", media_header, 16)))[0]  # fmt: skip
    cts, summed, end = _sample_times(_stbl(trak))
    far = max(cts.max() - summed, -cts.min()) / media_scale if len(cts) else 0.0
    if far > _FAR:
        raise DamagedTables("its tables of times are damaged (a picture is far from all others)")
    elst = _find(trak, b"edts", b"elst")
    listed = _first(trak, b"edts", optional=True) or b"elst" in bytes(trak[:_HEADERS])
    if elst is None and listed:
        raise DamagedTables("its edit list is damaged")
    edits, speed = _edits(elst, scale, media_scale, end / media_scale)
    lengths = promised / media_scale, summed / media_scale, end / media_scale
    return number, Track(edits, cts / media_scale, *lengths, speed)


def _stbl(trak: memoryview) -> memoryview:
    return _find(trak, b"mdia", b"minf", b"stbl") or memoryview(b"")


def _chunks(stbl: memoryview) -> Iterator[tuple[int, int]]:
    """(begin, end) in the file of each stretch of a track's samples."""
    places = _first(stbl, b"co64", optional=True)
    width = ">u8" if places is not None else ">u4"
    places = places if places is not None else _first(stbl, b"stco", optional=True)
    sizes = _sizes(_first(stbl, b"stsz", optional=True))
    runs = _first(stbl, b"stsc", optional=True)
    if places is None or runs is None or sizes is None:
        return
    places = np.frombuffer(places, width, struct.unpack_from(">I", places, 4)[0], offset=8)
    runs = np.frombuffer(runs, ">u4", 3 * struct.unpack_from(">I", runs, 4)[0], offset=8)
    runs = runs.reshape(-1, 3).astype(np.int64)
    firsts = np.append(runs[:, 0], len(places) + 1)
    repeats = np.diff(firsts)
    each = np.zeros(0, np.int64)
    if (repeats > 0).all() and repeats.sum() == len(places):
        each = np.repeat(runs[:, 1], repeats)
    if len(each) != len(places) or each.sum() != len(sizes):
        raise DamagedTables("its tables of samples are damaged (they disagree about their number)")
    ends = np.cumsum(each)
    summed = np.concatenate([[0], np.cumsum(sizes)])
    lengths = summed[ends] - summed[ends - each]
    yield from zip(places.tolist(), (places.astype(np.int64) + lengths).tolist(), strict=True)


def _sizes(box: memoryview | None) -> np.ndarray | None:
    if box is None:
        return None
    size, count = struct.unpack_from(">II", box, 4)
    if size:
        # Sound without compression: its samples are counted, and FFmpeg knows their size better.
        return None
    return np.frombuffer(box, ">u4", count, offset=12).astype(np.int64)


def _check_chunks(chunks: list[tuple[int, int]], size: int) -> None:
    chunks = sorted(chunks)
    overlap = any(end > begin for (_, end), (begin, _) in itertools.pairwise(chunks))
    if overlap:
        raise DamagedTables("its tables of samples are damaged (some lie within others)")
    if chunks and chunks[-1][1] > size:
        raise DamagedTables("truncated: some of its samples lie beyond its end")


def _edits(box: memoryview | None, scale: int, media_scale: int, media_end: float):
    """(edits without the empty ones, whether one has another speed than 1)."""
    whole = Edit(0.0, 0.0, media_end)
    if box is None:
        return [whole], False
    count = struct.unpack_from(">I", box, 4)[0]
    layout = struct.Struct(">QqI" if box[0] else ">IiI")
    edits, start, speed = [], 0.0, False
    for index in range(count):
        length, media, rate = layout.unpack_from(box, 8 + index * layout.size)
        length /= scale
        if media >= 0:
            speed |= rate != 0x10000
            media /= media_scale
            # A length of 0 at the end means all that is left.
            edits.append(Edit(start, media, length or max(media_end - media, 0.0)))
        start += length
    return edits or [whole], speed


def _sample_times(stbl: memoryview) -> tuple[np.ndarray, int, int]:
    """In the track's clock: when each sample is shown, the sum of their lengths, the last's end."""
    runs = _runs(_first(stbl, b"stts", optional=True), signed=False)
    steps = np.repeat(runs[:, 1], runs[:, 0])
    times = np.cumsum(steps) - steps
    offsets = _runs(_first(stbl, b"ctts", optional=True), signed=True)
    shift = np.repeat(offsets[:, 1], offsets[:, 0])
    if len(shift) > len(steps):
        raise DamagedTables("its tables of times are damaged (they disagree about their number)")
    shown = times + np.pad(shift, (0, len(steps) - len(shift)))
    return shown, int(steps.sum()), int((shown + steps).max()) if len(steps) else 0


def _runs(box: memoryview | None, *, signed: bool) -> np.ndarray:
    """int64 [n,2] of (count, value)."""
    if box is None:
        return np.zeros((0, 2), np.int64)
    count = struct.unpack_from(">I", box, 4)[0]
    pairs = np.frombuffer(box, ">u4", 2 * count, offset=8).reshape(-1, 2).astype(np.int64)
    runs = np.stack([pairs[:, 0], pairs[:, 1].astype(np.int32) if signed else pairs[:, 1]], 1)
    if runs[:, 0].sum() > 1 << 24:
        raise DamagedTables("its tables of times are damaged (more samples than any film has)")
    return runs


def _moov(path: Path) -> memoryview | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at + 8 <= size:
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8))
            header = 8
            if length == 1:
                length, header = struct.unpack(">Q", file.read(8))[0], 16
            length = length or size - at
            if length < header or not (kind.isalnum() or kind.strip().isalnum()):
                return None
            if kind == b"moov":
                return memoryview(file.read(min(length - header, _LARGEST)))
            at += length
    return None


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        header = 8
        if length == 1:
            length, header = struct.unpack_from(">Q", data, at + 8)[0], 16
        length = length or len(data) - at
        if length < header:
            return
        yield kind, data[at + header : at + length]
        at += length


def _first(data: memoryview, kind: bytes, *, optional=False) -> memoryview | None:
    found = next((box for name, box in _boxes(data) if name == kind), None)
    if found is None and not optional:
        raise DamagedTables(f"its tables of times are damaged (no {kind.decode()})")
    return found


def _find(data: memoryview, *kinds: bytes) -> memoryview | None:
    for kind in kinds:
        data = _first(data, kind, optional=True) if data is not None else None
    return data


def _timescale(box: memoryview) -> int:
    """Of `mvhd` and `mdhd`: version 1 has 64-bit times before it."""
    scale = struct.unpack_from(">I", box, 20 if box[0] else 12)[0]
    if not scale:
        raise DamagedTables("its tables of times are damaged (a clock of 0 Hz)")
    return scale
