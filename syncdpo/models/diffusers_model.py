"""What models share whose components are those of a diffusers pipeline.

A family brings its clip formats, how pictures, sound and text become what its transformer reads,
and what its pipeline is called with; the rest of `syncdpo.models.Model` is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from syncdpo.data.clips import Clip, ClipFormat
from syncdpo.models.diffusers_parts import Components
from syncdpo.models.quantised import PRECISIONS
from syncdpo.models.weights import load_weights, save_weights
from syncdpo.negatives.timeline import Timeline


class DiffusersModel(ABC):
    """Half of a model behind the protocol of `syncdpo.models.Model`; a family is the other half.

    family: what caches call it; title: what sentences call it.
    encoders: components whose weights a cache depends on.
    """

    family: str
    title: str
    encoders: tuple[str, ...]
    velocity_sign = +1
    adds_sound = False
    parts: Components
    clip_format: ClipFormat
    timelines: tuple[Timeline, Timeline]
    text_encoder_precision: str
    _text: tuple[tuple, dict[str, Tensor]] | None = None  # of the caption encoded last

    # --- formats ----------------------------------------------------------------------------------

    def identity(self) -> dict:
        """Fingerprints of the encoders' weights, their precisions, and the clip format."""
        encoders = {name: self.parts.fingerprint(name) for name in self.encoders}
        # Caches that a bf16 audio VAE made are off by 18 times the rounding of their latents.
        precision = {"audio_vae_dtype": "float32"}
        if self.text_encoder_precision != "bf16":
            precision["text_encoder_precision"] = self.text_encoder_precision
        return {"model": self.family} | encoders | precision | vars(self.clip_format)

    def _check_shapes(self, sample: dict[str, Tensor], expected: dict[str, list[int]]) -> None:
        """Raises ValueError where a cached sample has not the shapes that `expected` says."""
        for name, shape in expected.items():
            found = list(sample[name].shape) if name in sample else "nothing"
            if found != shape:
                raise ValueError(
                    f"{name}: expected [tokens, channels] of {shape} for {self.parts.name}, "
                    f"got {found}"
                )

    # --- encoding ---------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, clip: Clip, caption: str) -> dict[str, Tensor]:
        """One clip: "video" [S,C], "audio" [L,C], normalised and packed, and `conditions`."""
        return {
            "video": self._encode_video(clip),
            "audio": self._encode_audio(clip),
        } | self._conditions_of(caption)

    def _conditions_of(self, caption: str) -> dict[str, Tensor]:
        """`conditions` of one caption, which the next clip may have too: both of a pair do."""
        asked = (caption, self.text_encoder_precision)
        if self._text is None or self._text[0] != asked:
            told = {name: tensor[0] for name, tensor in self.conditions([caption]).items()}
            self._text = asked, told
        return dict(self._text[1])

    @abstractmethod
    def _encode_video(self, clip: Clip) -> Tensor:
        """[S,C]"""

    @abstractmethod
    def _encode_audio(self, clip: Clip) -> Tensor:
        """[L,C]"""

    @abstractmethod
    def conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the transformer attends to, each [B, …]."""

    # --- the transformer --------------------------------------------------------------------------

    @property
    def transformer(self) -> nn.Module:
        return self.parts["transformer"]

    # --- sampling ---------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, captions: Sequence[str], seeds: Tensor, *, steps: int | None = None, **guidance
    ) -> Iterator[Clip]:
        """Clips by the pipeline itself, one at a time, with its own guidance and defaults.

        guidance: options of the pipeline's call (`negative_prompt`, `guidance_scale`, …).
        """
        pipeline = self.parts.pipeline(*self.parts.layout.needed)
        options = guidance if steps is None else guidance | {"num_inference_steps": steps}
        for caption, seed in zip(captions, seeds.tolist(), strict=True):
            yield from self._call(pipeline, caption, seed, options)

    def _call(self, pipeline, caption: str, seed: int, options: dict) -> list[Clip]:
        video, audio = pipeline(
            caption,
            height=self.clip_format.height,
            width=self.clip_format.width,
            num_frames=round(self.clip_format.seconds * self.clip_format.fps),
            frame_rate=self.clip_format.fps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            return_dict=False,
            **options,
        )
        return self._clips(video, audio)

    def check_generation(self, captions: Sequence[str]) -> None:
        """Raises ValueError for want of a caption, or of a component, whose mend it names."""
        if not all(captions):
            raise ValueError(f"caption: expected text, which {self.title} generates from, got none")
        self.parts.find(*self.parts.layout.needed)

    def put_aside(self) -> None:
        """All that training does not need back into the machine's memory, to leave the GPU's."""
        self.parts.put_aside()

    @abstractmethod
    def _sample_rate(self) -> int:
        """Of the sound that the pipeline makes."""

    def _clips(self, video: np.ndarray, audio: Tensor | np.ndarray) -> list[Clip]:
        """video [B,T,H,W,3] in [0, 1], audio [B,C,N], or [B,N] where it is mono."""
        pictures = torch.from_numpy(video).mul(255).round().to(torch.uint8)
        audio = torch.as_tensor(audio).float().cpu().clamp(-1, 1)
        audio = audio[:, None] if audio.ndim == 2 else audio
        return [
            Clip(frames, self.clip_format.fps, sound, self._sample_rate())
            for frames, sound in zip(pictures, audio, strict=True)
        ]

    # --- weights ----------------------------------------------------------------------------------

    def save_weights(self, folder: Path, state: dict[str, Tensor], **options) -> None:
        save_weights(folder, self.transformer, state, **options)

    def load_weights(self, path: Path, **options) -> str:
        return load_weights(path, self.transformer, **options)


def place_of_work(
    dtype: str | torch.dtype | None, device: str | torch.device | None
) -> tuple[torch.dtype, torch.device]:
    """(dtype, device): bfloat16 on the GPU where there is one, float32 on the CPU by default."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or default, device


def check_precision(text_encoder_precision: str) -> None:
    if text_encoder_precision not in PRECISIONS:
        raise ValueError(
            f"text_encoder_precision: expected {', '.join(PRECISIONS)}, "
            f"got {text_encoder_precision!r}"
        )


def check_not_distilled(name: str | Path, parts: Components) -> None:
    """Raises ValueError for a checkpoint that is known to be distilled, as training should."""
    if parts.distilled:
        raise ValueError(
            f"model: {name} is distilled, as {parts.distilled} says; expected the full "
            "model to train, or --allow-distilled"
        )


def check_clip_format(
    frames: int, height: int, width: int, fps: float, *,
    first: int, stride: int, down: int, across: int,
) -> None:  # fmt: skip
    """Raises ValueError unless the codec takes `first` pictures and a multiple of `stride` more,
    and sides that are multiples of `down` and `across` pixels."""
    if frames < first or (frames - first) % stride:
        raise ValueError(f"frames: expected a multiple of {stride} plus {first}, got {frames}")
    for name, size, factor in (("height", height, down), ("width", width, across)):
        if size < factor or size % factor:
            raise ValueError(f"{name}: expected a multiple of {factor}, got {size}")
    if not fps > 0:
        raise ValueError(f"fps: expected more than 0, got {fps}")
