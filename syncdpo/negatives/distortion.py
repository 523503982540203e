"""A batch of distortions of time, in seconds, and how they act on a stream's frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncdpo.negatives.timeline import Timeline, longer_frames
from syncdpo.ops.segment_replace import Segments, replace_segments
from syncdpo.ops.temporal_warp import resample

RULES = ("shift", "scale", "warp", "replace")
SHIFT, SCALE, WARP, REPLACE = range(len(RULES))
PER_SAMPLE = ("knots", "start", "length", "donor_start", "duration", "rule")


@dataclass(frozen=True)
class Distortion:
    """One map of time per sample: a warp, or one segment replaced by another of the same clip.

    It acts on the stretch [0, duration) of a clip and leaves frames that are centred past it alone.

    Attributes:
        knots: [B, K] float32 seconds, the source times of K output times evenly spaced over
            [0, duration]; those output times themselves where the rule is Replace.
        start, length, donor_start: [B] float32 seconds; length 0 where nothing is replaced.
        duration: [B] float32 seconds; a stream may be longer.
        rule: [B] int64, an index of `RULES`.
        boundary: what a warp reads outside the stretch: "edge" (its first or last frame), "wrap"
            (the stretch again) or "reflect" (the stretch backwards).
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

    def aligned(self, own: Timeline, other: Timeline, matched: Tensor) -> Distortion:
        """The nearest distortion made of whole frames, which blur nothing and keep streams in step.

        A shift moves by whole frames of `own`, the stream to distort; rounded up, so that it stays
        noticeable. A segment begins and ends with frames of `own`, in matched samples with those
        of whichever stream has the longer frames: there both streams cut at the same times.
        """
        whole = (self.displacement.abs() * own.rate - 1e-3).ceil() / own.rate
        shifted = self.knots + (whole * self.displacement.sign() - self.displacement)
        knots = torch.where((self.rule == SHIFT)[:, None], shifted, self.knots)
        pairs = zip(self._on_frames(own, other), self._on_frames(own), strict=True)
        start, length, donor = (torch.where(matched, a, b) for a, b in pairs)
        return replace(self, knots=knots, start=start, length=length, donor_start=donor)

    def _on_frames(self, *timelines: Timeline) -> tuple[Tensor, Tensor, Tensor]:
        """The segment moved to whole frames of the longer kind, where all streams' are even."""
        grid = longer_frames(*timelines)
        lowest = max(grid.next_border(timeline.even_from) for timeline in timelines)
        end = grid.border(self.duration).clamp(min=lowest)
        count = (self.length * grid.rate + 1e-3).floor().minimum(end - lowest)
        start = grid.border(self.start).clamp(min=lowest).minimum(end - count)
        donor = grid.border(self.donor_start).clamp(min=lowest).minimum(end - count)
        return grid.begins(start), count / grid.rate, grid.begins(donor)

    def _warp(self, x: Tensor, timeline: Timeline) -> Tensor:
        frame = torch.arange(timeline.frames, device=x.device, dtype=torch.float32)
        output = timeline.seconds(frame)
        delta = timeline.position(self.source(output)) - timeline.position(output)
        whole = delta.round()
        rounding = timeline.frames * 2.0**-20
        delta = torch.where((delta - whole).abs() <= rounding, whole, delta)
        delta = torch.where(output < self.duration[:, None], delta, 0.0)
        return resample(x, frame + delta, dim=timeline.dim, frames=timeline.frames)

    def source(self, output: Tensor) -> Tensor:
        """The times in the clip, [B, T] seconds, that a warp plays at the output times [T]."""
        return self._inside(output + self._displacement_at(output))

    def _inside(self, source: Tensor) -> Tensor:
        """The boundary, in seconds: frames of unequal length would put streams out of step.

        It is that of the stretch, not of a stream: streams of unequal length stay in step, too.
        """
        duration = self.duration[:, None]
        if self.boundary == "edge":
            return source.clamp(min=0).minimum(duration)
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
        start, length, donor_start = self.segment(timeline)
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

    def segment(self, timeline: Timeline) -> tuple[Tensor, Tensor, Tensor]:
        """First frame, count and first donor frame of what is replaced in a stream, whole floats.

        The donor is as far from the segment as the seconds say, rounded once; were both ends
        rounded, streams would get out of step by as much as a frame.
        """
        start = timeline.border(self.start).clamp(max=timeline.frames)
        end = timeline.border(self.start + self.length).clamp(max=timeline.frames)
        distance = ((self.donor_start - self.start) * timeline.rate + 0.5).floor()
        donor_start = (start + distance).minimum(timeline.frames - (end - start)).clamp(min=0)
        return start, end - start, donor_start


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
