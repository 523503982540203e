"""The sound of a file, by itself: of sound alone, or of a film whose pictures do not matter.

Time begins with its first sample. All else is as in `syncdpo.data.decoding`.
"""

import math
from pathlib import Path

from torch import Tensor

from syncdpo.data.container import WORDS, Refused, open_file, packets_of, promised_end
from syncdpo.data.decoding import AHEAD, TRUNCATED, from_file, joined_sound
from syncdpo.data.sound import Sound, samples_of
from syncdpo.data.stamps import Stamps
from syncdpo.data.tracks import choose_sound
from syncdpo.data.wholeness import fault

# Sound without a container: how long it is, FFmpeg guesses from the bit rate.
_GUESSED_LENGTHS = {"aac", "ac3", "eac3", "mp3"}


def decode_sound(path: Path, seconds: float) -> tuple[Tensor, int]:
    """([C,N], sample rate): `seconds` of a file's sound from its first sample on, or all of it.

    The file may hold sound alone, of any kind that FFmpeg reads. Raises ClipError.
    """
    return from_file(path, lambda path: _decode_sound(path, seconds))


def _decode_sound(path: Path, seconds: float) -> tuple[Tensor, int]:
    with open_file(path, {}) as container:
        stream = choose_sound(container)
        sounds, limit = None, math.inf
        for packet in packets_of(container, stream):
            for frame in packet.decode():
                start, end, _ = next(Stamps(0.0).sound(frame))
                if sounds is None:
                    sounds, limit = Sound(frame.sample_rate), start + seconds
                samples = samples_of(frame, sounds.sample_rate)
                if not samples.isfinite().all():
                    raise Refused(f"its sound is NaN or infinite at {start:.2f} s of the file")
                sounds.append(start, samples)
            if sounds is not None and start > limit + AHEAD:
                break
        else:
            if sounds is None:
                raise Refused(f"no {WORDS['audio']} (the stream is empty)")
            _check_whole(path, container, stream, end)
    origin = next((stamp for stamp in sounds.stamps if math.isfinite(stamp)), 0.0)
    length = sum(chunk.shape[1] for chunk in sounds.chunks) / sounds.sample_rate
    return joined_sound(sounds, origin, min(seconds, length)), sounds.sample_rate


def _check_whole(path: Path, container, stream, end: float) -> None:
    """Refuses a file that ends sooner than it says."""
    reason = fault(path, container.format.name)
    if reason is not None:
        raise Refused(reason)
    promised = None if container.format.name in _GUESSED_LENGTHS else promised_end(stream)
    if promised is not None and end < promised - TRUNCATED:
        raise Refused(f"truncated: its sound ends at {end:.2f} s of {promised:.2f} s")
