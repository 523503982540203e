"""What goes into a cache, one by one: where a clip is, how it is read; and what came of all."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from syncdpo.data.buckets import Bucket, read_into
from syncdpo.data.clips import Clip, read_clip
from syncdpo.data.files import readable, reasons
from syncdpo.data.winners import winner_flags

FORMAT = 1


@dataclass
class PrepareSummary:
    """What one process did: clips made, kept from before, and left out, with reasons.

    noted: what the reader had to choose in clips that were made. no_captions: there were none to
    look into. buckets: how many clips are in each, where there are several. unit: what they are
    called, clips or pairs.
    """

    made: int = 0
    kept: int = 0
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    flagged: list[tuple[Path, str]] = field(default_factory=list)
    noted: list[tuple[Path, str]] = field(default_factory=list)
    without_caption: list[Path] = field(default_factory=list)
    empty_caption: list[Path] = field(default_factory=list)
    no_captions: bool = False
    buckets: Counter[Bucket] = field(default_factory=Counter)
    unit: str = "clips"

    @property
    def usable(self) -> int:
        return self.made + self.kept

    def __str__(self) -> str:
        lines = [f"{self.usable} {self.unit} in the cache ({self.made} made, {self.kept} kept)"]
        lines += [f"  {count} in {bucket}" for bucket, count in sorted(self.buckets.items())]
        named = (("skipped", self.skipped), ("flagged", self.flagged), ("noted", self.noted))
        for title, rows in named:
            if rows:
                lines.append(f"{len(rows)} {title}:")
                lines += reasons(rows)
        uncaptioned = (("without a", self.without_caption), ("with an empty", self.empty_caption))
        for title, paths in uncaptioned:
            if paths:
                lines.append(f"{len(paths)} {title} caption:")
                lines += [f"  {readable(path)}" for path in paths]
        if self.no_captions:
            lines.append(f"no captions: none of the {self.unit} has one")
        return "\n".join(lines)


@dataclass(frozen=True)
class Item:
    """One clip to encode: where it is, what it is called, and where its latents go."""

    path: Path
    source: str
    caption: str | None
    target: Path
    sound: Path | None = None

    def is_there(self) -> bool:
        return self.path.is_file() and (self.sound is None or self.sound.is_file())

    def record(self, identity: str) -> dict:
        """What a finished file says about its origin; a file that says otherwise is stale."""
        stat = self.path.stat()
        record = {
            "format": FORMAT,
            "identity": identity,
            "source": self.source,
            "caption": self.caption,
            "bytes": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
        }
        if self.sound is not None:
            stat = self.sound.stat()
            record["sound"] = [readable(self.sound.name), stat.st_size, stat.st_mtime_ns]
        return record

    def decode(self, formats: dict) -> tuple[Bucket | None, Clip]:
        """The clip, in the format of the bucket that fits it. Raises ClipError."""
        return decode_into(formats, self.path, partial(decode_clip, sound=self.sound))

    def flags(self, clip: Clip) -> list[str]:
        return winner_flags(clip, self.path, self.sound)

    def encode(self, model, clip: Clip, caption: str) -> dict[str, Tensor]:
        return model.encode(clip, caption)

    def found(self, clip: Clip) -> dict:
        """What else its record says, now that it is read."""
        return {}

    def notes(self, clip: Clip) -> tuple[str, ...]:
        return clip.notes


def decode_into(formats: dict, path: Path, read: Callable) -> tuple[Bucket | None, Clip]:
    """What `read(path, clip format)` gives, in the bucket that fits; None where there is one."""
    if None in formats:
        return None, read(path, formats[None])
    return read_into(path, formats, read)


def decode_clip(
    path: Path, clip_format, sound: Path | None = None, require_sound: bool = True
) -> Clip:
    return read_clip(
        path,
        seconds=clip_format.seconds,
        fps=clip_format.fps,
        size=(clip_format.height, clip_format.width),
        sample_rate=clip_format.sample_rate,
        channels=clip_format.channels,
        require_sound=require_sound,
        sound=sound,
    )


def file_name(source: str) -> str:
    """Readable and unique: the source's stem, and a hash of its whole relative path."""
    stem = "".join(c if c.isalnum() else "-" for c in Path(source).stem)[:40]
    return f"{stem}-{hashlib.blake2b(source.encode(), digest_size=6).hexdigest()}.safetensors"
