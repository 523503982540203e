"""A media file as a container gives it: opened, packet by packet, or refused."""

from collections.abc import Iterator
from pathlib import Path

import av

# Of each kind of stream, in sentences about a file.
WORDS = {"video": "pictures", "audio": "sound"}


class Refused(Exception):
    """A reason to refuse the file at hand."""


def open_file(path: Path, options: dict[str, str]):
    # The protocol is named, or a colon in the file's name would seem to end one.
    return av.open(f"file:{path}", options=options, metadata_errors="ignore")


def promised_end(stream) -> float | None:
    """When a stream ends in s on the file's axis, as its header says; None where it does not."""
    if stream.duration is None:
        return None
    return float((stream.duration + (stream.start_time or 0)) * stream.time_base)


def packets_of(container, *streams) -> Iterator:
    """Packets in the file's order; in the end one without data for each stream."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except IndexError as error:  # PyAV looks for it among those known at the beginning
            raise Refused("damaged: a stream of it begins in the middle") from error
        if packet is None:
            return
        yield packet
