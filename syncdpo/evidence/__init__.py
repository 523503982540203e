"""The comparison, by a protocol: SFT, DPO of ranked samples, SyncDPO; four families and a fifth.

`protocol` says what is compared, on what, and how settings are found; `grounds` are the clips of a
seed, `trials` what is trained and measured on them, `comparison` goes through it all, and `tables`
is how it reads.
"""

from .comparison import compare
from .protocol import FULL, QUICK, Protocol

__all__ = ["FULL", "QUICK", "Protocol", "compare"]
