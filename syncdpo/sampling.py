"""Clips from a generator, as mp4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from syncdpo.data.chance import generator
from syncdpo.data.clips import Clip, write_clip
from syncdpo.data.overlap import overlapped
from syncdpo.models import Model


def noise_seeds(count: int, *key) -> Tensor:
    """One noise seed per clip, int64 [count], a function of `key`."""
    return torch.randint(2**63 - 1, (count,), generator=generator(*key))


def generate(
    model: Model,
    folder: Path,
    seeds: Tensor,
    *,
    captions: Sequence[str] = ("",),
    steps: int | None = None,
    progress: bool = True,
    label: str = "sample",
    **guidance,
) -> Iterator[Path]:
    """Write one mp4 per caption and seed to `folder`, numbered, and yield it when it is there.

    All seeds of the first caption come first. steps, guidance: as `Model.generate` takes them.
    """
    texts = [caption for caption in captions for _ in seeds]
    clips = model.generate(texts, seeds.repeat(len(captions)), steps=steps, **guidance)
    folder.mkdir(parents=True, exist_ok=True)

    def write(numbered: tuple[int, Clip]) -> Path:
        number, clip = numbered
        path = folder / f"{number:03d}.mp4"
        write_clip(path, clip)
        return path

    paths = overlapped(write, enumerate(clips))
    yield from tqdm(paths, label, len(texts), unit="clip", disable=not progress)
