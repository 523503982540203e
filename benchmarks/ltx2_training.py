"""What benchmarks/ltx2_step.py measures: LTX-2 with random weights, and a training step of it."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import LTX2VideoTransformer3DModel
from ltx2_clock import Clock
from ltx2_formulas import FPS, HEIGHT, WIDTH, Size
from torch import Tensor, nn

from syncdpo.models.ltx2 import LTX2
from syncdpo.negatives.curriculum import curriculum
from syncdpo.train import Learner, mean_over_processes, policy_and_reference
from syncdpo.training.config import TrainConfig
from syncdpo.training.dice import Dice, Order
from syncdpo.training.memory import needed_bytes, size_of
from syncdpo.training.optimizers import make_optimizer
from syncdpo.training.sharding import place_trained

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny_ltx2 import VERSIONS

CONFIG = TrainConfig(
    batch_size=1,
    lora_rank=32,
    learning_rate=1e-4,
    normalize=True,
    beta_audio=5.0,
    gradient_checkpointing=True,
    mixed_precision="bf16",
)
MODES = {
    "sft": {"method": "sft"},
    "syncdpo": {},
    "cache_reference": {"cache_reference": 1},
    "split_pair": {"split_pair": True},
}


class RandomLTX2(LTX2):
    """LTX-2 without a checkpoint: its transformer with random weights, made on `device`."""

    def __init__(self, settings: dict, device: torch.device, *, height: int, width: int):
        self.dtype, self.sigma = torch.bfloat16, "shared"
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            # torch's own initialisation keeps every layer's output near or below its input's
            # size; the rotary positions name their precision themselves.
            with device:
                transformer = LTX2VideoTransformer3DModel(**settings)
        finally:
            torch.set_default_dtype(before)
        self.parts = {"transformer": transformer}
        self.config = dict(transformer.config)
        self._audio_config = {"sample_rate": self.config["audio_sampling_rate"], "in_channels": 2}
        self._schedule = {}  # the pipeline's own defaults
        self.height, self.width = height, width
        self.set_length(121)

    def set_length(self, pictures: int) -> None:
        self.set_format(pictures, self.height, self.width, FPS)

    def streams(self) -> tuple[int, int]:
        video, audio = (line.frames * line.tokens for line in self.timelines)
        return video, audio

    def clip(self, text_tokens: int) -> dict[str, Tensor]:
        """Random latents and text of one clip as a cache gives them: on the host, in bf16."""
        video, audio = self.streams()
        shapes = {
            "video": (video, self.config["in_channels"]),
            "audio": (audio, self.config["audio_in_channels"]),
            "video_text": (text_tokens, self.config["cross_attention_dim"]),
            "audio_text": (text_tokens, self.config["audio_cross_attention_dim"]),
        }
        source = torch.Generator().manual_seed(video)
        return {
            name: torch.randn(shape, generator=source).to(self.dtype)
            for name, shape in shapes.items()
        }


def settings(dry: bool) -> dict:
    """Of the transformer: 2.3's, all sizes the class's own; or few and narrow layers."""
    tiny = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "in_channels": 8,
        "out_channels": 8,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
    }
    return VERSIONS["2.3"]["transformer"] | (tiny if dry else {})


@dataclass
class Bench:
    """What all measurements share: the model, its adapter and the optimizer."""

    model: RandomLTX2
    accelerator: Accelerator
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    size: Size  # of the model at hand, or docs/ltx2.md's
    config: TrainConfig

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def learner(self, mode: str, clock: Clock) -> tuple[Learner, Dice, dict[str, Tensor]]:
        """As `train` makes them, for a run of one clip; with its reference's errors if asked."""
        config = replace(self.config, **MODES[mode])
        order = Order(config, 1, self.accelerator)
        dice = Dice(config, self.model, curriculum(config.curriculum), order, self.device)
        learner = Learner(config, self.accelerator, self.model, self.policy, None, False)
        clip = self.model.clip(self.size.text)
        if config.cache_reference:
            with clock.stretch("reference"):
                learner.cache_reference([clip], dice)
        return learner, dice, {name: x[None] for name, x in clip.items()}

    def gigabytes(self, mode: str) -> float:
        """As `syncdpo train --estimate` computes them, nothing to spare."""
        config = replace(self.config, **MODES[mode])
        needs = needed_bytes(config, size_of(config, self.model), *self.model.streams())
        return (sum(needs.values()) - needs["spare"]) / 1e9

    def make_pairs(self, dice: Dice, clip: dict[str, Tensor], steps: int) -> None:
        """Those of the first steps: Triton compiles when it meets a kind of pair, amid any step."""
        latents = [clip[name].to(self.device) for name in ("video", "audio")]
        for step in range(steps):
            if pairs := dice.roll(step, 0).pairs:
                pairs.make(*latents)

    def step(self, learner: Learner, dice: Dice, clip: dict, step: int, clock: Clock) -> float:
        """One step of `train`'s loop; seconds until the last of its backward was launched."""
        since = time.perf_counter()
        batch = {name: x.to(self.device) for name, x in clip.items()}
        with clock.stretch("draw"):
            roll = dice.roll(step, 0)
        metrics = learner.backward(batch, roll)
        launched = time.perf_counter() - since
        metrics = mean_over_processes(self.accelerator, [metrics])
        norm = self.accelerator.clip_grad_norm_(
            self.policy.parameters(), CONFIG.max_grad_norm
        ).item()
        if not math.isfinite(metrics["loss"] + norm):
            raise RuntimeError(f"step {step}: loss {metrics['loss']}, gradient's norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return launched


def build(dry: bool, device: torch.device, config: TrainConfig) -> tuple[Bench, dict[str, float]]:
    """The bench, and the seconds of each stage of making it."""
    seconds, since = {}, time.perf_counter()
    # A dry run stays on the CPU also where there is a GPU.
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=CONFIG.mixed_precision)
    height, width = (64, 64) if dry else (HEIGHT, WIDTH)
    # Where the full weights need not fit on the GPU, they are made beside it.
    whole = config.base_precision == "bf16" and config.offload == "none"
    made_on = device if whole else torch.device("cpu")
    model = RandomLTX2(settings(dry), made_on, height=height, width=width)
    synchronise(device)
    seconds["weights"], since = time.perf_counter() - since, time.perf_counter()
    weights = sum(p.numel() for p in model.transformer.parameters())
    with made_on:
        policy, _ = policy_and_reference(config, model, device=device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = make_optimizer(config, trained)
    policy, optimizer = place_trained(config, accelerator, policy, optimizer)
    synchronise(device)
    seconds["adapter"] = time.perf_counter() - since
    size = Size()
    if dry:
        widths = {"layers": 2, "video": 32, "audio": 16, "cross": 16, "text": 32}
        size = Size(**widths, weights=weights, adapter=sum(p.numel() for p in trained))
    stages = ", ".join(f"{name} {stage:.1f}" for name, stage in seconds.items())
    count = sum(p.numel() for p in trained)
    print(f"{weights:,} weights, {count:,} of the LoRA; made in seconds: {stages}", flush=True)
    return Bench(model, accelerator, policy, optimizer, size, config), seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
