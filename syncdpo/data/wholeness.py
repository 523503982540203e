"""Whether a file is whole, told by its own structure.

A recording that was cut off decodes without complaint up to its end, and live containers have no
header that knows how long they should be. But each is a chain of elements that say how long they
are, and the last of them then reaches beyond the file. A file that ends where an element does is a
whole one, as far as anyone can tell. Matroska's demuxer also skips what it cannot make sense of,
and with it pictures and sound; there the chain breaks, or a checksum tells.
"""

import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

_UNKNOWN = -1
# Matroska's elements. Of those of unknown length the members are looked at instead.
_SEGMENT, _CLUSTER, _CHECKSUM = 0x18538067, 0x1F43B675, 0xBF
_TS_PACKETS = (188, 192, 204)  # plain, with a time code, with error correction
_TS_SYNC = 0x47


def fault(path: Path, format_name: str) -> str | None:
    """What keeps the file from being whole; None where nothing does or the format does not tell."""
    families = {"matroska": _matroska, "avi": _avi, "flv": _flv, "mpegts": _mpegts, "mov": _mov,
                "wav": _wav}  # fmt: skip
    walk = families.get(format_name.split(",")[0])
    if walk is None:
        return None
    with path.open("rb") as file:
        return walk(file, path.stat().st_size)


def _ends_in(what: str) -> str:
    return f"truncated: it ends in the middle of {what}"


def _matroska(file: BinaryIO, size: int) -> str | None:
    at = 0
    while at < size:
        number, length, body = _element(file, at)
        if body is None:
            # Damage, which is the decoder's to judge, or an end within these few bytes.
            return _ends_in("an element") if size - at < 12 else None
        if number == _SEGMENT and length != _UNKNOWN and body + length > size:
            return _ends_in("its segment")
        if number == _SEGMENT or length == _UNKNOWN:
            at = body
            continue
        at = body + length
        if at > size:
            return _ends_in("a cluster" if number == _CLUSTER else "a packet or another element")
        if number == _CLUSTER and not _is_sound(file, body, at):
            return f"damaged: the cluster that ends at byte {at} has lost some of its packets"
    return None


def _is_sound(file: BinaryIO, at: int, end: int) -> bool:
    """Whether a cluster's members fill it exactly, and have its checksum where it gives one."""
    number, length, body = _element(file, at)
    if (number, length) == (_CHECKSUM, 4) and body is not None:
        file.seek(body)
        data = file.read(end - body)
        if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
            return False
    while at < end:
        _, length, body = _element(file, at)
        if body is None or length == _UNKNOWN:
            return False
        at = body + length
    return at == end


def _element(file: BinaryIO, at: int) -> tuple[int, int, int | None]:
    """(number, length, where its body begins) of a Matroska element; None where there is none."""
    file.seek(at)
    header = file.read(12)
    number, used = _ebml(header, keep_marker=True)
    length, more = _ebml(header[used:], keep_marker=False)
    return number, length, at + used + more if used and more else None


def _ebml(data: bytes, *, keep_marker: bool) -> tuple[int, int]:
    """(value, bytes used) of a number of 1 to 8 bytes; (0, 0) where there is none."""
    if not data or not data[0]:
        return 0, 0
    used = 9 - data[0].bit_length()
    if len(data) < used:
        return 0, 0
    value = int.from_bytes(data[:used], "big")
    if keep_marker:
        return value, used
    value &= (1 << 7 * used) - 1
    return (_UNKNOWN if value == (1 << 7 * used) - 1 else value), used


def _avi(file: BinaryIO, size: int) -> str | None:
    """Lists in RIFF, of which files beyond 1 GiB have several."""
    at = 0
    while at + 12 <= size:
        file.seek(at)
        header = file.read(8)
        if header[:4] != b"RIFF":
            return None
        at += 8 + int.from_bytes(header[4:], "little")
    return _ends_in("a list") if at > size + 1 else None  # an odd length is padded, or not


def _wav(file: BinaryIO, size: int) -> str | None:
    """One list in RIFF; of a recording that was piped its length is not known."""
    file.seek(4)
    unknown = file.read(4) in (bytes(4), b"\xff" * 4)
    return None if unknown else _avi(file, size)


def _flv(file: BinaryIO, size: int) -> str | None:
    file.seek(5)
    at = int.from_bytes(file.read(4), "big") + 4
    while at < size:
        file.seek(at)
        header = file.read(11)
        if len(header) < 11:
            return _ends_in("a packet")
        at += 11 + int.from_bytes(header[1:4], "big") + 4
    # Some writers leave out the last one's length, 4 bytes.
    return _ends_in("a packet") if at > size + 4 else None


def _mpegts(file: BinaryIO, size: int) -> str | None:
    head = file.read(4 * max(_TS_PACKETS))
    for length in _TS_PACKETS:
        first = 4 if length == 192 else 0
        if set(head[first : first + 3 * length : length]) == {_TS_SYNC}:
            return _ends_in("a packet") if size % length else None
    return None


def _mov(file: BinaryIO, size: int) -> str | None:
    at = 0
    while at < size:
        file.seek(at)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # to the end of the file
            return None
        if length < 8:
            return None
        at += length
    return _ends_in("a box") if at > size else None


def pictures_begun(path: Path, number: int) -> int:
    """How many packets of a transport stream begin a picture of the stream with that number (PID).

    0 where packets are not plain ones.
    """
    data = np.memmap(path, np.uint8, "r")
    packets = data[: len(data) // _TS_PACKETS[0] * _TS_PACKETS[0]].reshape(-1, _TS_PACKETS[0])
    if not len(packets) or (packets[:, 0] == _TS_SYNC).mean() < 0.5:
        return 0
    stream = (packets[:, 1].astype(int) & 0x1F) << 8 | packets[:, 2]
    begins = packets[:, 1] & 0x40 > 0
    return int(np.count_nonzero((stream == number) & begins & (packets[:, 0] == _TS_SYNC)))
