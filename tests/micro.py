"""A model and data so small that a training step takes milliseconds."""

import contextlib
import os

import torch
from safetensors.torch import load_file

from syncdpo.models.tiny import Tiny
from syncdpo.models.weights import FULL, LORA
from syncdpo.train import train
from syncdpo.training.checkpoint import read_log
from syncdpo.training.config import TrainConfig

STEPS = 20

CONFIG = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
}


def micro_model(**config) -> Tiny:
    """The embedded default's class with random weights, always the same ones."""
    torch.manual_seed(0)
    return Tiny(weights=None, config=CONFIG | config)


def random_latents(count: int = 10) -> list[dict[str, torch.Tensor]]:
    """What `LatentDataset` would give: smooth along time, so that distortions are small changes."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(count, 24, 4, 40, generator=generator).cumsum(1) / 5
    audio = torch.randn(count, 50, 32, generator=generator).cumsum(1) / 7
    return [{"video": v.flatten(0, 1), "audio": a} for v, a in zip(video, audio, strict=True)]


def random_pairs(count: int = 10) -> list[dict[str, torch.Tensor]]:
    """What a cache of pairs would give: losers with a shifted sound and other pictures."""
    clips = random_latents(2 * count)
    return [
        win | {"audio_lose": win["audio"].roll(9, 0), "video_lose": (win["video"] + x["video"]) / 2}
        for win, x in zip(clips[:count], clips[count:], strict=True)
    ]


def run(folder, clips=10, dtype=torch.float32, **settings):
    """A short run; → (its log, its weights).

    The learning rate is small: keys of the one text token have no gradient but rounding, which
    AdamW turns into whole steps.
    """
    defaults = {"steps": STEPS, "batch_size": 4, "warmup": 2, "learning_rate": 3e-5}
    config = TrainConfig(output=str(folder), **defaults | settings)
    model = micro_model()
    model.transformer.to(dtype)
    data = random_pairs(clips) if config.method == "dpo" else random_latents(clips)
    result = train(config, model, data, progress=False)
    assert result["steps"] == config.steps
    return outcome(folder)


def outcome(folder):
    """What a finished run left: its log, its weights."""
    file = next(folder / name for name in (FULL, LORA) if (folder / name).exists())
    return read_log(folder), load_file(file)


def run_or_resume(folder, **settings):
    """In a process of its own, to be killed at any time."""
    torch.set_num_threads(1)
    run(folder, resume=True, **{"checkpoint_every": 1} | settings)


@contextlib.contextmanager
def one_process_of_two(rank, port):
    """What is trained meanwhile shares its batches with the other process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "1",
    }
    torch.set_num_threads(1)
    yield
    torch.distributed.destroy_process_group()


def one_of_two(rank, port, folder):
    """One of two processes that share each batch of four."""
    with one_process_of_two(rank, port):
        run(folder, batch_size=2)
