"""Everything random in training, as a function of (seed, step), or of (seed, draw, clip).

So a run that was killed goes on as if it had not been, N processes train on what one process with
the same global batch trains on, and what a draw needs can be computed before it is used.

Where the clips are of several formats, each format has steps, epochs and clips of its own, counted
as if there were no other, and those numbers are meant: noise levels, noise and distortions of a
clip are what they would be in a run on its format alone. What other formats there are decides only
which step of the run is which format's, and so at which difficulty and learning rate a clip comes.
The same steps and draws of two formats therefore share their random numbers, as those of two runs
do.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from syncdpo.data.buckets import Bucket, take_format
from syncdpo.data.chance import generator
from syncdpo.models import Model, Streams
from syncdpo.negatives import PairDraw, draw_pairs
from syncdpo.negatives.curriculum import Schedule
from syncdpo.negatives.rules import parse_rule
from syncdpo.training.config import TrainConfig


@dataclass(frozen=True)
class Roll:
    """For each of B clips: its number, noise levels, noise seed, and what makes its pair.

    `pairs` is None where the method makes none (of `dpo` they come with the batch), `bucket` where
    the clips are of one format, which the model is in.
    """

    clips: Tensor
    sigma: Streams
    seed: Tensor
    pairs: PairDraw | None
    stage: int
    bucket: Bucket | None = None

    def __getitem__(self, rows: list[int]) -> Roll:
        sigma = (self.sigma[0][rows], self.sigma[1][rows])
        pairs = self.pairs[rows] if self.pairs else None
        return Roll(self.clips[rows], sigma, self.seed[rows], pairs, self.stage, self.bucket)


class Order:
    """Which clips each step sees: a new permutation every epoch, dealt out over processes.

    A step's clips are of one format, over all processes and micro-steps, so that it does not matter
    how they are dealt out. Each format's clips stand in a row without end, permuted anew for every
    epoch, and a step takes the next global batch of the format whose turn it is; what is left at
    the end of an epoch goes into a batch with the beginning of the next, so no clip is ever lost.

    Epoch e of the run is as many steps of a format of n clips as there are multiples of the batch
    B in (e n, (e + 1) n], in an order drawn for that epoch. So after every epoch each format has
    had its share, n clips per epoch, to within one batch, and a clip is seen once per epoch on
    average.

    buckets: the format of each clip; by default all are of one.
    """

    def __init__(
        self,
        config: TrainConfig,
        clips: int,
        accelerator: Accelerator,
        buckets: Sequence[Bucket | None] | None = None,
    ):
        self.config, self.clips = config, clips
        self.buckets = list(buckets or [None] * clips)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.batch = config.batch_size * config.accumulation * self.world
        kinds = set(self.buckets)
        kinds = sorted(kinds) if len(kinds) > 1 else list(kinds)
        self.groups = {
            kind: [clip for clip, bucket in enumerate(self.buckets) if bucket == kind]
            for kind in kinds
        }
        self.number = {clip: n for group in self.groups.values() for n, clip in enumerate(group)}
        self._epoch = lru_cache(2 * len(self.groups))(self._permutation)
        self._turns = lru_cache(2)(self._dealt)

    def turn(self, step: int) -> tuple[Bucket | None, int]:
        """Whose step it is, and how many that format has had before."""
        epochs = range(math.ceil((step + len(self.groups) + 1) * self.batch / self.clips) + 1)
        epoch = bisect_right(epochs, step, key=self._steps_before) - 1
        return self._turns(epoch)[step - self._steps_before(epoch)]

    def step(self, step: int) -> list[int]:
        """The clips of one step, over all processes and micro-steps."""
        bucket, own = self.turn(step)
        group = self.groups[bucket]
        places = range(own * self.batch, (own + 1) * self.batch)
        return [
            group[self._epoch(len(group), place // len(group))[place % len(group)]]
            for place in places
        ]

    def rows(self, micro: int) -> list[int]:
        """Which of a step's clips are this process's in a micro-step."""
        first = (micro * self.world + self.rank) * self.config.batch_size
        return list(range(first, first + self.config.batch_size))

    def micro_steps(self, since: int) -> list[list[int]]:
        """This process's clips, micro-step by micro-step, from step `since` to the end."""
        steps = (self.step(step) for step in range(since, self.config.steps))
        micro_steps = [self.rows(micro) for micro in range(self.config.accumulation)]
        return [[clips[row] for row in rows] for clips in steps for rows in micro_steps]

    def shares(self) -> list[list[tuple[int, bool]]]:
        """All clips once, in batches of one format: this process's, each with whether it counts.

        Every process has as many batches of as many clips, as sharded weights ask for; where there
        are not enough, some come again and do not count.
        """
        shares, size = [], self.config.batch_size
        for group in self.groups.values():
            padded = math.ceil(len(group) / self.world) * self.world
            places = range(self.rank, padded, self.world)
            mine = [(group[place % len(group)], place < len(group)) for place in places]
            shares += [mine[first : first + size] for first in range(0, len(mine), size)]
        return shares

    def _steps_before(self, epoch: int) -> int:
        """How many steps all epochs before this one have."""
        return sum(epoch * len(group) // self.batch for group in self.groups.values())

    def _dealt(self, epoch: int) -> list[tuple[Bucket | None, int]]:
        """The turns of one epoch, in their order."""
        turns = []
        for bucket, group in self.groups.items():
            first, last = (e * len(group) // self.batch for e in (epoch, epoch + 1))
            turns += [(bucket, own) for own in range(first, last)]
        if len(self.groups) == 1:
            return turns
        source = generator(self.config.seed, "formats", epoch)
        kinds = [turns[i][0] for i in torch.randperm(len(turns), generator=source).tolist()]
        waiting = {bucket: iter([t for t in turns if t[0] == bucket]) for bucket in self.groups}
        return [next(waiting[bucket]) for bucket in kinds]

    def _permutation(self, clips: int, epoch: int) -> list[int]:
        return torch.randperm(clips, generator=generator(self.config.seed, "epoch", epoch)).tolist()


@dataclass
class Dice:
    """Rolls for a step; or, where draws per clip are limited, for a stage of the run."""

    config: TrainConfig
    model: Model
    difficulty: Schedule
    order: Order
    device: torch.device

    def __post_init__(self):
        self.rule = parse_rule(self.config.rules)
        self.stage = lru_cache(2 * len(self.order.groups))(self._stage)

    def roll(self, step: int, micro: int) -> Roll:
        """This process's part of a step's micro-step."""
        clips, rows = self.order.step(step), self.order.rows(micro)
        if draws := self.config.draws_per_clip:
            return self.draw(step * draws // self.config.steps, [clips[row] for row in rows])
        difficulty = self.difficulty(step / self.config.steps)
        bucket, own = self.order.turn(step)
        return self._roll(clips, bucket, difficulty, 0, "step", own)[rows]

    def draw(self, stage: int, clips: list[int]) -> Roll:
        """Draw `stage` of these clips, which are of one format."""
        bucket = self.order.buckets[clips[0]]
        return self.stage(stage, bucket)[[self.order.number[clip] for clip in clips]]

    def _stage(self, stage: int, bucket: Bucket | None) -> Roll:
        """Of every clip of a format, at the difficulty of the middle of its share of the run."""
        difficulty = self.difficulty((stage + 0.5) / self.config.draws_per_clip)
        clips = self.order.groups[bucket]
        return self._roll(clips, bucket, difficulty, stage, "draw", stage)

    def _roll(self, clips, bucket: Bucket | None, difficulty: float, stage: int, *key) -> Roll:
        take_format(self.model, bucket)
        source = generator(self.config.seed, *key)
        sigma = self.model.draw_sigma(len(clips), source)
        seed = torch.randint(2**63 - 1, (len(clips),), generator=source)
        # Pairs come last: leaving them out changes nothing that is drawn before.
        made = self.config.method == "syncdpo"
        pairs = self._pairs(len(clips), difficulty, source) if made else None
        return Roll(
            clips=torch.tensor(clips, device=self.device),
            sigma=tuple(s.to(self.device) for s in sigma),
            seed=seed.to(self.device),
            pairs=pairs,
            stage=stage,
            bucket=bucket,
        )

    def _pairs(self, batch: int, difficulty: float, source: Generator) -> PairDraw:
        video, audio = self.model.timelines
        return draw_pairs(
            batch,
            self.rule,
            difficulty,
            video_timeline=video,
            audio_timeline=audio,
            matched=self.config.matched,
            generator=source,
            device=self.device,
        )
