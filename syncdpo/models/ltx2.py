"""LTX-2 (2.0, 2.3, 2.5) behind the protocol of `syncdpo.models`, from any of its checkpoints.

Everything that must agree with inference is asked of diffusers' own classes: components come from
`LTX2Pipeline`, latents are normalised and packed by its functions, text goes through its encoder
and connectors. What diffusers lacks is the way from a waveform to the audio VAE's log-mel input,
and the distribution of σ in training; both follow the model's published trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import LTX2Pipeline
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

from syncdpo.data.clips import Clip, ClipFormat
from syncdpo.models.diffusers_model import (
    DiffusersModel,
    check_clip_format,
    check_not_distilled,
    check_precision,
    place_of_work,
)
from syncdpo.models.ltx2_parts import Parts
from syncdpo.models.noise_levels import draw_sigma
from syncdpo.models.weights import of_audio
from syncdpo.negatives.timeline import Timeline

MEL_WINDOW = 1024  # samples of one Fourier transform at the audio VAE's sample rate
LOWEST_MEL = 1e-5


class LTX2(DiffusersModel):
    """An LTX-2 checkpoint behind the protocol of `syncdpo.models.Model`.

    name: folder or hub id of a diffusers pipeline, or a `.safetensors` file of Lightricks.
        Components are loaded when they are first needed, so training loads the transformer alone,
        and `prepare` all but the transformer.
    frames, height, width, fps: the clips; 8k+1 pictures and multiples of 32 pixels.
    sigma: "separate", one σ for each stream of a clip, as LTX-2's trainer draws them, or "shared".
    shift_bound: tokens from which σ's shift grows no more; 0: it has no bound, as in the trainer.
    text_encoder, video_vae, audio_vae: file or folder with that component, which the checkpoint
        lacks or which is to replace its own; the audio VAE's holds the vocoder, too.
    allow_distilled: False refuses a checkpoint that is known to be distilled, as training should.
    dtype: of weights and latents; bfloat16 on a GPU and float32 on a CPU by default.
    device: where encoders and decoders work; the GPU where there is one by default.
    text_encoder_precision: fp8, int8 or nf4 quantises the text encoder, 24 GB in bf16.

    Raises ValueError for a checkpoint that is not LTX-2 or has no sound, for such a clip format,
    and, when it is first needed, for a component that is missing.
    """

    family, title = "ltx2", "LTX-2"
    encoders = ("vae", "audio_vae", "text_encoder", "connectors")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    of_audio = staticmethod(of_audio)
    text_tokens = 1024
    shift_bound = 0

    def __init__(
        self,
        name: str | Path,
        *,
        frames: int = 121,
        height: int = 512,
        width: int = 768,
        fps: float = 24.0,
        sigma: str = "separate",
        shift_bound: int = 0,
        text_encoder: str | Path | None = None,
        video_vae: str | Path | None = None,
        audio_vae: str | Path | None = None,
        allow_distilled: bool = True,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        text_encoder_precision: str = "bf16",
    ):
        if sigma not in ("shared", "separate"):
            raise ValueError(f"sigma: expected shared or separate, got {sigma!r}")
        check_precision(text_encoder_precision)
        self.text_encoder_precision = text_encoder_precision
        self.dtype, device = place_of_work(dtype, device)
        self.sigma, self.shift_bound = sigma, shift_bound
        others = {"text_encoder": text_encoder, "video_vae": video_vae, "audio_vae": audio_vae}
        self.parts = Parts(str(name), self.dtype, device, text_encoder_precision, **others)
        if not allow_distilled:
            check_not_distilled(name, self.parts)
        self.config = self.parts.config("transformer")
        if (self.config["patch_size"], self.config["patch_size_t"]) != (1, 1):
            raise ValueError(f"model: expected a transformer with patches of size 1 in {name}")
        self._audio_config = self.parts.config("audio_vae")
        self._schedule = self.parts.config("scheduler")
        self.set_format(frames, height, width, fps)

    # --- formats ----------------------------------------------------------------------------------

    def set_format(self, frames: int, height: int, width: int, fps: float) -> None:
        """The clips to work on: pictures, pixels and pictures per second.

        May be called at any time, as before a batch of another format: nothing is loaded or moved.
        """
        stride, down, across = self.config["vae_scale_factors"]
        first = self.config["causal_offset"]
        check_clip_format(
            frames, height, width, fps, first=first, stride=stride, down=down, across=across
        )
        self.clip_format = ClipFormat(
            seconds=frames / fps,
            fps=fps,
            height=height,
            width=width,
            sample_rate=self._audio_config["sample_rate"],
            channels=self._audio_config["in_channels"],
        )
        self.latent_size = ((frames - first) // stride + 1, height // down, width // across)
        audio_stride = self.config["audio_scale_factor"]
        audio_rate = self.config["audio_sampling_rate"] / self.config["audio_hop_length"]
        audio_rate /= audio_stride
        latent_frames, rows, columns = self.latent_size
        # Both codecs are causal: the first latent frame stands for one picture, one mel frame.
        self.timelines = (
            Timeline(
                latent_frames, fps / stride, tokens=rows * columns, first=first, stride=stride
            ),
            Timeline(
                round(frames / fps * audio_rate), audio_rate, first=first, stride=audio_stride
            ),
        )

    def check_latents(self, sample: dict[str, Tensor]) -> None:
        """Raises ValueError where a cached sample does not fit the transformer and clip format."""
        video, audio = (timeline.frames * timeline.tokens for timeline in self.timelines)
        expected = {
            "video": [video, self.config["in_channels"]],
            "audio": [audio, self.config["audio_in_channels"]],
        }
        if "video_features" in sample:
            connectors = self.parts.config("connectors")
            for name in ("video", "audio"):
                heads = connectors[f"{name}_connector_num_attention_heads"]
                width = heads * connectors[f"{name}_connector_attention_head_dim"]
                expected[f"{name}_features"] = [self.text_tokens, width]
        self._check_shapes(sample, expected)

    # --- encoding ---------------------------------------------------------------------------------

    def _encode_video(self, clip: Clip) -> Tensor:
        vae = self.parts.pipeline("vae").vae
        pictures = clip.video.to(self.parts.device).movedim(-1, 0)[None].to(self.dtype) / 127.5 - 1
        latents = vae.encode(pictures).latent_dist.mode()
        latents = LTX2Pipeline._normalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        return LTX2Pipeline._pack_latents(latents)[0]

    def _encode_audio(self, clip: Clip) -> Tensor:
        vae = self.parts.sound_encoder()
        mel = log_mel(clip.audio, vae.config).to(self.parts.device)
        latents = LTX2Pipeline._pack_audio_latents(vae.encode(mel[None]).latent_dist.mode())
        latents = LTX2Pipeline._normalize_audio_latents(latents, vae.latents_mean, vae.latents_std)
        # The codec is causal: what it makes of the samples past the last whole frame can go.
        return latents[0, : self.timelines[1].frames].to(self.dtype)

    @torch.no_grad()
    def conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the transformer attends to: "video_text" and "audio_text", [B,1024,C]."""
        pipeline = self.parts.pipeline("text_encoder", "tokenizer", "connectors")
        hidden, mask, _, _ = pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.parts.device,
        )
        video, audio, mask = pipeline.connectors(
            hidden, mask, padding_side=pipeline.tokenizer.padding_side
        )
        # The connectors put learnt registers in place of padding, so nothing is left to mask, and
        # attention to the text runs without a bias.
        if not mask.all():
            raise ValueError(f"model: expected connectors that fill padding in {self.parts.name}")
        return {"video_text": video, "audio_text": audio}

    @torch.no_grad()
    def _connect(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Text features, as the LTX-2 trainer caches them, through the connectors' transformers."""
        connectors = self.parts.pipeline("connectors").connectors
        padding = ~conditions["text_mask"].bool()
        bias = torch.zeros_like(padding, dtype=self.dtype)
        bias = bias.masked_fill(padding, torch.finfo(self.dtype).min)[:, None, None]
        return {
            f"{name}_text": getattr(connectors, f"{name}_connector")(
                conditions[f"{name}_features"].to(self.dtype), bias
            )[0]
            for name in ("video", "audio")
        }

    # --- the transformer --------------------------------------------------------------------------

    def draw_sigma(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """σ = sigmoid(N(0,1) + μ), stretched, 10 % uniform; see `draw_sigma`."""
        video, audio = (timeline.frames * timeline.tokens for timeline in self.timelines)
        sigma = draw_sigma(batch, self._shift(video), generator)
        if self.sigma == "shared":
            return sigma, sigma
        return sigma, draw_sigma(batch, self._shift(audio), generator)

    def _shift(self, tokens: int) -> float:
        """μ: linear in the number of tokens, 0.95 at 1024 and 2.05 at 4096, on to either side."""
        if self.shift_bound:
            tokens = min(tokens, self.shift_bound)
        return calculate_shift(tokens, *self._shift_arguments())

    def _shift_arguments(self) -> tuple[float, ...]:
        """`calculate_shift`'s settings, with the pipeline's own defaults for LTX-2."""
        return tuple(
            self._schedule.get(key, default)
            for key, default in (
                ("base_image_seq_len", 1024),
                ("max_image_seq_len", 4096),
                ("base_shift", 0.95),
                ("max_shift", 2.05),
            )
        )

    def velocity(
        self,
        transformer: Callable,
        noisy: tuple[Tensor, Tensor],
        sigma: tuple[Tensor, Tensor],
        conditions: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """v = ε − x of both streams, packed: the pipeline's own call, with a σ for each stream."""
        if "video_features" in conditions:
            conditions = self._connect(conditions)
        video, audio = (latents.to(self.dtype) for latents in noisy)
        scale = self.config["timestep_scale_multiplier"]
        video_time, audio_time = (level.float() * scale for level in sigma)
        frames, height, width = self.latent_size
        return transformer(
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=conditions["video_text"].to(self.dtype),
            audio_encoder_hidden_states=conditions["audio_text"].to(self.dtype),
            timestep=video_time,
            audio_timestep=audio_time,
            sigma=video_time,
            audio_sigma=audio_time,
            num_frames=frames,
            height=height,
            width=width,
            fps=self.clip_format.fps,
            audio_num_frames=self.timelines[1].frames,
            # Since 2.3 the cross-modal attentions are modulated by the *other* stream's σ.
            use_cross_timestep=self.config["cross_attn_mod"],
            return_dict=False,
        )

    # --- sampling ---------------------------------------------------------------------------------

    def _call(self, pipeline, caption: str, seed: int, options: dict) -> list[Clip]:
        own = {"use_cross_timestep": self.config["cross_attn_mod"]}
        return super()._call(pipeline, caption, seed, own | options)

    def _sample_rate(self) -> int:
        return self.parts["vocoder"].config.output_sampling_rate


def log_mel(audio: Tensor, config) -> Tensor:
    """The audio VAE's input: log max(mel, 1e-5) [C,T,bins] of a waveform [C,N], float32.

    Slaney's mel bands of the magnitudes of a centred Fourier transform of 1024 samples; one frame
    every `config.mel_hop_length` samples, frame j about sample j * hop.
    """
    mel = MelSpectrogram(
        sample_rate=config.sample_rate,
        n_fft=MEL_WINDOW,
        hop_length=config.mel_hop_length,
        n_mels=config.mel_bins,
        power=1.0,
        norm="slaney",
        mel_scale="slaney",
    )(audio.float())
    return mel.clamp(min=LOWEST_MEL).log().mT
