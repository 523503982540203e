"""How the embedded default got its base: `python -m syncdpo.demo.base`, 30 minutes on two cores.

Rendered clips, their sound moved against the picture by up to half a second either way: whoever
trains on them learns what sounds go with a picture, and that there is no telling when.

    python -m syncdpo.demo.base --families all

makes the one that knows all families of `syncdpo.data.families` so, in less than an hour.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from syncdpo.data.chance import generator
from syncdpo.data.families import FAMILIES
from syncdpo.data.synthetic import Family, render
from syncdpo.models.tiny import BASE, FAMILIES_BASE, Tiny
from syncdpo.models.weights import FULL
from syncdpo.train import train
from syncdpo.training.config import TrainConfig

FIRST_SEED = 10_000_000  # far from every clip that anything else is trained or measured on
LARGEST_OFFSET = 0.5  # s
COMPILED = 500  # steps from which on compiling pays back the two minutes that it takes
SETTINGS = TrainConfig(
    output="runs/base", method="sft", steps=3000, batch_size=32, learning_rate=2e-3, warmup=100
)


@dataclass(frozen=True)
class Recipe:
    """What a base is trained on, families in turn, and how. clips: of all families together.
    place: where it is looked for."""

    families: Sequence[Family]
    clips: int
    settings: TrainConfig
    place: Path


RECIPES = {
    "impacts": Recipe((render,), 3072, SETTINGS, BASE),
    # Half as many clips and two fifths of the steps per family: what an hour holds.
    "all": Recipe(
        tuple(FAMILIES.values()),
        6144,
        replace(SETTINGS, output="runs/base-all", steps=5000),
        FAMILIES_BASE,
    ),
}


class MistimedClips(Dataset):
    """Latents of clips whose sound is moved against the picture, each rendered once."""

    def __init__(self, model: Tiny, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self._latents = cache(self._render)

    def __len__(self) -> int:
        return self.recipe.clips

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._latents(index)

    def _render(self, index: int) -> dict[str, Tensor]:
        share = torch.rand((), generator=generator("offset", index)).item()
        offset = (2 * share - 1) * LARGEST_OFFSET
        turn, of = divmod(index, len(self.recipe.families))
        clip = self.recipe.families[of](FIRST_SEED + turn, offset=offset).clip
        return self.model.encode(clip, "")


def make_base(recipe: Recipe, output: Path) -> None:
    """Train a base from random weights; its weights go to `output`, in bf16."""
    settings = recipe.settings
    torch.manual_seed(settings.seed)
    model = Tiny(weights=None)
    if settings.steps >= COMPILED:
        model.transformer.compile()  # a third of every step
    train(settings, model, MistimedClips(model, recipe))
    weights = load_file(Path(settings.output) / FULL)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--families", choices=RECIPES, default="impacts", help="what is rendered to train on"
    )
    parser.add_argument("--output", type=Path, help="where the base goes; default: in its place")
    parser.add_argument("--steps", type=int, help="another number of them, to try the way")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.families]
    if options.steps is not None:
        if options.output is None:
            parser.error("--output: expected a file for a base of another number of steps")
        recipe = replace(recipe, settings=replace(recipe.settings, steps=options.steps))
    make_base(recipe, options.output or recipe.place)


if __name__ == "__main__":
    main()
