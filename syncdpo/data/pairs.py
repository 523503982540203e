"""Pairs of clips, one preferred over the other, from media files to the latents that `dpo` reads.

A cache of pairs is a latent cache (`latents`) with one file per pair: the winner's latents and the
text under their usual names, the loser's beside them as "video_lose" and "audio_lose". A stream
whose pictures or samples are the same in both clips, as where one picture has two sounds, is the
winner's in both and is stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from syncdpo.data.buckets import Bucket, choose
from syncdpo.data.captions import NO_TEXT, caption_of, decode_text, table_rows
from syncdpo.data.clips import Clip, ClipError, TooShort, find_clips
from syncdpo.data.decoding import shown_size
from syncdpo.data.files import readable, reasons
from syncdpo.data.items import Item, PrepareSummary, decode_clip, decode_into, file_name
from syncdpo.data.latents import LOSER, STREAMS, prepare_items

COLUMNS = ("win", "lose")  # of a table of pairs; "caption" may stand beside them


@dataclass(frozen=True)
class NamedPair:
    """Two files; what each is called: its path as its table or its folder has it."""

    win: Path
    lose: Path
    names: tuple[str, str]
    caption: str | None = None

    @property
    def name(self) -> str:
        win, lose = map(readable, self.names)
        return win if win == lose else f"{win} > {lose}"


@dataclass
class PairList:
    """Pairs to prepare, `left` out with reasons, and whether there are `captions` at all."""

    pairs: list[NamedPair] = field(default_factory=list)
    left: list[tuple[Path, str]] = field(default_factory=list)
    captions: bool = False
    notes: list[tuple[Path, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """What was guessed on the way; nothing where all is well."""
        return "\n".join(["pairs:", *reasons(self.notes)]) if self.notes else ""


class ClipPair(NamedTuple):
    win: Clip
    lose: Clip

    @property
    def shared(self) -> list[str]:
        """The streams in which both are the same."""
        return [s for s in STREAMS if torch.equal(getattr(self.win, s), getattr(self.lose, s))]


# --- which clips ----------------------------------------------------------------------------------


def read_pairs(table: str | Path) -> PairList:
    """The pairs of a csv with the columns `win` and `lose`, and `caption` if there is one.

    Paths are absolute or relative to the table. jsonl and json hold the same by their keys; text is
    read as that of captions is. Rows that lack a path, or name a pair again, are left out by name.
    Raises ValueError for a table of another kind, without these columns, or that is no text.
    """
    table = Path(table)
    try:
        text, guess = decode_text(table.read_bytes())
    except UnicodeError as error:
        raise ValueError(f"pairs: {readable(table)} is {NO_TEXT}") from error
    found, seen = PairList(), set()
    if guess:
        found.notes.append((table, guess))
    for number, row in enumerate(table_rows(table, text, "pairs"), start=1):
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(
                f"pairs: expected the columns win and lose in {readable(table)}, got "
                f"{', '.join(map(str, row))} in row {number}, without {' and '.join(missing)}"
            )
        names = tuple(str(row[name] or "").strip() for name in COLUMNS)
        found.captions |= "caption" in row
        caption = str(row["caption"] or "").strip() if "caption" in row else None
        if not all(names):
            found.left.append((table, f"row {number} names no winner or no loser"))
        elif names in seen:
            found.left.append((table, f"row {number} names {names[0]} and {names[1]} again"))
        else:
            seen.add(names)
            win, lose = (table.parent / name for name in names)
            found.pairs.append(NamedPair(win, lose, names, caption))
    return found


def match_folders(
    win: str | Path, lose: str | Path, captions: Mapping[str, str] | None = None
) -> PairList:
    """Clips of two folders that have the same path below them; others are left out by name.

    captions: {path below `win`: caption} (see `read_captions`); None where there are none.
    Raises ValueError where one of them is no folder.
    """
    paths, left = {}, []
    for side, folder in zip(COLUMNS, map(Path, (win, lose)), strict=True):
        if not folder.is_dir():
            raise ValueError(f"{side}: expected a folder of clips, got {folder}")
        clips, unread = find_clips(folder)
        paths[side] = {path.relative_to(folder).as_posix(): path for path in clips}
        left += unread
    for side, other, wanted in (("win", "lose", "loser"), ("lose", "win", "winner")):
        alone = paths[side].keys() - paths[other].keys()
        left += [(paths[side][name], f"no {wanted} of that name") for name in sorted(alone)]
    found = PairList(left=left, captions=captions is not None)
    for name in sorted(paths["win"].keys() & paths["lose"].keys()):
        caption = None if captions is None else caption_of(name, dict(captions))
        files = (paths[side][name] for side in COLUMNS)
        found.pairs.append(NamedPair(*files, (name, name), caption))
    return found


# --- the cache ------------------------------------------------------------------------------------


def prepare_pairs(
    model,
    pairs: PairList,
    out: str | Path,
    *,
    trigger: str | None = None,
    buckets: Sequence[Bucket] = (),
    strict: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> PrepareSummary:
    """Encodes both clips of every pair into the cache of pairs `out`, as `prepare` does clips.

    Both are read in one clip format: the model's own, or the bucket that fits the winner best of
    those that both fill. Only winners must have a sound and are looked at for faults (`strict`
    leaves such pairs out): what makes a loser one may be just that. A pair whose clips have the
    same pictures and the same sound is skipped.

    Options, resumption and errors are those of `prepare`. Raises ValueError, too, where there is no
    pair.
    """
    if not pairs.pairs:
        raise ValueError(
            "\n".join(["pairs: expected one at least, got none", *reasons(pairs.left)])
        )
    items = sorted((_item(pair, Path(out)) for pair in pairs.pairs), key=lambda item: item.source)
    return prepare_items(
        model,
        lambda: (items, pairs.left),
        out,
        captioned=pairs.captions,
        own={"pairs": True} | ({} if trigger is None else {"trigger": trigger}),
        buckets=buckets,
        strict=strict,
        shard=shard,
        progress=progress,
        unit="pairs",
    )


@dataclass(frozen=True)
class _PairItem(Item):
    """One pair to encode: `path` is its winner's."""

    lose: Path = Path()
    names: tuple[str, str] = ("", "")

    def is_there(self) -> bool:
        return self.path.is_file() and self.lose.is_file()

    def record(self, identity: str) -> dict:
        stat = self.lose.stat()
        win, lose = map(readable, self.names)
        return super().record(identity) | {
            "win": win,
            "lose": lose,
            "lose_bytes": stat.st_size,
            "lose_modified_ns": stat.st_mtime_ns,
        }

    def decode(self, formats: dict) -> tuple[Bucket | None, ClipPair]:
        bucket, win = decode_into(formats, self.path, decode_clip)
        try:
            lose = self._loser(formats[bucket])
        except TooShort as short:
            bucket = self._shorter(formats, short)
            win, lose = decode_clip(self.path, formats[bucket]), self._loser(formats[bucket])
        pair = ClipPair(win, lose)
        if len(pair.shared) == len(STREAMS):
            raise ClipError(self.path, f"its loser {self._shown} has the same pictures and sound")
        return bucket, pair

    def _shorter(self, formats: dict, short: TooShort) -> Bucket:
        """The bucket that the loser fills; the winner, which fills a longer one, does too."""
        fitting = None
        if None not in formats:
            fitting = choose(list(formats), short.seconds, shown_size(self.path))
        if fitting is None:
            raise self._blamed(short)
        return fitting

    def _loser(self, clip_format) -> Clip:
        try:
            return decode_clip(self.lose, clip_format, require_sound=False)
        except TooShort:
            raise
        except ClipError as error:
            raise self._blamed(error) from error

    def _blamed(self, error: ClipError) -> ClipError:
        return ClipError(self.path, f"its loser {self._shown}: {error.reason}")

    @property
    def _shown(self) -> str:
        return readable(self.names[1])

    def flags(self, pair: ClipPair) -> list[str]:
        return super().flags(pair.win)

    def encode(self, model, pair: ClipPair, caption: str) -> dict[str, Tensor]:
        tensors, loser = model.encode(pair.win, caption), model.encode(pair.lose, caption)
        own = (stream for stream in STREAMS if stream not in pair.shared)
        return tensors | {LOSER.format(stream): loser[stream] for stream in own}

    def found(self, pair: ClipPair) -> dict:
        return {"shared": pair.shared}

    def notes(self, pair: ClipPair) -> tuple[str, ...]:
        return pair.win.notes + tuple(f"its loser {self._shown}: {n}" for n in pair.lose.notes)


def _item(pair: NamedPair, out: Path) -> _PairItem:
    win, lose = map(readable, pair.names)
    target = out / "latents" / file_name(f"{lose}\n{win}")  # called as the winner's file
    return _PairItem(pair.win, pair.name, pair.caption, target, lose=pair.lose, names=pair.names)
