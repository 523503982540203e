"""Files that are whole or not there, and JSON that is the same bytes for the same value."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


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
