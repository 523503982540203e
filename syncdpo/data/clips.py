"""Clips, and how they come from and go to media files.

A clip begins with its file's first picture, and its sound stands where the file's timestamps put it
(see `syncdpo.data.decoding`). Writing an mp4 and reading it back keeps the two within 5 ms.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from syncdpo.data.colours import EXACT
from syncdpo.data.decoding import ClipError, Streams, decode
from syncdpo.data.files import files_below, readable
from syncdpo.data.sound_file import decode_sound

EXTENSIONS = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
})  # fmt: skip
CLOCK = 1e-3  # s, the coarsest clock of a container
SILENCE = 1e-3  # peak amplitude (-60 dB) below which a clip has no sound worth the name
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


@dataclass(frozen=True)
class ClipFormat:
    """What a model wants of every clip; seconds, Hz and pixels."""

    seconds: float
    fps: float
    height: int
    width: int
    sample_rate: int
    channels: int


@dataclass(frozen=True, eq=False)
class Clip:
    """Pictures and sound of the same stretch of time, both beginning at 0 s.

    video: uint8 [T,H,W,3], RGB, full range; picture k is shown from k/fps to (k+1)/fps.
    audio: float32 [C,N] in [-1, 1]; sample n sounds at n/sample_rate.
    notes: what its reader had to choose, a sentence each, as which of several sound tracks.
    Raises TypeError for another dtype, ValueError for another shape or a rate that is not positive.
    """

    video: Tensor
    fps: float
    audio: Tensor
    sample_rate: int
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        _check_tensor("video", self.video, torch.uint8, "[T,H,W,3]", self.video.ndim == 4
                      and self.video.shape[-1] == 3 and self.video.numel() > 0)  # fmt: skip
        _check_tensor("audio", self.audio, torch.float32, "[C,N]", self.audio.ndim == 2
                      and self.audio.shape[0] > 0)  # fmt: skip
        for name in ("fps", "sample_rate"):
            _check_positive(name, getattr(self, name))

    @property
    def seconds(self) -> float:
        return len(self.video) / self.fps


class TooShort(ClipError):
    """A file that is whole, and shorter than the `length` asked for: it lasts `seconds`."""

    def __init__(self, path: Path, seconds: float, length: float):
        super().__init__(path, f"{seconds:.2f} s long, shorter than the {length:g} s asked")
        self.seconds = seconds


def list_clips(folder: str | Path) -> list[Path]:
    """All media files below a folder, by extension, sorted; hidden files are not clips.

    Raises NotADirectoryError where there is no such folder.
    """
    return find_clips(folder)[0]


def find_clips(folder: str | Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """`list_clips`, and what has a clip's name but cannot be read, with its reason: links to
    nothing, and folders that are not entered (see `files_below`)."""
    return files_below(folder, EXTENSIONS)


def read_clips(
    paths: Iterable[str | Path],
    *,
    progress: Callable[[Iterable[str | Path]], Iterable[str | Path]] = iter,
    require_sound: bool = True,
    **wanted,
) -> tuple[list[Clip], list[tuple[Path, str]]]:
    """Reads what can be read: → (clips, skipped), skipped being (path, reason) of the others.

    progress: wraps the iteration, e.g. `tqdm`. wanted: the options of `read_clip`.
    """
    clips, skipped = [], []
    for path in progress(paths):
        try:
            clips.append(read_clip(path, require_sound=require_sound, **wanted))
        except ClipError as error:
            skipped.append((error.path, error.reason))
    return clips, skipped


def reading_summary(read: int, skipped: list[tuple[Path, str]]) -> str:
    """One sentence: how many clips were read, and which were not, each with its reason."""
    if not skipped:
        return f"Read all {read} clips."
    named = "; ".join(f"{path} ({reason})" for path, reason in skipped)
    return f"Read {read} of {read + len(skipped)} clips, skipped {len(skipped)}: {named}."


# --- reading --------------------------------------------------------------------------------------


def read_clip(
    path: str | Path,
    *,
    seconds: float | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    sample_rate: int | None = None,
    channels: int | None = None,
    require_sound: bool = False,
    sound: str | Path | None = None,
) -> Clip:
    """The first `seconds` of a file, everything of it by default, in the format asked for.

    fps: picture k is the one that the file shows at the centre of its frame, (k + 0.5)/fps; so any
        rate, a variable one too, becomes constant, and no picture is out by more than half the time
        that the file shows it. A first picture that an edit has cut short is left out, its sound
        too, so that the others keep their instants.
    size: (height, width); scaled with antialiasing until it covers that, then cropped about the
        centre. Rotation tags and non-square pixels are honoured.
    sample_rate: Hz, band-limited resampling without delay. channels: 1 is the mean of all; more are
        copies of that mean where the file has another number.
    require_sound: silence is an error.
    sound: a file whose sound stands in the place of the clip's own: its first sample sounds with
        the clip's first picture, and where it ends, silence begins. The clip then needs none.

    Raises ClipError, with a reason of one line, for whatever keeps the file from being such a clip:
    missing, empty, truncated, damaged, no media at all, without pictures or without sound, silent
    (if asked), shorter than asked, or without a way to tell when it is (see docs/clips.md).
    """
    for name, value in (("seconds", seconds), ("fps", fps), ("sample_rate", sample_rate),
                        ("channels", channels)):  # fmt: skip
        if value is not None:
            _check_positive(name, value)
    path = Path(path)
    streams = decode(path, seconds, size, needs_sound=sound is None)
    rate = float(fps or streams.fps)
    length = streams.seconds if seconds is None else seconds
    if streams.seconds < length - 0.5 / rate:
        raise TooShort(path, streams.seconds, length)
    if sound is not None:
        _take_sound(streams, path, Path(sound), length)
    count = max(1, round(length * rate))
    begin = _begin(streams.picture_times, streams.fps)
    video = _taken(streams, _shown([t - begin for t in streams.picture_times], count, rate))
    audio = _mixed(streams.sound[:, round(begin * streams.sample_rate) :], channels)
    audio = _resampled(audio, streams.sample_rate, sample_rate or streams.sample_rate)
    wanted = round(count / rate * (sample_rate or streams.sample_rate))
    audio = F.pad(audio, (0, wanted - audio.shape[1])).clamp(-1, 1)
    if require_sound and is_silent(audio):
        raise ClipError(path, "silent")
    return Clip(video, rate, audio, sample_rate or streams.sample_rate, streams.notes)


def is_silent(audio: Tensor) -> bool:
    """Whether nothing in [C,N] moves by more than `SILENCE` about its mean."""
    return audio.numel() == 0 or bool((audio - audio.mean(1, keepdim=True)).abs().max() < SILENCE)


def _take_sound(streams: Streams, path: Path, sound: Path, length: float) -> None:
    """Another file's sound in the place of its own; what is wrong with that is the clip's fault."""
    name = readable(sound.name)
    try:
        # A picture more: what an edit has cut short of the first is left out, sound and all.
        streams.sound, streams.sample_rate = decode_sound(sound, length + 1 / streams.fps)
    except ClipError as error:
        where = readable(sound) if error.reason == "no such file" else name
        raise ClipError(path, f"its sound {where}: {error.reason}") from error
    notes = [note for note in streams.notes if not note.startswith("sound track")]
    ends = streams.sound.shape[1] / streams.sample_rate
    if ends < length - 0.5 / streams.fps:
        notes.append(f"its sound {name} ends at {ends:.2f} s of {length:.2f} s, silence follows")
    streams.notes = tuple(notes)


def _begin(times: list[float], fps: float) -> float:
    """Seconds from the first picture to the first that stands a whole number of frames before all
    others; less than a frame, and 0 where the others stand on no such grid."""
    frame = 1 / fps
    turns = np.exp(2j * np.pi * (np.asarray(times[1:]) / frame))
    begin = np.angle(turns.mean()) / (2 * np.pi) % 1 * frame if len(turns) else 0.0
    off = (np.asarray(times[1:]) - begin + frame / 2) % frame - frame / 2
    on_grid = len(turns) and (np.abs(off) < CLOCK).mean() > 0.9
    return float(begin) if on_grid and CLOCK < begin < frame - CLOCK else 0.0


def _shown(times: list[float], count: int, rate: float) -> list[int]:
    """Which picture is on at the centre of each of `count` frames, given when each comes on."""
    centres = (np.arange(count) + 0.5) / rate
    # Timestamps are rounded to the container's clock: half a millisecond of grace, or a picture
    # that comes on exactly at a centre (12 fps to 24) might be missed by a rounding.
    return np.clip(np.searchsorted(times, centres + 5e-4, side="right") - 1, 0, None).tolist()


def _taken(streams: Streams, shown: list[int]) -> Tensor:
    """The pictures shown, one after the other; each is let go after its last use, so that the film
    is not held twice."""
    pictures, last = streams.pictures, 0
    video = torch.empty(len(shown), *pictures[0].shape, dtype=torch.uint8)
    for k, index in enumerate(shown):
        pictures[last:index] = [None] * (index - last)
        last = index
        video[k] = pictures[index]
    return video


def _mixed(audio: Tensor, channels: int | None) -> Tensor:
    if channels is None or channels == audio.shape[0]:
        return audio
    return audio.mean(0, keepdim=True).expand(channels, -1)


def _resampled(audio: Tensor, source: int, target: int) -> Tensor:
    if source == target:
        return audio
    # Here, not above: torchaudio refuses some builds of torch, which can still read other clips.
    from torchaudio.functional import resample

    return resample(audio, source, target)


# --- writing --------------------------------------------------------------------------------------


def write_clip(path: str | Path, clip: Clip) -> None:
    """Writes an mp4 (H.264 near-lossless, AAC 128 kbit/s) that browsers play and `read_clip` reads
    back with sound and picture within 5 ms of each other. The file appears whole or not at all.

    Raises ValueError for what the format cannot hold: odd height or width, more than 2 channels, a
    sample rate that AAC does not know, samples that are not finite.
    """
    path = Path(path)
    _check_writable(clip)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        options = {"movflags": "faststart"}
        with av.open(f"file:{partial}", "w", format="mp4", options=options) as out:
            video, audio = _add_video(out, clip), _add_audio(out, clip)
            for frame in _pictures(clip):
                out.mux(video.encode(frame))
            for frame in _sounds(clip, audio.codec_context.frame_size or 1024):
                out.mux(audio.encode(frame))
            out.mux(video.encode(None))
            out.mux(audio.encode(None))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_writable(clip: Clip) -> None:
    height, width = clip.video.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"clip.video: expected even height and width, got {height}×{width}")
    if clip.audio.shape[0] > 2:
        raise ValueError(f"clip.audio: expected 1 or 2 channels, got {clip.audio.shape[0]}")
    if clip.sample_rate not in AAC_RATES:
        raise ValueError(f"clip.sample_rate: expected one of {AAC_RATES}, got {clip.sample_rate}")
    if not clip.audio.isfinite().all():
        raise ValueError("clip.audio: expected finite samples, got NaN or infinity")


def _add_video(out, clip: Clip):
    # 1001 holds the broadcast rates (24000/1001) exactly.
    stream = out.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(1001))
    stream.height, stream.width = clip.video.shape[1:3]
    stream.pix_fmt = "yuv420p"
    # bf=0: no reordered pictures, so readers that ignore edit lists keep time as well.
    # chromaloc=1: swscale centres chroma between pixels; untagged it would be read as left-sited.
    stream.options = {"crf": "15", "bf": "0", "x264-params": "chromaloc=1"}
    context = stream.codec_context
    context.color_range = ColorRange.MPEG
    context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
    return stream


def _add_audio(out, clip: Clip):
    layout = "mono" if clip.audio.shape[0] == 1 else "stereo"
    return out.add_stream("aac", rate=clip.sample_rate, layout=layout, bit_rate=128_000)


def _pictures(clip: Clip) -> Iterator[av.VideoFrame]:
    reformatter = VideoReformatter()
    for k, picture in enumerate(clip.video):
        frame = av.VideoFrame.from_ndarray(picture.cpu().numpy(), format="rgb24")
        frame = reformatter.reformat(
            frame, format="yuv420p", src_color_range=ColorRange.JPEG,
            dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC | EXACT,
        )  # fmt: skip
        frame.pts = k
        frame.time_base = 1 / Fraction(clip.fps).limit_denominator(1001)
        yield frame


def _sounds(clip: Clip, frame_size: int) -> Iterator[av.AudioFrame]:
    audio = clip.audio.cpu().clamp(-1, 1).numpy()
    layout = "mono" if audio.shape[0] == 1 else "stereo"
    for start in range(0, audio.shape[1], frame_size):
        chunk = np.ascontiguousarray(audio[:, start : start + frame_size])
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
        frame.sample_rate = clip.sample_rate
        frame.pts = start
        frame.time_base = Fraction(1, clip.sample_rate)
        yield frame


# --- checks ---------------------------------------------------------------------------------------


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, shape: str, fits: bool) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    if not fits:
        raise ValueError(f"{name}: expected {shape}, got {list(value.shape)}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
