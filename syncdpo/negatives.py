"""Negatives: from synchronised clips to pairs of a winner and a loser that differ in timing.

Two kinds of pairs, φ being one rule's distortions (φ₁ and φ₂ are exchangeable):

    plain      winner (video, audio)          loser (video, φ audio)
    matched    winner (φ₁ video, φ₁ audio)    loser (φ₁ video, φ₂ audio)

In a plain pair the audio alone tells the loser, by whatever traces φ leaves; in a matched pair
only the timing between picture and sound does. The plain pairs are SyncDPO's (arXiv 2605.12179),
the matched ones this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from syncdpo.distortion import Distortion
from syncdpo.ops._checks import check_choice
from syncdpo.rules import Mixture, Replace, Rule, Scale, Shift, Warp, parse_rule, per_sample
from syncdpo.timeline import Timeline

__all__ = [
    "Mixture",
    "PairDraw",
    "Pairs",
    "Replace",
    "Rule",
    "Scale",
    "Shift",
    "Warp",
    "draw_pairs",
    "make_pairs",
    "parse_rule",
]

# Winner and loser that differ by less than this share of the winner's size count as the same.
SAME = 0.01
# ... and so do streams that differ by less than this at all: silence with its last-bit noise.
SILENT = 1e-4


class Pairs(NamedTuple):
    """Winners and losers, (video, audio) each, and what tells about them, [B].

    `rule` int64 indexes `RULES`; `strength` is the largest displacement between winner and loser
    in seconds; where `valid` is false both came out the same and the pair must not count.
    """

    win: tuple[Tensor, Tensor]
    lose: tuple[Tensor, Tensor]
    rule: Tensor
    strength: Tensor
    difficulty: Tensor
    matched: Tensor
    valid: Tensor


@dataclass(frozen=True)
class PairDraw:
    """Everything random about pairs, drawn before any clip is seen; [N], indexed by sample.

    Drawn once for many clips, or on one process for all, a pair does not depend on its batch.
    """

    first: Distortion
    second: Distortion
    matched: Tensor
    difficulty: Tensor
    timelines: tuple[Timeline, Timeline]
    distorted: int

    def __getitem__(self, samples: Tensor | slice) -> PairDraw:
        return replace(
            self,
            first=self.first[samples],
            second=self.second[samples],
            matched=self.matched[samples],
            difficulty=self.difficulty[samples],
        )

    def make(self, video: Tensor, audio: Tensor) -> Pairs:
        """The pairs of these clips, [N, ...] latents or raw media, in step with each other."""
        media = (video, audio)
        win = tuple(map(self.first.apply, media, self.timelines))
        own = self.distorted
        lose = list(win)
        lose[own] = self.second.apply(media[own], self.timelines[own])
        return Pairs(
            win=win,
            lose=tuple(lose),
            rule=self.second.rule,
            strength=_apart(self.first, self.second),
            difficulty=self.difficulty,
            matched=self.matched,
            valid=_differ(win[own], lose[own]),
        )


def draw_pairs(
    batch: int,
    rule: Rule,
    difficulty: float | Tensor,
    *,
    video_timeline: Timeline,
    audio_timeline: Timeline,
    matched: float = 0.5,
    streams: str = "audio",
    generator: Generator | None = None,
    device: torch.device | str | None = None,
) -> PairDraw:
    """Draw what makes `batch` pairs, for clips of these timelines; options as in `make_pairs`."""
    check_choice("streams", streams, ("audio", "video"))
    if not 0 <= matched <= 1:
        raise ValueError(f"matched: expected a share in [0, 1], got {matched}")
    timelines = (video_timeline, audio_timeline)
    distorted = ("video", "audio").index(streams)
    own, shared = timelines[distorted], min(timelines, key=lambda timeline: timeline.rate)
    duration = min(timeline.duration for timeline in timelines)

    is_matched = _chances(batch, device, generator) < matched
    difficulty = per_sample("difficulty", difficulty, is_matched)
    grain = torch.where(is_matched, 1 / shared.rate, 1 / own.rate)
    first, second = (
        distortion.aligned(own, shared, is_matched)
        for distortion in rule.draw_pair(
            is_matched, difficulty, duration, grain=grain, generator=generator
        )
    )
    if matched == 0:  # known without looking at a device: the winners are the clips themselves
        first = replace(first, warps=False, replaces=False)
    return PairDraw(first, second, is_matched, difficulty, timelines, distorted)


def make_pairs(
    video: Tensor,
    audio: Tensor,
    rule: Rule,
    difficulty: float | Tensor,
    *,
    video_timeline: Timeline,
    audio_timeline: Timeline,
    matched: float = 0.5,
    streams: str = "audio",
    generator: Generator | None = None,
) -> Pairs:
    """Make a loser for each synchronised clip, and of a share of the winners a matched one.

    Args:
        video, audio: [B, ...] latents or raw media, in step with each other.
        rule: which distortions to draw.
        difficulty: 0 coarse to 1 subtle; a number or [B].
        matched: the share of matched pairs, drawn for each sample.
        streams: the stream that the loser has distorted by φ₂, "audio" or "video".
        generator: the source of all random numbers.

    Raises:
        ValueError: an option or a shape that does not fit.
    """
    if video.shape[0] != audio.shape[0] or video.device != audio.device:
        raise ValueError(
            f"video and audio: expected one batch on one device, got {video.shape[0]} on "
            f"{video.device} and {audio.shape[0]} on {audio.device}"
        )
    draw = draw_pairs(
        video.shape[0],
        rule,
        difficulty,
        video_timeline=video_timeline,
        audio_timeline=audio_timeline,
        matched=matched,
        streams=streams,
        generator=generator,
        device=video.device,
    )
    return draw.make(video, audio)


def _chances(batch: int, device: torch.device | str | None, generator: Generator | None) -> Tensor:
    origin = device if generator is None else generator.device
    return torch.rand(batch, generator=generator, device=origin).to(device)


def _apart(first: Distortion, second: Distortion) -> Tensor:
    """The largest displacement between two distortions of the same samples, [B] seconds."""
    warped = (second.knots - first.knots).abs().amax(1)
    return warped.maximum((second.donor_start - first.donor_start).abs())


def _differ(win: Tensor, lose: Tensor) -> Tensor:
    """Where a pair differs by more than rounding, codec noise or the ripple of a hum, [B] bool."""
    size = win.float().flatten(1).square().mean(1).sqrt()
    difference = (lose.float() - win.float()).flatten(1).square().mean(1).sqrt()
    return difference > SAME * size + SILENT
