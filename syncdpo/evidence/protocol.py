"""What is compared, on what, and how each method's settings are found, fixed before any of it runs.

docs/evidence.md says the same in sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

from syncdpo.data.families import FAMILIES, OUT_OF_DISTRIBUTION
from syncdpo.demo.search import BEGIN

# First seeds of clips by what they are for; seed s of the comparison begins 100,000 · s later.
FIRST_SEEDS = {"training": 21_000_000, "validation": 22_000_000, "measured": 23_000_000}
APART = 100_000
# Training clips are in step as footage is: within 60 ms, by the standard deviation.
OFFSET_SPREADS = {"training": 0.06, "validation": 0.0, "measured": 0.0}
TRAINED = tuple(FAMILIES)
FAMILIES_OF = {
    "training": TRAINED,
    "validation": TRAINED,
    "measured": (*TRAINED, *OUT_OF_DISTRIBUTION),
}


@dataclass(frozen=True)
class Method:
    """A line of the table. settings: its own, as `TrainConfig` has them; the rest is searched."""

    label: str
    settings: dict


# Losers and curriculum of SyncDPO, ours and the paper's; what differs is who is matched.
SYNCDPO = {"method": "syncdpo", "rules": "replace+scale", "curriculum": "linear"}
METHODS = {
    "base": Method("base", {}),
    "sft": Method("SFT, equal steps", {"method": "sft"}),
    "sft-equal-time": Method("SFT, equal time", {"method": "sft"}),
    "dpo": Method("DPO of ranked samples", {"method": "dpo"}),
    "syncdpo-paper": Method("SyncDPO, plain pairs", SYNCDPO | {"matched": 0.0}),
    "syncdpo": Method("SyncDPO", SYNCDPO | {"matched": 0.75}),
    "syncdpo-tenth": Method("SyncDPO, a tenth of DPO's time", SYNCDPO | {"matched": 0.75}),
}
SEARCHED = ("sft", "dpo", "syncdpo-paper", "syncdpo")  # for as many steps; then sft-equal-time
# Tried for whoever compares pairs, at its best weights and learning rate: the winner's own error.
SFT_WEIGHTS = (0.0, 1.0, 3.0)
# What DPO's samples may be ranked by.
RANKED_BY = ("onset_error_ms", "f1")
# One at a time, beside `METHODS["syncdpo"]` as it was settled.
QUESTIONS = {
    "curriculum": ("constant", "linear", "stages", "adaptive"),
    "matched": (0.0, 0.5, 0.75, 1.0),
    "rules": ("replace", "scale", "shift", "warp", "replace+scale"),
}


@dataclass(frozen=True)
class Protocol:
    """How much of it.

    clips, validated, measured: of each family, for each seed. own: clips of the models' own.
    ranked: samples of each training clip's picture, for DPO. places: of learning rates that a
    search begins with (see `syncdpo.demo.search`); bracketed: whether it goes on beyond them.
    """

    seeds: int = 3
    clips: int = 64
    validated: int = 16
    measured: int = 32
    own: int = 64
    steps: int = 120
    ranked: int = 4
    sampling_steps: int = 40
    places: tuple[int, ...] = BEGIN
    bracketed: bool = True
    sft_weights: tuple[float, ...] = SFT_WEIGHTS

    def count(self, kind: str) -> int:
        """Clips of each family."""
        return {"training": self.clips, "validation": self.validated, "measured": self.measured}[
            kind
        ]


FULL = Protocol()
# Every part of it, in a minute or two: it shows that all runs, and nothing else.
QUICK = Protocol(
    seeds=1,
    clips=4,
    validated=1,
    measured=1,
    own=1,
    steps=2,
    ranked=2,
    sampling_steps=2,
    places=(6,),
    bracketed=False,
    sft_weights=(1.0, 3.0),
)
