"""Negatives: from synchronised clips to pairs of a winner and a loser that differ in timing.

Two kinds of pairs, φ being one rule's distortions (φ₁ and φ₂ are exchangeable):

    plain      winner (video, audio)          loser (video, φ audio)
    matched    winner (φ₁ video, φ₁ audio)    loser (φ₁ video, φ₂ audio)

In a plain pair the audio alone tells the loser, by whatever traces φ leaves; in a matched pair
only the timing between picture and sound does. The plain pairs are SyncDPO's (arXiv 2605.12179),
the matched ones this project's own. Pairs that somebody else made are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from syncdpo.negatives.distortion import Distortion, select
from syncdpo.negatives.rules import Pair, Rule, per_sample
from syncdpo.negatives.timeline import Timeline, longer_frames
from syncdpo.ops._checks import check_choice

# Winner and loser that differ by less than this share of their size count as the same.
SAME = 0.01
# ... and so do streams that differ by less than this at all: silence with its last-bit noise.
SILENT = 1e-4


class Pairs(NamedTuple):
    """Winners and losers, (video, audio) each, and what tells about them, [B].

    `rule` int64 indexes `RULES`; `strength` is the largest displacement between winner and loser
    in seconds; where `valid` is false both came out the same and the pair must not count. Of pairs
    that no rule made, `rule` is -1, `strength` and `difficulty` are NaN.
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
    others: tuple[Pair, ...] = ()

    def __getitem__(self, samples: Tensor | slice) -> PairDraw:
        return replace(
            self,
            first=self.first[samples],
            second=self.second[samples],
            matched=self.matched[samples],
            difficulty=self.difficulty[samples],
            others=tuple((first[samples], second[samples]) for first, second in self.others),
        )

    def make(self, video: Tensor, audio: Tensor) -> Pairs:
        """The pairs of these clips, [N, ...] latents or raw media, in step with each other.

        Where a rule offers several placements, a clip takes the first that sets stretches of the
        distorted stream against each other which differ at least half as much as unrelated ones,

            Σ (φ₁x − φ₂x)² ≥ share replaced · Σ (x − mean of x over time)²,

        or, where none does, the one that comes closest. Both sides stay the same when φ₁ and φ₂
        change places, so the choice gives nothing away.
        """
        media = (video, audio)
        own = self.distorted
        first, second = self._chosen(media[own])
        win = tuple(map(first.apply, media, self.timelines))
        lose = list(win)
        lose[own] = second.apply(media[own], self.timelines[own])
        return Pairs(
            win=win,
            lose=tuple(lose),
            rule=second.rule,
            strength=_apart(first, second),
            difficulty=self.difficulty,
            matched=self.matched,
            valid=_differ(win[own], lose[own]),
        )

    def _chosen(self, x: Tensor) -> Pair:
        if not self.others:
            return self.first, self.second
        tries = ((self.first, self.second), *self.others)
        timeline = self.timelines[self.distorted]
        apart = torch.stack(
            [_energy(first.cut(x, timeline), second.cut(x, timeline)) for first, second in tries]
        )
        frames = timeline.as_frames(x).float()
        still = frames.mean(timeline.dim % x.ndim, keepdim=True)
        share = self.second.length / timeline.duration
        enough = share * _energy(frames, still)
        choice = apart.minimum(enough).argmax(0)  # of equals the first
        return tuple(select(choice, options) for options in zip(*tries, strict=True))


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
    own, other = timelines[distorted], timelines[1 - distorted]
    shared = longer_frames(own, other)
    end = min(timeline.duration for timeline in timelines)
    within, both_within = own.until(end), shared.until(end)

    is_matched = _chances(batch, device, generator) < matched
    difficulty = per_sample("difficulty", difficulty, is_matched)
    tries = rule.draw_tries(
        is_matched,
        difficulty,
        # Even frames of the loser's stream: a shift that wraps around moves frames onto frames.
        within.even,
        whole=torch.where(is_matched, both_within.duration, within.duration),
        grain=torch.where(is_matched, 1 / shared.rate, 1 / own.rate),
        generator=generator,
    )
    tries = [tuple(φ.aligned(own, other, is_matched) for φ in pair) for pair in tries]
    if matched == 0:  # known without looking at a device: the winners are the clips themselves
        tries = [(replace(first, warps=False, replaces=False), second) for first, second in tries]
    (first, second), *others = tries
    return PairDraw(first, second, is_matched, difficulty, timelines, distorted, tuple(others))


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


def given_pairs(win: tuple[Tensor, Tensor], lose: tuple[Tensor, Tensor]) -> Pairs:
    """Winners and losers from anywhere, (video, audio) each, as they are.

    A stream that both share may be the very same tensor in both, and is then noised once.
    """
    valid = torch.stack([_differ(*both) for both in zip(win, lose, strict=True)]).any(0)
    unknown = torch.full(valid.shape, torch.nan, device=valid.device)
    return Pairs(
        win=win,
        lose=lose,
        rule=torch.full(valid.shape, -1, device=valid.device),
        strength=unknown,
        difficulty=unknown,
        matched=torch.zeros_like(valid),
        valid=valid,
    )


def _chances(batch: int, device: torch.device | str | None, generator: Generator | None) -> Tensor:
    origin = device if generator is None else generator.device
    return torch.rand(batch, generator=generator, device=origin).to(device)


def _energy(x: Tensor, y: Tensor) -> Tensor:
    """Σ (x − y)² of each sample, [B] float32."""
    return (x.float() - y.float()).flatten(1).square().sum(1)


def _apart(first: Distortion, second: Distortion) -> Tensor:
    """The largest displacement between two distortions of the same samples, [B] seconds."""
    warped = (second.knots - first.knots).abs().amax(1)
    return warped.maximum((second.donor_start - first.donor_start).abs())


def _differ(win: Tensor, lose: Tensor) -> Tensor:
    """Where a pair differs by more than rounding, codec noise or the ripple of a hum, [B] bool.

    Exchanging both changes nothing, or the choice of pairs would give matched winners away.
    """
    size, other = (x.float().flatten(1).square().mean(1).sqrt() for x in (win, lose))
    difference = (lose.float() - win.float()).flatten(1).square().mean(1).sqrt()
    return difference > SAME * size.maximum(other) + SILENT
