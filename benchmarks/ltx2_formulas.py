"""What docs/ltx2.md computes of a training step of LTX-2: operations, seconds, memory."""

from __future__ import annotations

from dataclasses import dataclass

from syncdpo.training import sizes
from syncdpo.training.memory import forward_flop

FPS, HEIGHT, WIDTH, TEXT_TOKENS = 24, 512, 768, 1024
ASSUMED = 400e12  # operations per second: 40 % of what an H100's or H200's data sheet has, rounded
SPARE_GB = 3  # left for CUDA and fragmentation


@dataclass(frozen=True)
class Size:
    """Of a transformer: `cross` is the width in which the streams attend to each other."""

    layers: int = 48
    video: int = 4096
    audio: int = 2048
    cross: int = 2048
    text: int = TEXT_TOKENS
    weights: float = 18.9e9
    adapter: float = 214e6

    multiplications = sizes.Size.multiplications


FORWARDS = {"sft": 3, "syncdpo": 8, "cache_reference": 6, "split_pair": 10}
SAMPLES = {"sft": 1, "syncdpo": 2, "cache_reference": 2, "split_pair": 1}  # held at once


def tokens(pictures: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[int, int]:
    """(S, L): tokens of the picture, 8×32×32 pixels each, and of the sound, 25 a second."""
    return ((pictures - 1) // 8 + 1) * (height // 32) * (width // 32), round(pictures / FPS * 25)


def step_flop(size: Size, mode: str, video_tokens: int, audio_tokens: int) -> float:
    return FORWARDS[mode] * forward_flop(size, video_tokens, audio_tokens)


def step_seconds(size: Size, mode: str, *streams: int, rate: float = ASSUMED) -> float:
    return step_flop(size, mode, *streams) / rate


def step_gigabytes(size: Size, mode: str, video_tokens: int, audio_tokens: int) -> float:
    """Weights, LoRA with gradients and AdamW; of each sample held the checkpoints and one block."""
    video, audio = size.video * video_tokens, size.audio * audio_tokens
    checkpoints = 2 * size.layers * (video + audio)
    block = 110 * video + 0.13e9
    held = SAMPLES[mode] * (checkpoints + block)
    return (2 * size.weights + 16 * size.adapter + held) / 1e9
