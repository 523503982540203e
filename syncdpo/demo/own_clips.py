"""A user's own clips in the demonstration: which are trained on, and how they look to the model.

The embedded model knows balls in the dark. What it is shown of other clips is brought to the place
and spread of what it knows, or a bright, still picture would drown whatever happens in it: its
transformer scales every token to length one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from syncdpo.demo.report import LABELS
from syncdpo.metrics import ACCEPTABLE, ClipMetrics
from syncdpo.models.codec import VIDEO_TOKENS
from syncdpo.models.tiny import Tiny

# Of every eight clips, in the order of their names, two are given a sound and measured, one tells
# which step of a training is best, five are trained on.
PERIOD, MEASURED, VALIDATED = 8, (1, 5), (3,)
TWO = 2  # clips, at least: one to train on, one to measure
LEAST_VALIDATED = 4  # fewer tell no step from another
ENOUGH = 16  # clips held out; of fewer, the figures stand for themselves
DRAWS = 2  # of noise and losers, for each clip that is validated on
RESAMPLED = 2000
KNOWN_SPREAD = 0.8  # of the rendered balls' video latents about their mean


@dataclass(frozen=True)
class Statistics:
    """Of video latents [clips,96,40]: x ↦ (x − mean) / scale has the place and spread of balls.

    mean [4,40]: over clips and time, of each channel of each quadrant. scale: one for all, so that
    what is still stays still. Both are of the clips that are trained on, as the `latents_mean` and
    `latents_std` of a VAE are.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, video: Tensor) -> Statistics:
        centred = video.unflatten(1, (-1, VIDEO_TOKENS))
        mean = centred.mean((0, 1))
        scale = (centred - mean).std() / KNOWN_SPREAD
        return cls(mean, scale.clamp(min=1e-3))  # of pictures in which nothing ever changes

    def apply(self, video: Tensor) -> Tensor:
        """[…,96,40], standardised."""
        return ((self._frames(video) - self.mean) / self.scale).flatten(-3, -2)

    def undo(self, video: Tensor) -> Tensor:
        return (self._frames(video) * self.scale + self.mean).flatten(-3, -2)

    @staticmethod
    def _frames(video: Tensor) -> Tensor:
        return video.unflatten(-2, (-1, VIDEO_TOKENS))


class Standardised(Dataset):
    """Latents of a cache as the model is shown them."""

    def __init__(self, latents: Dataset, statistics: Statistics):
        self.latents, self.statistics, self.names = latents, statistics, latents.names

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.latents[index]
        return sample | {"video": self.statistics.apply(sample["video"])}


class Redrawn(Dataset):
    """Each clip `DRAWS` times, by other names: validation draws noise and losers by the name."""

    def __init__(self, data: Subset):
        self.data, self.clips = data, len(data)
        known = [data.dataset.names[index] for index in data.indices]
        self.names = [f"{name}, draw {draw}" for draw in range(DRAWS) for name in known]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data[index % self.clips]


class StandardisedTiny(Tiny):
    """The embedded model, whose latents are standardised ones."""

    def __init__(self, statistics: Statistics):
        super().__init__()
        self.statistics = statistics

    def decode(self, video: Tensor, audio: Tensor):
        return super().decode(self.statistics.undo(video.cpu()), audio)


@dataclass(frozen=True)
class Split:
    """Latents by what they are for. validated: none where there would be too few to tell."""

    training: Subset
    validated: Redrawn | None
    measured: Subset
    statistics: Statistics


def split(latents: Dataset, folder: Path) -> Split:
    """Raises ValueError where the clips are too few to train on some and measure on others."""
    if len(latents) < TWO:
        raise ValueError(
            f"clips: expected two that can be used at least, one to train on and one to measure "
            f"on, got {len(latents)} in {folder}"
        )
    parts: dict[str, list[int]] = {"training": [], "validated": [], "measured": []}
    spared = len(latents) // PERIOD * len(VALIDATED) >= LEAST_VALIDATED
    for index in range(len(latents)):
        place = index % PERIOD
        kind = "measured" if place in MEASURED else "training"
        parts["validated" if spared and place in VALIDATED else kind].append(index)
    video = torch.stack([latents[index]["video"] for index in parts["training"]])
    statistics = Statistics.of(video)
    shown = Standardised(latents, statistics)
    training, validated, measured = (Subset(shown, some) for some in parts.values())
    return Split(training, Redrawn(validated) if validated else None, measured, statistics)


def repeated(clips: Sequence, samples: int) -> list:
    """As many of the clips as there are to be samples; where there are fewer, each comes equally
    often, and its picture is given several sounds, each from noise of its own."""
    rounds = max(1, samples // len(clips))
    return rounds * [clips[i] for i in range(min(len(clips), samples))]


def f1_interval(metrics: Sequence[ClipMetrics], pictures: int) -> list[float] | None:
    """What F1 could have been with other clips of the kind: 95 % of `RESAMPLED` draws, with
    replacement, of the pictures (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13).

    metrics: of `repeated` pictures. None where nothing is seen or heard.
    """
    pictures = min(pictures, len(metrics))
    scores = np.array([m.score(ACCEPTABLE) for m in metrics], dtype=float)
    of_picture = np.stack([scores[i::pictures].sum(0) for i in range(pictures)])
    drawn = np.random.default_rng(0).integers(pictures, size=(RESAMPLED, pictures))
    pairs, events = of_picture[drawn].sum(1).T
    if not events.all():
        return None
    return np.quantile(2 * pairs / events, (0.025, 0.975)).tolist()


def remarks(rows: Sequence[dict], clips: int) -> list[str]:
    """What a user should know of the figures of own clips: sentences; none where all is well.

    clips: how many were held out. rows: of the table, with `f1_interval`s.
    """
    said = []
    rows = {row["method"]: row for row in rows}
    ours = rows["syncdpo"]
    if clips < ENOUGH:
        low, high = ours["f1_interval"] or (0.0, 1.0)
        said.append(
            f"{clips} held-out clip{'s are' if clips > 1 else ' is'} too few to tell methods "
            f"apart: with others like them SyncDPO's F1 could as well be {low:.2f} to {high:.2f}. "
            f"A folder of {ENOUGH * PERIOD // len(MEASURED)} clips or more has {ENOUGH} to measure."
        )
    if not ours["seen_per_clip"]:
        said.append(
            "Nothing is seen to happen in the held-out pictures (`syncdpo evaluate` tells of each "
            "clip), so there is no telling whether sounds are in step."
        )
        return said
    best = max(rows, key=lambda method: rows[method]["f1"] or 0.0)
    if best != "syncdpo":
        said.append(
            f"SyncDPO is not ahead on these clips: its F1 is {ours['f1']:.2f}, that of "
            f"{LABELS[best]} {rows[best]['f1']:.2f}. Are the clips in step (`syncdpo prepare` "
            "flags those that are not)? Is what sounds also seen?"
        )
    return said
