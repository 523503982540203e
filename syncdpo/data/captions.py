"""Captions of a folder of clips: from a table (csv, jsonl, json) or a .txt beside each clip."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from pathlib import Path

from syncdpo.data.files import files_below, readable, reasons

PATH_COLUMNS = ("media_path", "video_path", "file_name", "video", "path", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")
TABLES = (".csv", ".jsonl", ".json")
SOUND_COLUMN = "audio"  # as ltx-trainer names it: a file whose sound stands in for the clip's own

# UTF-32's first: the little-endian one begins as UTF-16's does.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NO_TEXT = "neither UTF-8 nor UTF-16 nor Windows-1252; save it as UTF-8"


class Captions(dict[str, str]):
    """{clip: caption}, `sounds`, {clip: file} where the table names one for its sound, and `notes`:
    what was guessed or left out on the way, (file, sentence)."""

    def __init__(self):
        super().__init__()
        self.sounds: dict[str, Path] = {}
        self.notes: list[tuple[Path, str]] = []

    def __str__(self) -> str:
        """The notes, as lines; nothing where all is well."""
        return "\n".join(["captions:", *reasons(self.notes)]) if self.notes else ""


def read_captions(folder: str | Path, table: str | Path | None = None) -> Captions:
    """{clip, as a POSIX path relative to `folder`: caption}.

    With `table`, one row per clip: its path under one of `PATH_COLUMNS` (absolute, or relative to
    `folder` or to the table) and its caption under one of `CAPTION_COLUMNS`; csv by its header
    line, jsonl or a json list by its keys; lines end at line feeds only. Where a column `audio`
    holds text, it is the path of a file whose sound stands in the place of the clip's own. Without
    a table, `name.txt` beside `name.mp4`: such files are keyed by the clip's path *without* its
    extension, which `caption_of` understands.

    Text is UTF-8 or what its byte order mark says. Without a mark, many zero bytes make it UTF-16,
    and what is no UTF-8 is read as Windows-1252; either guess is noted. A .txt that is none of
    these is noted and left out.

    Raises ValueError where the table has no such column, is of another kind or no text,
    NotADirectoryError where there is no such folder.
    """
    folder = Path(folder)
    if table is not None:
        return _from_table(folder, Path(table))
    captions = Captions()
    for path in files_below(folder, {".txt"})[0]:
        try:
            text, guess = decode_text(path.read_bytes())
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else NO_TEXT
            captions.notes.append((path, f"left out: {reason}"))
            continue
        if guess:
            captions.notes.append((path, guess))
        captions[path.relative_to(folder).with_suffix("").as_posix()] = text.strip()
    return captions


def caption_of(source: str, captions: dict[str, str]) -> str | None:
    """The caption of the clip `source` (POSIX path relative to the folder), or None."""
    found = captions.get(source)
    return found if found is not None else captions.get(source.rpartition(".")[0])


def with_trigger(trigger: str | None, caption: str) -> str:
    """The caption behind the word that is to call up what is learnt, if there is such a word."""
    return caption if trigger is None else f"{trigger} {caption}".strip()


def decode_text(content: bytes) -> tuple[str, str | None]:
    """(text, a sentence where its encoding was guessed). Raises UnicodeError where it is none."""
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding), None
    if content and content.count(0) >= len(content) / 4:
        # Most text has its zeros in the high bytes.
        low_first = content[1::2].count(0) >= content[::2].count(0)
        encoding = "utf-16-le" if low_first else "utf-16-be"
        return content.decode(encoding), "no byte order mark, read as UTF-16"
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError:
        return content.decode("cp1252"), "not UTF-8, read as Windows-1252"


# --- tables ---------------------------------------------------------------------------------------


def caption_lines(path: Path) -> tuple[list[str], str | None]:
    """(captions, note): one of each line that holds text; lines end at line feeds only.

    note: how it was read, where that is a guess. Raises ValueError where there is no text.
    """
    try:
        text, guess = decode_text(path.read_bytes())
    except UnicodeError as error:
        raise ValueError(f"captions: {path} is {NO_TEXT}") from error
    texts = [line.strip() for line in text.split("\n") if line.strip()]
    if not texts:
        raise ValueError(f"captions: expected a caption on each line, got none in {path}")
    return texts, guess


def listed_captions(path: Path) -> tuple[list[str], str | None]:
    """`caption_lines` of a text file; of a table (csv, jsonl, json) its rows' captions.

    Raises ValueError where there is none.
    """
    if path.suffix.lower() not in TABLES:
        return caption_lines(path)
    try:
        text, guess = decode_text(path.read_bytes())
    except UnicodeError as error:
        raise ValueError(f"captions: {path} is {NO_TEXT}") from error
    rows = table_rows(path, text)
    found = [_column(row, CAPTION_COLUMNS, path, number) for number, row in enumerate(rows, 1)]
    texts = [caption.strip() for caption in found if caption.strip()]
    if not texts:
        raise ValueError(f"captions: expected a caption in each row, got none in {path}")
    return texts, guess


def _from_table(folder: Path, table: Path) -> Captions:
    captions = Captions()
    try:
        text, guess = decode_text(table.read_bytes())
    except UnicodeError as error:
        raise ValueError(f"captions: {readable(table)} is {NO_TEXT}") from error
    if guess:
        captions.notes.append((table, guess))
    nameless = broken = 0
    for number, row in enumerate(table_rows(table, text), start=1):
        path = _column(row, PATH_COLUMNS, table, number)
        caption = _column(row, CAPTION_COLUMNS, table, number).strip()
        if not path.strip():
            nameless += 1
            continue
        # Half of a surrogate pair, as JSON may escape one: no text that could be encoded.
        whole = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        broken += whole != caption
        clip = _relative(path, folder, table.parent)
        captions[clip] = whole
        sound = row.get(SOUND_COLUMN)
        if isinstance(sound, str) and sound.strip():
            captions.sounds[clip] = _sound(sound.strip(), folder, table.parent)
    if nameless:
        captions.notes.append((table, f"rows that name no clip, left out: {nameless}"))
    if broken:
        captions.notes.append((table, f"captions with broken characters, now \ufffd: {broken}"))
    return captions


def table_rows(table: Path, text: str, argument: str = "captions") -> list[dict]:
    """The rows of a table's text; `argument` is what an error calls the table."""
    kind = table.suffix.lower()
    if kind not in TABLES:
        raise ValueError(
            f"{argument}: expected a .csv, .jsonl or .json file, got {readable(table)}"
        )
    try:
        if kind == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="\n")))
        if kind == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        name = "CSV" if kind == ".csv" else "JSON"
        raise ValueError(f"{argument}: {readable(table)} is not valid {name}: {error}") from error
    listed = isinstance(rows, list)
    wrong = [row for row in rows if not isinstance(row, dict)] if listed else [rows]
    if wrong:
        got = type(wrong[0]).__name__
        raise ValueError(f"{argument}: expected one object per row in {readable(table)}, got {got}")
    return rows


def _column(row: dict, names: tuple[str, ...], table: Path, number: int) -> str:
    """The first of the columns that holds text; a column that is there and holds none is empty."""
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    if names is CAPTION_COLUMNS and any(name in row and row[name] is None for name in names):
        return ""
    raise ValueError(
        f"captions: expected one of the columns {', '.join(names)} in {readable(table)}, "
        f"got {', '.join(map(str, row))} in row {number}"
    )


def _relative(path: str, folder: Path, beside: Path) -> str:
    """`path` as seen from `folder`, wherever the table meant it from."""
    for base in (folder, beside):
        # By its name first: a linked folder's clips are known by the name of the link.
        for found in (os.path.abspath, os.path.realpath):
            try:
                candidate, root = Path(found(base / path)), Path(found(folder))
                if candidate.exists() and candidate.is_relative_to(root):
                    return candidate.relative_to(root).as_posix()
            except (OSError, ValueError):  # too long for a name, or no name at all
                continue
    return Path(path).as_posix()


def _sound(path: str, folder: Path, beside: Path) -> Path:
    """Where the table meant it; where it is in neither folder, it will be missed in the first."""
    places = [base / path for base in (folder, beside)]
    return next((place for place in places if place.is_file()), places[0])
