"""A batch of distortions of time, in seconds, and how they act on a stream's frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncdpo.ops.segment_replace import Segments, replace_segments
from syncdpo.ops.temporal_warp import resample
from syncdpo.timeline import Timeline

RULES = ("shift", "scale", "warp", "replace")
SHIFT, SCALE, WARP, REPLACE = range(len(RULES))
PER_SAMPLE = ("knots", "start", "length", "donor_start", "duration", "rule")


@dataclass(frozen=True)
class Distortion:
    """One map of time per sample: a warp, or one segment replaced by another of the same clip.

    Attributes:
        knots: [B, K] float32 seconds, the source times of K output times evenly spaced over
            [0, duration]; those output times themselves where the rule is Replace.
        start, length, donor_start: [B] float32 seconds; length 0 where nothing is replaced.
        duration: [B] float32 seconds.
        rule: [B] int64, an index of `RULES`.
        boundary: what a warp reads outside the clip: "edge" (its first or last frame), "wrap"
            (the clip again) or "reflect" (the clip backwards).
        crossfade: seconds of blend at the seams of a replaced segment.
        warps, replaces: whether any sample may be warped, or have a segment replaced.
    """

    knots: Tensor
    start: Tensor
    length: Tensor
    donor_start: Tensor
    duration: Tensor
    rule: Tensor
    boundary: str = "wrap"
    crossfade: float = 0.0
    warps: bool = True
    replaces: bool = True

    def __getitem__(self, samples: Tensor | slice) -> Distortion:
        return replace(self, **{name: getattr(self, name)[samples] for name in PER_SAMPLE})

    @property
    def displacement(self) -> Tensor:
        """Source time minus output time at each knot, [B, K] seconds; exactly 0 for identity."""
        return self.knots - output_times(self.duration, self.knots.shape[1])

    @property
    def strength(self) -> Tensor:
        """The largest displacement, [B] seconds."""
        return self.displacement.abs().amax(1).maximum((self.donor_start - self.start).abs())

    def apply(self, x: Tensor, timeline: Timeline) -> Tensor:
        """Distort one stream, [B, ...]; a sample or frame that stays in place keeps its bits.

        Raises:
            ValueError: x does not have the timeline's frames along its axis.
        """
        size = timeline.frames * timeline.tokens
        if x.shape[timeline.dim] != size:
            raise ValueError(
                f"x: expected {timeline.frames} frames x {timeline.tokens} tokens = {size} along "
                f"axis {timeline.dim}, got {x.shape[timeline.dim]}"
            )
        if self.warps:
            x = self._warp(x, timeline)
        return self.cut(x, timeline)

    def cut(self, x: Tensor, timeline: Timeline) -> Tensor:
        """One stream with its segments replaced, and not warped."""
        return self._replace(x, timeline) if self.replaces else x

    def aligned(self, own: Timeline, shared: Timeline, matched: Tensor) -> Distortion:
        """The nearest distortion made of whole frames, which blur nothing and keep streams in step.

        A shift moves by whole frames of `own`, the stream to distort; rounded up, so that it stays
        noticeable. A segment begins and ends with frames of `own`, in matched samples with those
        of `shared`, the stream with the longer frames: there both streams cut at the same times.
        """
        whole = (self.displacement.abs() * own.rate - 1e-3).ceil() / own.rate
        shifted = self.knots + (whole * self.displacement.sign() - self.displacement)
        knots = torch.where((self.rule == SHIFT)[:, None], shifted, self.knots)
        times = (self.start, self.length, self.donor_start)
        pairs = zip(_on_frames(*times, shared), _on_frames(*times, own), strict=True)
        start, length, donor = (torch.where(matched, a, b) for a, b in pairs)
        return replace(self, knots=knots, start=start, length=length, donor_start=donor)

    def _warp(self, x: Tensor, timeline: Timeline) -> Tensor:
        frame = torch.arange(timeline.frames, device=x.device, dtype=torch.float32)
        output = timeline.seconds(frame)
        delta = timeline.position(self.source(output, timeline)) - timeline.position(output)
        whole = delta.round()
        rounding = timeline.frames * 2.0**-20
        delta = torch.where((delta - whole).abs() <= rounding, whole, delta)
        return resample(x, frame + delta, dim=timeline.dim, frames=timeline.frames)

    def source(self, output: Tensor, timeline: Timeline) -> Tensor:
        """The times in the clip, [B, T] seconds, that a warp plays at the output times [T]."""
        return self._inside(output + self._displacement_at(output), timeline.duration)

    def _inside(self, source: Tensor, duration: float) -> Tensor:
        """The boundary, in seconds: frames of unequal length would put streams out of step."""
        if self.boundary == "edge":
            return source.clamp(0, duration)
        if self.boundary == "wrap":
            return source - duration * (source / duration).floor()
        mirrored = duration - (duration - source.remainder(2 * duration)).abs()
        return torch.where((source >= 0) & (source <= duration), source, mirrored)

    def _displacement_at(self, output: Tensor) -> Tensor:
        """Source time minus output time, [B, T], at output times [T]."""
        segments = self.knots.shape[1] - 1
        place = output * (segments / self.duration[:, None])
        segment = place.floor().clamp(0, segments - 1).long()
        displacement = self.displacement
        here, there = displacement.gather(1, segment), displacement.gather(1, segment + 1)
        return here + (place - segment) * (there - here)

    def _replace(self, x: Tensor, timeline: Timeline) -> Tensor:
        start = timeline.border(self.start)
        length = timeline.border(self.start + self.length) - start
        donor_start = timeline.border(self.donor_start).minimum(timeline.frames - length)
        itself = torch.arange(x.shape[0], device=x.device)
        replaced, _ = replace_segments(
            timeline.as_frames(x),
            None,
            Segments(start, length, itself, donor_start),
            video_rate=1.0,  # times are counted in frames here
            audio_rate=None,
            video_dim=timeline.dim % x.ndim,
            crossfade=self.crossfade * timeline.rate,
        )
        return replaced.reshape(x.shape)


def _on_frames(start: Tensor, length: Tensor, donor: Tensor, timeline: Timeline) -> tuple:
    """The segment moved to whole frames of one length: not frame 0 where that one is shorter."""
    lowest = 0 if timeline.first == timeline.stride else 1
    count = (length * timeline.rate + 1e-3).floor()
    highest = timeline.frames - count
    start = timeline.border(start).clamp(min=lowest).minimum(highest)
    donor = timeline.border(donor).clamp(min=lowest).minimum(highest)
    return timeline.begins(start), count / timeline.rate, timeline.begins(donor)


def output_times(duration: Tensor, count: int) -> Tensor:
    """`count` times evenly spaced over [0, duration], [B, count]."""
    return duration[:, None] * (torch.arange(count, device=duration.device) / (count - 1))


def select(choice: Tensor, options: Sequence[Distortion]) -> Distortion:
    """For each sample the distortion of the option that `choice` [B] names."""
    sample = torch.arange(choice.shape[0], device=choice.device)
    warping = [option for option in options if option.warps]
    return Distortion(
        *(
            torch.stack([getattr(option, name) for option in options])[choice, sample]
            for name in PER_SAMPLE
        ),
        boundary=warping[0].boundary if warping else "wrap",
        crossfade=max(option.crossfade for option in options),
        warps=bool(warping),
        replaces=any(option.replaces for option in options),
    )
