"""How the embedded default got its base: `python -m syncdpo.demo.base`, 30 minutes on two cores.

Rendered clips, their sound moved against the picture by up to half a second either way: whoever
trains on them learns what sounds go with a picture, and that there is no telling when.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from syncdpo.data.chance import generator
from syncdpo.data.synthetic import render
from syncdpo.models.tiny import BASE, Tiny
from syncdpo.models.weights import FULL
from syncdpo.train import train
from syncdpo.training.config import TrainConfig

CLIPS = 3072
FIRST_SEED = 10_000_000  # far from every clip that anything else is trained or measured on
LARGEST_OFFSET = 0.5  # s
SETTINGS = TrainConfig(
    output="runs/base", method="sft", steps=3000, batch_size=32, learning_rate=2e-3, warmup=100
)


class MistimedClips(Dataset):
    """Latents of clips whose sound is moved against the picture, each rendered once."""

    def __init__(self, model: Tiny):
        self.model = model
        self._latents = cache(self._render)

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._latents(index)

    def _render(self, index: int) -> dict[str, Tensor]:
        share = torch.rand((), generator=generator("offset", index)).item()
        offset = (2 * share - 1) * LARGEST_OFFSET
        return self.model.encode(render(FIRST_SEED + index, offset=offset).clip, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=BASE, help="where the base goes")
    arguments = parser.parse_args()
    torch.manual_seed(SETTINGS.seed)
    model = Tiny(weights=None)
    model.transformer.compile()  # two minutes that a third of every step pays back
    train(SETTINGS, model, MistimedClips(model))
    weights = load_file(Path(SETTINGS.output) / FULL)
    save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, arguments.output)


if __name__ == "__main__":
    main()
