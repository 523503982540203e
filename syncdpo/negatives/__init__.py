"""Losers made from winners: what is wrong with their timing, how much, and in what frames.

A rule (`rules`) draws distortions (`distortion`) for a difficulty that rises along a `curriculum`,
in seconds; a `Timeline` says which frames of a stream those are; `pairs` makes winners and losers
of them, from latents or raw media. `waveforms` distorts sound before it is encoded, and `probe`
asks whether a rule can be told by the sound alone. Needs torch alone.
"""

from .distortion import Distortion
from .pairs import PairDraw, Pairs, draw_pairs, given_pairs, make_pairs
from .rules import Mixture, Replace, Rule, Scale, Shift, Warp, parse_rule
from .timeline import Timeline
from .waveforms import distort_source, warp_keeping_pitch

__all__ = [
    "Distortion",
    "Mixture",
    "PairDraw",
    "Pairs",
    "Replace",
    "Rule",
    "Scale",
    "Shift",
    "Timeline",
    "Warp",
    "distort_source",
    "draw_pairs",
    "given_pairs",
    "make_pairs",
    "parse_rule",
    "warp_keeping_pitch",
]
