"""Everything random in training, as a function of (seed, step), or of (seed, draw, clip).

So a run that was killed goes on as if it had not been, N processes train on what one process with
the same global batch trains on, and what a draw needs can be computed before it is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from syncdpo.models import Model, Streams
from syncdpo.negatives import PairDraw, draw_pairs
from syncdpo.negatives.curriculum import Schedule
from syncdpo.negatives.rules import parse_rule
from syncdpo.training.config import TrainConfig


@dataclass(frozen=True)
class Roll:
    """For each of B clips: its number, noise levels, noise seed, and what makes its pair.

    `pairs` is None where the method makes none.
    """

    clips: Tensor
    sigma: Streams
    seed: Tensor
    pairs: PairDraw | None
    stage: int

    def __getitem__(self, rows: list[int]) -> Roll:
        sigma = (self.sigma[0][rows], self.sigma[1][rows])
        pairs = self.pairs[rows] if self.pairs else None
        return Roll(self.clips[rows], sigma, self.seed[rows], pairs, self.stage)


class Order:
    """Which clips each step sees: a new permutation every epoch, dealt out over processes."""

    def __init__(self, config: TrainConfig, clips: int, accelerator: Accelerator):
        self.config, self.clips = config, clips
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.batch = config.batch_size * config.accumulation * self.world
        self._epoch = lru_cache(2)(self._permutation)

    def step(self, step: int) -> list[int]:
        """The clips of one step, over all processes and micro-steps."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self._epoch(place // self.clips)[place % self.clips] for place in places]

    def rows(self, micro: int) -> list[int]:
        """Which of a step's clips are this process's in a micro-step."""
        first = (micro * self.world + self.rank) * self.config.batch_size
        return list(range(first, first + self.config.batch_size))

    def micro_steps(self, since: int) -> list[list[int]]:
        """This process's clips, micro-step by micro-step, from step `since` to the end."""
        steps = (self.step(step) for step in range(since, self.config.steps))
        micro_steps = [self.rows(micro) for micro in range(self.config.accumulation)]
        return [[clips[row] for row in rows] for clips in steps for rows in micro_steps]

    def _permutation(self, epoch: int) -> list[int]:
        return torch.randperm(
            self.clips, generator=generator(self.config.seed, "epoch", epoch)
        ).tolist()


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
        self.stage = lru_cache(2)(self._stage)

    def roll(self, step: int, micro: int) -> Roll:
        """This process's part of a step's micro-step."""
        clips, rows = self.order.step(step), self.order.rows(micro)
        if draws := self.config.draws_per_clip:
            return self.stage(step * draws // self.config.steps)[[clips[row] for row in rows]]
        difficulty = self.difficulty(step / self.config.steps)
        return self._roll(clips, difficulty, 0, "step", step)[rows]

    def _stage(self, stage: int) -> Roll:
        """Draw `stage` of every clip, at the difficulty of the middle of its share of the run."""
        difficulty = self.difficulty((stage + 0.5) / self.config.draws_per_clip)
        return self._roll(range(self.order.clips), difficulty, stage, "draw", stage)

    def _roll(self, clips, difficulty: float, stage: int, *key) -> Roll:
        source = generator(self.config.seed, *key)
        sigma = self.model.draw_sigma(len(clips), source)
        seed = torch.randint(2**63 - 1, (len(clips),), generator=source)
        # Pairs come last: leaving them out changes nothing that is drawn before.
        pairs = None if self.config.method == "sft" else self._pairs(len(clips), difficulty, source)
        return Roll(
            clips=torch.tensor(clips, device=self.device),
            sigma=tuple(s.to(self.device) for s in sigma),
            seed=seed.to(self.device),
            pairs=pairs,
            stage=stage,
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


def generator(*key) -> Generator:
    """A source of random numbers on the CPU that is a function of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little"))
