"""Kandinsky 6 (Lite, Pro) behind the protocol of `syncdpo.models`, from its diffusers pipelines.

Everything that must agree with inference is asked of diffusers' own classes: components come from
`Kandinsky6TI2VAPipeline`, text goes through its template, its crop and both encoders, sound through
its audio VAE's own front end, and clips are sampled by it. Pictures are given to the transformer as
text-to-video does: no reference picture, empty conditioning channels, an empty mask.

    video   HunyuanVideo VAE, causal: latent frame 0 holds 1 picture, each later one 4, of 8×8
            pixels; [T·H·W, 16], times the VAE's scaling factor, before the transformer's 1×2×2
            patches, so that a frame's latents stand together and frames in a row
    audio   MMAudio's VAE on mono 44.1 kHz, 1,024 samples a latent, times its scaling factor;
            [L, C], L = ceil(seconds · 44,100 / 1,024)
    text    [1024, 3584] of Qwen2.5-VL with a mask of padding, [768] of CLIP
    noise   x_σ = (1−σ)·x + σ·ε, v = ε − x, one time 1000·σ for both streams
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_kandinsky6 import Kandinsky6RoPE1D, Kandinsky6RoPE3D
from torch import Tensor

from syncdpo.data.clips import Clip, ClipFormat
from syncdpo.models.diffusers_model import (
    DiffusersModel,
    check_clip_format,
    check_not_distilled,
    check_precision,
    place_of_work,
)
from syncdpo.models.kandinsky6_parts import Parts
from syncdpo.models.noise_levels import draw_sigma
from syncdpo.negatives.timeline import Timeline

FPS = 24.0  # of the clips that it was trained on
ATTENTIONS = ("self_attention", "cross_attention", "va_cross_attention", "av_cross_attention")
PROJECTIONS = ("to_query", "to_key", "to_value", "out_layer")
GUIDANCE = ("negative_prompt", "guidance_scale")
POLICY = {"guidance_scale": 1.0, "num_inference_steps": 16}  # what the pipeline's help asks for


def of_audio(name: str) -> bool:
    """Whether a parameter or module of the transformer, by its name, serves the sound alone:
    its stream, and how it attends to the picture, not how the picture attends to the sound.

    The modulations of either attention between the streams serve both: with `cross_gates`, as
    published, one layer makes scale and shift for one stream and the gate for the other.
    """
    return "audio" in name or "av_cross_attention" in name


class Kandinsky6(DiffusersModel):
    """A Kandinsky 6 checkpoint behind the protocol of `syncdpo.models.Model`.

    name: folder or hub id of a diffusers pipeline. Components are loaded when they are first
        needed, so training loads the transformer alone, and `prepare` all but the transformer.
    frames, height, width: the clips; 4k+1 pictures and multiples of 16 pixels.
    fps: 24; the transformer counts latents, not seconds, so at another rate the sound would lie
        elsewhere against the picture than what it has learnt.
    sigma: "shared"; the transformer has one time for both streams.
    allow_distilled: False refuses a checkpoint that is known to be distilled, as training should.
        One with PiFlow samples, but cannot be trained: it predicts no velocity.
    dtype: of weights and latents; bfloat16 on a GPU and float32 on a CPU by default.
    device: where encoders and decoders work; the GPU where there is one by default.
    text_encoder_precision: fp8, int8 or nf4 quantises Qwen2.5-VL, 16.6 GB in bf16.

    Raises ValueError for a checkpoint that is not Kandinsky 6 or has no sound, for such a clip
    format, and, when it is first needed, for a component that is missing.
    """

    family, title = "kandinsky6", "Kandinsky 6"
    encoders = ("vae", "audio_vae", "text_encoder", "text_encoder_2")
    lora_targets = tuple(f"{a}.{p}" for a in ATTENTIONS for p in PROJECTIONS)
    adds_sound = True
    of_audio = staticmethod(of_audio)
    text_tokens = 1024

    def __init__(
        self,
        name: str | Path,
        *,
        frames: int = 121,
        height: int = 512,
        width: int = 768,
        fps: float = FPS,
        sigma: str = "shared",
        allow_distilled: bool = True,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        text_encoder_precision: str = "bf16",
    ):
        if sigma != "shared":
            raise ValueError(
                f"sigma: expected shared (--sigma shared), as Kandinsky 6 has one noise level for "
                f"picture and sound, got {sigma!r}"
            )
        check_precision(text_encoder_precision)
        self.text_encoder_precision = text_encoder_precision
        self.dtype, device = place_of_work(dtype, device)
        self.parts = Parts(str(name), self.dtype, device, text_encoder_precision)
        if not allow_distilled:
            check_not_distilled(name, self.parts)
        self.config = self.parts.config("transformer")
        self._video_config = self.parts.config("vae")
        self._audio_config = self.parts.config("audio_vae")
        self._schedule = self.parts.config("scheduler")
        if self.config["patch_size"][0] != 1:
            raise ValueError(f"model: expected a transformer with patches of one frame in {name}")
        self.set_format(frames, height, width, fps)

    # --- formats ----------------------------------------------------------------------------------

    def set_format(self, frames: int, height: int, width: int, fps: float) -> None:
        """The clips to work on: pictures, pixels and pictures per second.

        May be called at any time, as before a batch of another format: nothing is loaded or moved.
        """
        stride = self._video_config["temporal_compression_ratio"]
        size = self._video_config["spatial_compression_ratio"]
        _, down, across = self.config["patch_size"]
        check_clip_format(
            frames, height, width, fps,
            first=1, stride=stride, down=size * down, across=size * across,
        )  # fmt: skip
        if fps != FPS:
            raise ValueError(
                f"fps: expected {FPS:g}, as Kandinsky 6 counts latents and not seconds, got {fps:g}"
            )
        rate, hop = self._audio_config["sample_rate"], 2 * self._audio_config["hop_length"]
        self.latent_size = ((frames - 1) // stride + 1, height // size, width // size)
        # As the pipeline computes it, in the same order.
        sounds = math.ceil(frames / fps * rate / hop)
        self._check_positions(stride, size, sounds)
        self.clip_format = ClipFormat(frames / fps, fps, height, width, rate, channels=1)
        latent_frames, rows, columns = self.latent_size
        self.timelines = (
            Timeline(latent_frames, fps / stride, tokens=rows * columns, first=1, stride=stride),
            Timeline(sounds, rate / hop),
        )

    def _check_positions(self, stride: int, size: int, sounds: int) -> None:
        """Raises ValueError for a clip beyond the positions that the transformer's tables have."""
        defaults = Kandinsky6RoPE3D.__init__.__defaults__[0]
        patches = zip(self.latent_size, self.config["patch_size"], strict=True)
        factors = zip(("frames", "height", "width"), patches, defaults, strict=True)
        for name, (latents, patch), most in factors:
            if latents // patch > most:
                limit = (most - 1) * stride + 1 if name == "frames" else most * patch * size
                raise ValueError(f"{name}: expected at most {limit}, which Kandinsky 6 has "
                                 "positions for")  # fmt: skip
        if sounds > (most := Kandinsky6RoPE1D.__init__.__defaults__[0]):
            raise ValueError(f"frames: expected at most {most} latents of sound, got {sounds}")

    def check_latents(self, sample: dict[str, Tensor]) -> None:
        """Raises ValueError where a cached sample does not fit the transformer and clip format."""
        video, audio = (timeline.frames * timeline.tokens for timeline in self.timelines)
        expected = {
            "video": [video, self.config["in_visual_dim"]],
            "audio": [audio, self.config["in_audio_dim"]],
            "text": [self.text_tokens, self.config["in_text_dim"]],
            "text_mask": [self.text_tokens],
            "pooled_text": [self.config["in_text_dim2"]],
        }
        self._check_shapes(sample, expected)

    @property
    def transformer_tokens(self) -> tuple[int, int]:
        """(S, L): what the transformer makes of a clip, a token for each patch."""
        _, down, across = self.config["patch_size"]
        frames, rows, columns = self.latent_size
        return frames * (rows // down) * (columns // across), self.timelines[1].frames

    # --- encoding ---------------------------------------------------------------------------------

    def _encode_video(self, clip: Clip) -> Tensor:
        vae = self.parts.pipeline("vae").vae
        pictures = clip.video.to(self.parts.device).movedim(-1, 0)[None].to(self.dtype) / 127.5 - 1
        latents = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
        return latents[0].movedim(0, -1).flatten(0, 2)

    def _encode_audio(self, clip: Clip) -> Tensor:
        vae = self.parts.sound_encoder()
        sound = clip.audio.mean(0, keepdim=True).float().to(self.parts.device)
        # The last latent reaches beyond the clip. A step to silence there would sound as a click,
        # so the end is mirrored, as the front end itself does with what its windows lack.
        missing = self.timelines[1].frames * vae.latent_hop_length - sound.shape[1]
        sound = F.pad(sound, (0, missing), mode="reflect")
        latents = vae.encode(sound).latent_dist.mode() * vae.config.scaling_factor
        return latents[0].mT.to(self.dtype)

    @torch.no_grad()
    def conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the transformer attends to: "text" [B,1024,C], its "text_mask" bool [B,1024], and
        "pooled_text" [B,C]."""
        pipeline = self.parts.pipeline("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        text, pooled, mask, *_ = pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.parts.device,
            dtype=self.dtype,
        )
        if mask is None:  # which the pipeline leaves out where nothing is padded
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return {"text": text, "text_mask": mask, "pooled_text": pooled}

    # --- the transformer --------------------------------------------------------------------------

    def draw_sigma(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One σ for both streams: σ = sigmoid(N(0,1) + log shift), stretched, 10 % uniform.

        That is a logit-normal level moved as the scheduler moves those of sampling,
        σ ← shift·σ / (1 + (shift − 1)·σ); shift is 5 in the published checkpoints.
        """
        sigma = draw_sigma(batch, math.log(self._schedule["shift"]), generator)
        return sigma, sigma

    def velocity(
        self,
        transformer: Callable,
        noisy: tuple[Tensor, Tensor],
        sigma: tuple[Tensor, Tensor],
        conditions: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """v = ε − x of both streams: the pipeline's own call, at the first stream's σ.

        Raises ValueError for a PiFlow checkpoint, which predicts no velocity.
        """
        if self.parts.by_policy:
            raise ValueError(
                f"model: {self.parts.name} is distilled by PiFlow and predicts no velocity; "
                "expected a checkpoint that is not distilled, which --allow-distilled cannot change"
            )
        video, audio = (latents.to(self.dtype) for latents in noisy)
        seen, heard = transformer(
            hidden_states=self._with_conditioning(video.unflatten(1, self.latent_size)),
            audio_hidden_states=audio,
            encoder_hidden_states=conditions["text"].to(self.dtype),
            pooled_projections=conditions["pooled_text"].to(self.dtype),
            timestep=sigma[0].float() * self._schedule["num_train_timesteps"],
            encoder_attention_mask=conditions["text_mask"],
            return_dict=False,
        )
        return seen.flatten(1, 3), heard

    def _with_conditioning(self, video: Tensor) -> Tensor:
        """[B,T,H,W,C] with the channels of a reference picture and their mask: there is none."""
        if not self.config["visual_cond"]:
            return video
        channels = video.shape[-1]
        return F.pad(video, (0, channels + 1))

    # --- sampling ---------------------------------------------------------------------------------

    def generate(
        self,
        captions: Sequence[str],
        seeds: Tensor,
        *,
        steps: int | None = None,
        video: Tensor | None = None,
        **guidance,
    ) -> Iterator[Clip]:
        """Clips by `Kandinsky6TI2VAPipeline` itself, one at a time, with its own guidance.

        video: [clips,S,16], latents of pictures that only want their sound; they may be fewer than
            captions, which then share them in turn. Such pictures follow the path of the noise
            levels without an error, x_σ = (1−σ)·x + σ·ε, and only the sound is the model's.
        guidance: `negative_prompt`, `guidance_scale`. With PiFlow 1.0 in 16 steps by default.

        Raises ValueError for other guidance, before anything is loaded.
        """
        if unknown := [name for name in guidance if name not in GUIDANCE]:
            raise ValueError(
                f"{', '.join(unknown)}: expected {' or '.join(GUIDANCE)}, which is all the "
                "guidance that Kandinsky 6 has"
            )
        options = (POLICY if self.parts.by_policy else {}) | guidance
        if steps is not None:
            options |= {"num_inference_steps": steps}
        return self._generate(captions, seeds, video, options)

    def _generate(
        self, captions: Sequence[str], seeds: Tensor, video: Tensor | None, options: dict
    ) -> Iterator[Clip]:
        pipeline = self.parts.pipeline(*self.parts.layout.needed)
        for clip, (caption, seed) in enumerate(zip(captions, seeds.tolist(), strict=True)):
            given = {} if video is None else self._given(video[clip % len(video)], seed)
            yield from self._call(pipeline, caption, seed, options | given)

    def _given(self, picture: Tensor, seed: int) -> dict:
        """Options that keep the pipeline's picture on the path to `picture`, [S,16]."""
        picture = picture.float().unflatten(0, self.latent_size)[None].to(self.parts.device)
        # Of another seed than the sound's noise, which would be the same numbers.
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed ^ 1))
        noise = noise.to(picture.device)

        def on_the_path(pipeline, step: int, time: Tensor, tensors: dict) -> dict:
            sigma = pipeline.scheduler.sigmas[step + 1].to(picture.device)
            return {"latents": torch.lerp(picture, noise, sigma).to(tensors["latents"].dtype)}

        return {"latents": noise.movedim(-1, 1), "callback_on_step_end": on_the_path}

    @torch.no_grad()
    def decode(self, video: Tensor, audio: Tensor) -> list[Clip]:
        """Latents [B,S,16] and [B,L,C] to clips, as the pipeline decodes what it has sampled."""
        pipeline = self.parts.pipeline("vae", "audio_vae", "vocoder")
        device, dtype = self.parts.device, self.dtype
        latents = video.to(device, dtype).unflatten(1, self.latent_size).movedim(-1, 1)
        frames = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        frames = pipeline.video_processor.postprocess_video(frames, output_type="np")
        heard = audio.to(device, dtype).mT / pipeline.audio_vae.config.scaling_factor
        mel = pipeline.audio_vae.decode(heard).sample
        return self._clips(frames, pipeline.vocoder(mel).sample[:, 0])

    def _sample_rate(self) -> int:
        return self._audio_config["sample_rate"]
