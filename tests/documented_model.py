"""The model of docs/models.md, as a file that is named and as a class."""

import re
from pathlib import Path

import torch

from syncdpo.models import load_model

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BLOCKS = re.findall(r"```python\n(.*?)\n```", PAGE.read_text("utf-8"), re.S)[:2]


def write_model(folder: Path, name: str = "own_model", more: str = "") -> str:
    """Write it, with `more` behind it, and say what it is called."""
    file = folder / f"{name}.py"
    file.write_text("\n\n\n".join([*BLOCKS, more]) + "\n", "utf-8")
    return f"{file}:Own"


def own_class(folder: Path) -> type:
    return type(load_model(write_model(folder)))


def random_latents(count: int = 10) -> list[dict[str, torch.Tensor]]:
    """In its shapes: smooth along time, so that distortions are small changes."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(count, 12, 48, generator=generator).cumsum(1) / 4
    audio = torch.randn(count, 50, 8, generator=generator).cumsum(1) / 7
    return [{"video": v, "audio": a} for v, a in zip(video, audio, strict=True)]
