"""Clips from a generator, as mp4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    paths = [folder / f"{number:03d}.mp4" for number in range(len(texts))]
    yield from written(clips, paths, progress=progress, label=label)


def written(
    clips: Iterable[Clip],
    paths: Sequence[Path],
    *,
    done: int = 0,
    progress: bool = True,
    label: str = "sample",
) -> Iterator[Path]:
    """Write each clip under its path, as mp4, and yield that when it is there.

    done: how many of all are there already; the progress bar begins with them.
    """
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)

    def write(named: tuple[Path, Clip]) -> Path:
        path, clip = named
        write_clip(path, clip)
        return path

    finished = overlapped(write, zip(paths, clips, strict=True))
    total = done + len(paths)
    yield from tqdm(finished, label, total, initial=done, unit="clip", disable=not progress)
