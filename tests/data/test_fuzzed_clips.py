"""Corrupted files are refused by a sentence or read in step; none crashes the reader or hangs it.

300 corruptions, of single bytes and of blocks, half of them where a file's tables are. They are
read in a process of their own, which a crash of a decoder would end without a word.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from odd_clips import EVENTS, film, instants, write
from processes import PYTHONPATH

from syncdpo.data.decoding import ClipError

KINDS = {
    "mp4": {"options": {"bf": "2"}},
    "mkv": {},
    "webm": {"codec": "libvpx", "audio": "libopus"},
    "avi": {"codec": "mpeg4", "audio": "libmp3lame"},
    "ts": {},
}
COUNT = 60  # of each kind
SLOW = 10.0  # s that no file may take
# Decoders without checksums turn damage into noise, which blurs when a burst begins; a lost packet
# or picture, or a table that is off, moves all that comes after by 21 ms or more.
BLUR = 0.02


def corrupted(data: bytes, kind: str, seed: int) -> bytes:
    """A byte or a block of noise, every other time where the file's tables are."""
    dice, spoilt = random.Random(seed), bytearray(data)
    first, last = 0, len(data)
    if seed % 2:
        first, last = (data.index(b"moov"), last) if kind == "mp4" else (0, 1500)
    at = dice.randrange(first, last)
    length = min(dice.choice([1, 1, 1, 4, 16, 64, 512]), last - at)
    spoilt[at : at + length] = dice.randbytes(length)
    return bytes(spoilt)


def verdict(path: Path) -> str:
    start = time.monotonic()
    try:
        seen, heard, _ = instants(path)
    except ClipError as error:
        return f"refused {error.reason}"
    if (seconds := time.monotonic() - start) > SLOW:
        return f"slow {seconds:.1f} s"
    # Damage may lose or make a flash or a burst; those that are each other's nearest are to be one.
    apart = np.abs(seen[:, None] - heard) if len(seen) and len(heard) else np.zeros((0, 0))
    for row in range(len(apart)):
        column = apart[row].argmin()
        mutual = apart[:, column].argmin() == row and apart[row, column] < 0.3
        if mutual and apart[row, column] > BLUR:
            return f"mistimed {seen} {heard}"
    return "read"


def test_corrupted_files_are_refused_or_in_step(tmp_path):
    given = film(seconds=2.0, size=(32, 32), events=EVENTS[:2])
    for kind, options in KINDS.items():
        data = write(tmp_path / f"whole.{kind}", given, **options).read_bytes()
        (tmp_path / "corrupted").mkdir(exist_ok=True)
        for seed in range(COUNT):
            path = tmp_path / "corrupted" / f"{seed:02}.{kind}"
            path.write_bytes(corrupted(data, kind, seed))
    reading = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "corrupted")],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    lines = dict(line.split(" ", 1) for line in reading.stdout.splitlines())
    assert reading.returncode == 0, f"{reading.stdout[-200:]}\n{reading.stderr[-2000:]}"
    assert len(lines) == COUNT * len(KINDS)
    ends = {name: line.split()[0] for name, line in lines.items()}
    assert not {name: lines[name] for name, end in ends.items() if end in ("mistimed", "slow")}
    # Neither all is refused, nor is all read.
    for kind in KINDS:
        found = {end for name, end in ends.items() if name.endswith(kind)}
        assert found == {"read", "refused"}, kind


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).iterdir()):
        print(file.name, verdict(file), flush=True)
