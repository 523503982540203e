"""Captions of a folder of clips: from a table (csv, jsonl, json) or a .txt beside each clip."""

from __future__ import annotations

import csv
import json
from pathlib import Path

PATH_COLUMNS = ("media_path", "video_path", "file_name", "video", "path", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")


def read_captions(folder: str | Path, table: str | Path | None = None) -> dict[str, str]:
    """{clip, as a POSIX path relative to `folder`: caption}.

    With `table`, one row per clip: its path under one of `PATH_COLUMNS` (absolute, or relative to
    `folder` or to the table) and its caption under one of `CAPTION_COLUMNS`; csv by its header
    line, jsonl or a json list by its keys. Without, `name.txt` beside `name.mp4`: such files are
    keyed by the clip's path *without* its extension, which `caption_of` understands.

    Raises ValueError where the table has no such column, or is of another kind.
    """
    folder = Path(folder)
    if table is None:
        return {
            path.relative_to(folder).with_suffix("").as_posix(): path.read_text("utf-8").strip()
            for path in sorted(folder.rglob("*.txt"))
        }
    table = Path(table)
    rows = _rows(table)
    captions = {}
    for number, row in enumerate(rows, start=1):
        path = _column(row, PATH_COLUMNS, table, number)
        captions[_relative(Path(path), folder, table.parent)] = _column(
            row, CAPTION_COLUMNS, table, number
        ).strip()
    return captions


def caption_of(source: str, captions: dict[str, str]) -> str | None:
    """The caption of the clip `source` (POSIX path relative to the folder), or None."""
    found = captions.get(source)
    return found if found is not None else captions.get(source.rpartition(".")[0])


def _rows(table: Path) -> list[dict]:
    text = table.read_text("utf-8-sig")
    kind = table.suffix.lower()
    if kind == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    try:
        if kind == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif kind == ".json":
            rows = json.loads(text)
        else:
            raise ValueError(f"captions: expected a .csv, .jsonl or .json file, got {table}")
    except json.JSONDecodeError as error:
        raise ValueError(f"captions: {table} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"captions: expected one object per clip in {table}")
    return rows


def _column(row: dict, names: tuple[str, ...], table: Path, number: int) -> str:
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    raise ValueError(
        f"captions: expected one of the columns {', '.join(names)} in {table}, "
        f"got {', '.join(map(str, row))} in row {number}"
    )


def _relative(path: Path, folder: Path, beside: Path) -> str:
    """`path` as seen from `folder`, wherever the table meant it from."""
    for base in (folder, beside):
        candidate = (base / path).resolve()
        if candidate.exists() and candidate.is_relative_to(folder.resolve()):
            return candidate.relative_to(folder.resolve()).as_posix()
    return path.as_posix()
