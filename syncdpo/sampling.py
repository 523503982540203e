"""Clips from a generator, as mp4."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from syncdpo.data.clips import write_clip
from syncdpo.dice import generator
from syncdpo.models import Model


def noise_seeds(count: int, *key) -> Tensor:
    """One noise seed per clip, int64 [count], a function of `key`."""
    return torch.randint(2**63 - 1, (count,), generator=generator(*key))


def generate(
    model: Model,
    folder: Path,
    seeds: Tensor,
    *,
    caption: str = "",
    steps: int = 20,
    batch: int = 32,
    progress: bool = True,
    label: str = "sample",
) -> Iterator[Path]:
    """Write one mp4 per seed to `folder`, numbered, and yield it when it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer = model.transformer.eval()
    device = next(transformer.parameters()).device
    bar = tqdm(total=len(seeds), desc=label, unit="clip", disable=not progress)
    paths = (folder / f"{number:03d}.mp4" for number in count())
    for some in seeds.split(batch):
        conditions = model.conditions([caption] * len(some))
        video, audio = model.sample(transformer, conditions, some.to(device), steps)
        for clip, path in zip(model.decode(video, audio), paths, strict=False):
            write_clip(path, clip)
            bar.update()
            yield path
    bar.close()
