"""A tiny LTX-2 pipeline with random weights, saved to disk in diffusers' own format."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

TEXT, LAYERS, HEADS, WIDTH = 16, 1, 2, 16  # of the text encoder; heads x width of the transformer
CHANNELS, AUDIO_CHANNELS, BINS = 8, 2, 8  # latent channels; mel bins

VERSIONS = {
    "2.0": {"transformer": {}, "connectors": {}},
    # Text is projected for each stream by the connectors, the prompt is modulated by σ, and the
    # attentions are gated.
    "2.3": {
        "transformer": {
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "use_prompt_embeddings": False,
            "perturbed_attn": True,
            "rope_type": "split",
        },
        "connectors": {
            "per_modality_projections": True,
            "video_hidden_dim": HEADS * WIDTH,
            "audio_hidden_dim": HEADS * WIDTH // 2,
            "video_gated_attn": True,
            "audio_gated_attn": True,
            "proj_bias": True,
            "rope_type": "split",
        },
    },
    # The prompt's modulation no longer depends on σ.
    "2.5": {
        "transformer": {"use_prompt_adaln_single": False, "ff_bias": False},
        "connectors": {},
    },
}
VERSIONS["2.5"] = {part: VERSIONS["2.3"][part] | VERSIONS["2.5"][part] for part in VERSIONS["2.5"]}


def save_tiny_ltx2(
    folder: Path, version: str = "2.3", seed: int = 0, layers: int = 2, **connectors
) -> Path:
    """Saves `LTX2Pipeline` with all its components, about 1 MB; `connectors` override settings."""
    torch.manual_seed(seed)
    options = VERSIONS[version]
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
            max_image_seq_len=4096, shift_terminal=0.1,
        ),
        vae=_video_vae(),
        audio_vae=_audio_vae(),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        connectors=_connectors(**options["connectors"] | connectors),
        transformer=_transformer(num_layers=layers, **options["transformer"]),
        vocoder=LTX2Vocoder(
            in_channels=2 * BINS, hidden_channels=16, upsample_kernel_sizes=[4, 11],
            upsample_factors=[2, 5], resnet_kernel_sizes=[3], resnet_dilations=[[1]],
            output_sampling_rate=8000,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _video_vae() -> AutoencoderKLLTX2Video:
    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, True),
        decoder_spatio_temporal_scaling=(True, True, True),
        encoder_spatial_padding_mode="zeros",
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.copy_(torch.randn(CHANNELS))
    vae.latents_std.copy_(torch.rand(CHANNELS) + 0.5)
    return vae


def _audio_vae() -> AutoencoderKLLTX2Audio:
    features = AUDIO_CHANNELS * BINS // 4
    vae = AutoencoderKLLTX2Audio(
        base_channels=features,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=AUDIO_CHANNELS,
        resolution=BINS,
        mel_bins=BINS,
    )
    vae.latents_mean.copy_(torch.randn(features))
    vae.latents_std.copy_(torch.rand(features) + 0.5)
    return vae


def _text_encoder() -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": 512, "hidden_size": TEXT, "intermediate_size": TEXT, "head_dim": 8,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def _tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *map(chr, range(33, 127))]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def _connectors(**options) -> LTX2TextConnectors:
    per_stream = options.get("per_modality_projections", False)
    sizes = (WIDTH, WIDTH // 2) if per_stream else (TEXT // 2, TEXT // 2)
    settings = {
        "caption_channels": TEXT,
        "text_proj_in_factor": LAYERS + 1,
        "connector_rope_base_seq_len": 32,
    }
    for stream, size in zip(("video", "audio"), sizes, strict=True):
        settings |= {
            f"{stream}_connector_num_attention_heads": HEADS,
            f"{stream}_connector_attention_head_dim": size,
            f"{stream}_connector_num_layers": 1,
            f"{stream}_connector_num_learnable_registers": 8,
        }
    return LTX2TextConnectors(**settings | options)


def tiny_transformer(version: str, layers: int = 2, seed: int = 0) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(seed)
    return _transformer(num_layers=layers, **VERSIONS[version]["transformer"])


def _transformer(**options) -> LTX2VideoTransformer3DModel:
    settings = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH,
        "cross_attention_dim": HEADS * WIDTH,
        "audio_in_channels": AUDIO_CHANNELS * BINS // 4,
        "audio_out_channels": AUDIO_CHANNELS * BINS // 4,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": WIDTH // 2,
        "audio_cross_attention_dim": HEADS * WIDTH // 2,
        "caption_channels": TEXT,
    }
    return LTX2VideoTransformer3DModel(**settings | options)
