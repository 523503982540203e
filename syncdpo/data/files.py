"""Files that are whole or not there, JSON that is the same bytes for the same value, folders with
all that is in them, and names that can be shown."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from unicodedata import category

MANY = 3  # files with one reason that a summary puts together
NAMED = 50  # of them that it names; the rest are counted
NUMBER = re.compile(r"\d+(\.\d+)?")


def write_atomic(path: str | Path, content: bytes) -> None:
    """Writes `content` under `path`, whole or not at all, whatever happens to process or disk.

    A killed process may leave `.<name>.<pid>.tmp` beside it (see `remove_leftovers`).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    try:
        os.replace(temporary, path)
    except FileNotFoundError:  # another process took it for a leftover
        return write_atomic(path, content)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what `write_atomic` left in `folder` when its process was killed.

    Files that other processes are writing this moment may go too; they write them again.
    """
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def canonical_json(value, indent: int | None = None) -> str:
    """JSON with sorted keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent)


def digest(value) -> str:
    """16 hexadecimal digits of the SHA-256 of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


# --- folders and names ----------------------------------------------------------------------------


def files_below(
    folder: str | Path, suffixes: Collection[str]
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """(files, left): all below `folder` with one of `suffixes` (lower case) in any case, sorted,
    and what cannot be read, each with its reason.

    Linked folders are entered, each folder once whatever links lead to it, so that no file comes
    twice and no circle of links is without end. Files whose names begin with a dot are neither.
    Raises NotADirectoryError where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"folder: expected a folder, got {folder}")
    files, left, seen = [], [], set()
    waiting, links = deque([folder]), deque()
    while waiting or links:  # links last: a folder is known by its name that is no link
        below = waiting.popleft() if waiting else links.popleft()
        real = below.resolve()
        if real in seen:
            left.append((below, f"the folder {readable(real)}, which is read under another name"))
            continue
        seen.add(real)
        try:
            for path in sorted(below.iterdir()):
                if path.is_dir():
                    (links if path.is_symlink() else waiting).append(path)
                elif path.suffix.lower() not in suffixes or path.name.startswith("."):
                    continue
                elif path.is_file():
                    files.append(path)
                else:
                    left.append((path, _no_file(path)))
        except OSError as error:
            left.append((below, f"a folder that cannot be opened ({error.strerror})"))
    return sorted(files), sorted(left)


def _no_file(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {readable(os.readlink(path))}, which is not there"
    return "not a file"


def readable(name: str | os.PathLike) -> str:
    r"""A file's name as text on one line: bytes that are no UTF-8 as \xe9, what controls a terminal
    or ends a line as Python writes it."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(ascii(c)[1:-1] if category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def unexpected(error: Exception) -> str:
    """A reason of one line, for a file that upset its reader in a way that it does not know."""
    return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"


def reasons(rows: Sequence[tuple[Path, str]]) -> list[str]:
    """Lines of a summary: `path: reason`; many files with one reason are one line and their names.

    Reasons that differ in their numbers, or in the file's own name, alone are one.
    """
    alike: dict[str, list[tuple[Path, str]]] = {}
    for path, reason in rows:
        shared = NUMBER.sub("…", reason.replace(path.name, "…"))
        alike.setdefault(shared, []).append((path, reason))
    lines = []
    for shared, group in alike.items():
        if len(group) < MANY:
            lines += [f"  {readable(path)}: {reason}" for path, reason in group]
            continue
        same = len({reason for _, reason in group}) == 1
        lines.append(f"  {len(group)} files: {group[0][1] if same else shared}")
        lines += [f"    {readable(path)}" for path, _ in group[:NAMED]]
        if len(group) > NAMED:
            lines.append(f"    and {len(group) - NAMED} more")
    return lines
