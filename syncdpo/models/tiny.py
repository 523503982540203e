"""The embedded default: diffusers' own LTX-2 transformer, small enough for two CPU cores.

2.7 M parameters over the latents of `syncdpo.models.codec`. Its base was trained on clips whose
sound was moved at random against the picture (`make base`), so it knows what sounds go with a
picture but not when: the fault that SyncDPO mends, at a size where mending it takes minutes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor

from syncdpo import ops
from syncdpo.data.clips import Clip, ClipFormat
from syncdpo.models import codec
from syncdpo.models.noise_levels import draw_sigma
from syncdpo.models.weights import load_weights, of_audio, save_weights
from syncdpo.negatives.timeline import Timeline

SECONDS = 2.0
VIDEO_FRAMES = round(SECONDS * codec.FPS) // codec.PICTURES
AUDIO_FRAMES = round(SECONDS * codec.AUDIO_RATE)
CAPTION_CHANNELS = 8
ETA = 0.9  # share of the noise's amplitude that each sampling step draws anew
SHIFT = 1.0  # of the noise levels; LTX-2's own is 0.95 at least
SAMPLING_STEPS, SAMPLED_TOGETHER = 20, 32
BASE = Path(__file__).with_name("tiny_base.safetensors")
FAMILIES_BASE = Path(__file__).with_name("tiny_families.safetensors")
MADE_BY = {
    BASE: "in 30 minutes: python -m syncdpo.demo.base",
    FAMILIES_BASE: "in an hour: python -m syncdpo.demo.base --families all",
}

CONFIG = {
    "in_channels": codec.VIDEO_CHANNELS,
    "out_channels": codec.VIDEO_CHANNELS,
    "audio_in_channels": codec.AUDIO_CHANNELS,
    "audio_out_channels": codec.AUDIO_CHANNELS,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_dim": 128,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 128,
    "caption_channels": CAPTION_CHANNELS,
    # Positions count in seconds and pixels; these are the clip's own extent.
    "pos_embed_max_pos": round(SECONDS),
    "audio_pos_embed_max_pos": round(SECONDS),
    "base_height": codec.SIZE,
    "base_width": codec.SIZE,
    "rope_double_precision": False,
}


class Tiny:
    """The embedded default behind the protocol of `syncdpo.models.Model`.

    weights: a file or folder of weights; by default the base, which comes with the source tree;
        None for random ones.
    sigma: "shared", one noise level for both streams of a clip, or "separate".
    config: overrides of `CONFIG`, for models smaller still.
    """

    clip_format = ClipFormat(SECONDS, codec.FPS, codec.SIZE, codec.SIZE, codec.SAMPLE_RATE, 1)
    timelines = (
        Timeline(VIDEO_FRAMES, codec.FPS / codec.PICTURES, tokens=codec.VIDEO_TOKENS),
        Timeline(AUDIO_FRAMES, codec.AUDIO_RATE),
    )
    velocity_sign = +1
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    adds_sound = True
    of_audio = staticmethod(of_audio)

    def __init__(
        self,
        weights: Path | str | None = BASE,
        *,
        sigma: str = "shared",
        config: dict | None = None,
    ):
        if sigma not in ("shared", "separate"):
            raise ValueError(f"sigma: expected shared or separate, got {sigma!r}")
        made = None if weights is None else MADE_BY.get(Path(weights))
        if made and not Path(weights).is_file():
            raise FileNotFoundError(
                f"weights: {Path(weights).name}, a base of the tiny model, is in the source tree, "
                f"not in the wheel: install a checkout with pip install -e, or make it {made}"
            )
        self.sigma = sigma
        self.transformer = LTX2VideoTransformer3DModel(**CONFIG | (config or {}))
        if weights is not None:
            self.load_weights(Path(weights))

    def identity(self) -> dict:
        """The codec is fixed, so its name and the clip's format say all."""
        return {"codec": "syncdpo-cells-1"} | vars(self.clip_format)

    def encode(self, clip: Clip, caption: str) -> dict[str, Tensor]:
        """Latents of a clip: video [96,40], audio [50,32]; captions are ignored."""
        return {
            "video": codec.encode_video(clip.video),
            "audio": codec.encode_audio(clip.audio.mean(0)),
        }

    def draw_sigma(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As LTX-2 draws it, one for both streams of a clip or one for each."""
        first = draw_sigma(batch, SHIFT, generator)
        if self.sigma == "shared":
            return first, first
        return first, draw_sigma(batch, SHIFT, generator)

    def velocity(
        self,
        transformer: Callable,
        noisy: tuple[Tensor, Tensor],
        sigma: tuple[Tensor, Tensor],
        conditions: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        video, audio = noisy
        batch = len(video)
        text = video.new_zeros(batch, 1, CAPTION_CHANNELS)
        return transformer(
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=text,
            audio_encoder_hidden_states=text,
            timestep=sigma[0] * 1000,
            audio_timestep=sigma[1] * 1000,
            video_coords=_video_coords(video.device).expand(batch, -1, -1, -1),
            audio_coords=_audio_coords(audio.device).expand(batch, -1, -1, -1),
            return_dict=False,
        )

    @torch.no_grad()
    def sample(
        self,
        transformer: Callable,
        conditions: dict[str, Tensor],
        seed: Tensor,
        steps: int,
        video: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From pure noise, down `sampling_sigmas`; of the noise that a step predicts, η² is new:

            x₀ = x − σ·v,   ε̂ = x + (1−σ)·v,   x ← (1−σ′)·x₀ + σ′·(√(1−η²)·ε̂ + η·ε)

        as η does in DDIM (Song et al., arXiv 2010.02502, equation 12). Fresh noise lets the model
        correct what it has begun wrongly, if it can tell. Clip b is a function of seed[b].

        video: [B,96,40], pictures that are given, without noise. They follow the same path, by
        their true velocity (x − x₀)/σ, and only the sound is the model's. They come back as they
        are, not as that path rounds them, so that two sounds to one picture share it exactly.
        """
        batch, sigmas = len(seed), sampling_sigmas(steps).to(seed.device)
        shapes = (
            (batch, VIDEO_FRAMES * codec.VIDEO_TOKENS, codec.VIDEO_CHANNELS),
            (batch, AUDIO_FRAMES, codec.AUDIO_CHANNELS),
        )

        def fresh(draw: int) -> list[Tensor]:
            return [ops.noise(s, seed, stream=2 * draw + m) for m, s in enumerate(shapes)]

        noisy = fresh(0)
        for step, (now, then) in enumerate(pairwise(sigmas)):
            sigma = now.expand(batch)
            velocity = self.velocity(transformer, noisy, (sigma, sigma), conditions)
            if video is not None:
                velocity = ((noisy[0] - video) / now, velocity[1])
            noise = [
                (1 - ETA**2) ** 0.5 * (x + (1 - now) * v) + ETA * e
                for x, v, e in zip(noisy, velocity, fresh(step + 1), strict=True)
            ]
            noisy = [
                (1 - then) * (x - now * v) + then * e
                for x, v, e in zip(noisy, velocity, noise, strict=True)
            ]
        return (noisy[0] if video is None else video, noisy[1])

    def decode(self, video: Tensor, audio: Tensor) -> list[Clip]:
        """Latents [B,96,40] and [B,50,32] to clips of 48 pictures and 32,000 samples."""
        return [
            Clip(codec.decode_video(v), codec.FPS, codec.decode_audio(a)[None], codec.SAMPLE_RATE)
            for v, a in zip(video.cpu(), audio.cpu(), strict=True)
        ]

    def generate(
        self,
        captions: Sequence[str],
        seeds: Tensor,
        *,
        steps: int | None = None,
        video: Tensor | None = None,
        **guidance,
    ) -> Iterator[Clip]:
        """Clips by `sample`, 32 at a time; there is neither text nor guidance.

        video: [clips,96,40], latents of pictures that only want their sound.
        """
        self._check_unused([*guidance, *(["caption"] if any(captions) else [])])
        transformer = self.transformer.eval()
        seeds = seeds.to(next(transformer.parameters()).device)
        groups = seeds.split(SAMPLED_TOGETHER)
        given = [None] * len(groups) if video is None else video.split(SAMPLED_TOGETHER)
        for some, pictures in zip(groups, given, strict=True):
            latents = self.sample(transformer, {}, some, steps or SAMPLING_STEPS, pictures)
            yield from self.decode(*latents)

    def check_generation(self, captions: Sequence[str]) -> None:
        """Raises ValueError for a caption."""
        self._check_unused(["caption"] if any(captions) else [])

    def _check_unused(self, options: list[str]) -> None:
        if options:
            raise ValueError(f"{', '.join(options)}: tiny takes no text and has no guidance")

    def save_weights(self, folder: Path, state: dict[str, Tensor], **options) -> None:
        save_weights(folder, self.transformer, state, **options)

    def load_weights(self, path: Path, **options) -> str:
        return load_weights(path, self.transformer, **options)


def sampling_sigmas(steps: int) -> Tensor:
    """[steps + 1] levels from 1 to 0: evenly spaced ones, shifted as those of training are."""
    shift = math.exp(SHIFT)
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def _video_coords(device: torch.device) -> Tensor:
    """[1, 3, tokens, 2]: each token's [start, end) in seconds, pixels down, pixels across."""
    frame = torch.arange(VIDEO_FRAMES, device=device) * (codec.PICTURES / codec.FPS)
    half = torch.arange(2.0, device=device) * (codec.SIZE / 2)
    start = torch.stack(torch.meshgrid(frame, half, half, indexing="ij")).flatten(1)
    extent = start.new_tensor([codec.PICTURES / codec.FPS, codec.SIZE / 2, codec.SIZE / 2])
    return torch.stack([start, start + extent[:, None]], dim=-1)[None]


def _audio_coords(device: torch.device) -> Tensor:
    """[1, 1, frames, 2]: each frame's [start, end) in seconds."""
    start = torch.arange(AUDIO_FRAMES, device=device) / codec.AUDIO_RATE
    return torch.stack([start, start + 1 / codec.AUDIO_RATE], dim=-1)[None, None]
