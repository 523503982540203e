"""How many pictures of a file can be decoded, of those that can be expected."""

import math

from syncdpo.data.container import Refused

_LOST = 0.01  # share of pictures that may fail to decode


class Tally:
    """Pictures given to the decoder, and those that came of them.

    packets, failed: of pictures, read and refused by the decoder. interlaced: whether any was.
    """

    def __init__(self):
        self.sent: list[float] = []  # when they are shown
        self.decoded: list[float] = []
        self.packets = self.failed = 0
        self.interlaced = False

    def packet(self, packet, *, wanted: bool) -> None:
        """Pictures that are to come, from the first that can be decoded by itself; none comes of
        what an edit list hides, nor of the frames that VP8 only refers to."""
        self.packets += 1
        if not wanted or packet.is_discard or packet.pts is None:
            return
        hidden = packet.stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10
        if not hidden and (packet.is_keyframe or self.sent):
            self.sent.append(float(packet.pts * packet.time_base))

    def picture(self, frame) -> None:
        if frame.pts is not None:
            self.decoded.append(float(frame.pts * frame.time_base))
        self.interlaced |= bool(frame.interlaced_frame)

    def check(self, *, stopped: bool) -> None:
        """Refuses a file of which too few came. stopped: some that were sent are not wanted."""
        # Decoders give frames in the order shown, so all from before the last of them have come.
        # Before the first there may be some that refer to what was cut off.
        first = min(self.decoded, default=-math.inf)
        last = max(self.decoded, default=math.inf) if stopped else math.inf
        wanted = sum(first <= time < last for time in self.sent)
        lost = wanted - sum(time < last for time in self.decoded)
        # Interlaced pictures may come as two fields, a packet each.
        few = lost > _LOST * wanted and not (self.interlaced and lost <= 0.55 * wanted)
        if few or self.failed:
            raise Refused(f"damaged or truncated: {max(lost, self.failed)} of {wanted} pictures "
                          "could not be decoded")  # fmt: skip
