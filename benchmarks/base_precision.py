"""What rounding a LoRA's base does: to weights, and to the margin that SyncDPO reaches on a CPU.

    python benchmarks/base_precision.py [--seeds N] [--steps N]

The embedded model, whose base is trained, learns on smooth random latents with a LoRA of rank 8;
the margin is the mean of the last ten steps, against the full base's from the same seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from syncdpo.models.quantised import PRECISIONS, dequantised, quantise
from syncdpo.models.tiny import Tiny
from syncdpo.train import train
from syncdpo.training.checkpoint import read_log
from syncdpo.training.config import TrainConfig

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from micro import random_latents

WIDTH = 4096
SETTINGS = {
    "learning_rate": 3e-3, "warmup": 2, "batch_size": 4, "lora_rank": 8, "rules": "shift",
    "matched": 0.0, "curriculum": "constant", "beta_audio": 500.0, "sft_weight": 0.0,
}  # fmt: skip


def rounding(precision: str) -> float:
    """‖w' − w‖ / ‖w‖ of bf16 weights from N(0, 1/4096)."""
    layer = nn.Linear(WIDTH, 512, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(layer.weight, std=WIDTH**-0.5, generator=torch.Generator().manual_seed(0))
    before, module = layer.weight.detach().float(), nn.ModuleList([layer])
    quantise(module, precision)
    return ((dequantised(module[0]).float() - before).norm() / before.norm()).item()


def cast() -> float:
    """The same for a plain cast to 8 bits, as layerwise casting does it."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(512, WIDTH, generator=generator) / WIDTH**0.5).bfloat16().float()
    return ((weight.to(torch.float8_e4m3fn).float() - weight).norm() / weight.norm()).item()


def margin(precision: str, seed: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"base_precision": precision, "seed": seed, "steps": steps}
        config = TrainConfig(output=folder, **settings)
        train(config, Tiny(), random_latents(), progress=False)
        log = read_log(Path(folder))
    if log[0]["margin"] != 0:
        raise RuntimeError(f"{precision}: expected a margin of 0 at first, got {log[0]['margin']}")
    return sum(entry["margin"] for entry in log[-10:]) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description="What rounding a LoRA's base does.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    print(f"weights of N(0, 1/{WIDTH}), off by: a plain cast to fp8 {cast():.1%}")
    for precision in PRECISIONS[1:]:
        print(f"  {precision} {rounding(precision):.1%}")
    for seed in range(arguments.seeds):
        full = margin("bf16", seed, arguments.steps)
        others = {name: margin(name, seed, arguments.steps) / full - 1 for name in PRECISIONS[1:]}
        shown = ", ".join(f"{name} {change:+.1%}" for name, change in others.items())
        print(f"seed {seed}: margin {full:.2f} on the full base; {shown}", flush=True)


if __name__ == "__main__":
    main()
