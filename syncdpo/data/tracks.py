"""Which of a file's streams are the clip, and where its edit lists need reading by ourselves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from av.stream import Disposition

from syncdpo.data.container import Refused, open_file, packets_of
from syncdpo.data.edits import DamagedTables, Track, read_tracks
from syncdpo.data.stamps import late_pictures

_LENGTHS = 0.25  # s by which an MP4's tables of samples may differ from the length its header gives
_NOT_FILM = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


@dataclass(frozen=True)
class Chosen:
    """Indices of both streams; tracks: their edit lists, where FFmpeg would not be exact;
    late: see `late_pictures`. audio: None where there is no sound, and none is needed."""

    video: int
    audio: int | None
    tracks: tuple[Track, ...] | None
    late: tuple[float, float]
    notes: tuple[str, ...]


def choose(path: Path, needs_sound: bool = True) -> Chosen:
    """The default or first stream of either kind that moves or sounds; Refused where one lacks.

    needs_sound: False takes a file without any stream of sound, too.
    """
    with open_file(path, {}) as container:
        has = container.streams
        films = _usable(has.video, "pictures")
        if len(films) > 1:
            films = _moving(container, films) or films
        if not needs_sound and not has.audio:
            return _choose_silent(path, container, films)
        sounds = _usable(has.audio, "sound")
        video, audio = min(films, key=_preference), min(sounds, key=_preference)
        notes = [*_note(video, films, "video"), *_note(audio, sounds, "sound")]
        tracks = None
        if container.format.name.startswith("mov"):
            tracks = _odd_edits(path, video, audio)
        late = (0.0, 0.0)
        if container.format.name == "avi":
            late = late_pictures(container, video, audio)
        return Chosen(video.index, audio.index, tracks, late, tuple(notes))


def choose_sound(container):
    """The default or first stream of sound; Refused where there is none."""
    return min(_usable(container.streams.audio, "sound"), key=_preference)


def _choose_silent(path: Path, container, films: list) -> Chosen:
    video = min(films, key=_preference)
    is_mov = container.format.name.startswith("mov")
    tracks = _odd_edits(path, video) if is_mov else None
    return Chosen(video.index, None, tracks, (0.0, 0.0), tuple(_note(video, films, "video")))


def _usable(streams, kind: str) -> list:
    """Those with a decoder; a cover picture is no video."""
    usable = [s for s in streams if s.codec_context and not s.disposition & _NOT_FILM]
    if not usable:
        raise Refused(f"no {kind} (no such stream that can be decoded)")
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
    for packet in packets_of(container, *films):
        packets[packet.stream_index] += packet.size > 0
        if min(packets.values()) > 1:
            break
    return [film for film in films if packets[film.index] > 1]


def _odd_edits(path: Path, video, *audio) -> tuple[Track, ...] | None:
    """The edit lists of the pictures and of the sound, if any, where one is not a plain one."""
    try:
        tracks = read_tracks(path)
    except DamagedTables as error:
        raise Refused(str(error)) from error
    if any(stream.id not in tracks for stream in (video, *audio)):
        return None
    pair = tuple(tracks[stream.id] for stream in (video, *audio))
    for track, kind in zip(pair, ("pictures", "sound"), strict=False):
        if track.speed:
            raise Refused(f"an edit of its {kind} plays at another speed, which is not supported")
        if abs(track.promised - track.summed) > _LENGTHS:
            raise Refused(f"damaged: its header promises {track.promised:.2f} s of {kind}, its "
                           f"table of samples {track.summed:.2f} s")  # fmt: skip
        if max(edit.media + edit.length for edit in track.edits) > track.last + _LENGTHS:
            raise Refused(f"damaged: its edit list shows more of its {kind} than there is")
    if not all(track.in_order() for track in pair):
        raise Refused("its edit list shows parts again or out of order, which is not supported")
    plain = all(track.is_plain(pictures=track is pair[0]) for track in pair)
    return None if plain else pair
