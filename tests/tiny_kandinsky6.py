"""A tiny Kandinsky 6 pipeline with random weights, saved to disk in diffusers' own format."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    PiflowScheduler,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

TEXT, POOLED, CHANNELS, SOUNDS = 16, 8, 4, 6  # widths of both texts; latent channels
WIDTH, NARROW, HEAD = 32, 16, 8  # of the streams and their heads
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PUBLISHED = {  # of the architecture's variants, the one that has published weights
    "ca_rope": True, "cross_gates": True, "fix_modulation": True, "text_token_padding": True,
    "visual_token_type_num_embeddings": 2,
}  # fmt: skip
LITE = {  # the transformer of the published Lite, by its config.json
    "model_dim": 1792, "model_dim_a": 896, "ff_dim": 7168, "ff_dim_a": 3584, "time_dim": 512,
    "time_dim_a": 512, "num_text_blocks": 2, "num_visual_blocks": 32, "axes_dims": (16, 24, 24),
    "axes_dims_a": (16, 24, 24), "in_audio_dim": 40, "out_audio_dim": 40, "in_visual_dim": 16,
    "out_visual_dim": 16, "in_text_dim": 3584, "in_text_dim2": 768, "visual_cond": True,
    "patch_size": (1, 2, 2), "audio_freqs_scaling": 0.144, **PUBLISHED,
}  # fmt: skip
INDEX = {
    "_class_name": "Kandinsky6TI2VAPipeline",
    "_diffusers_version": "0.42.1",
    "transformer": ["diffusers", "Kandinsky6Transformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    "audio_vae": ["diffusers", "MMAudioVAE"],
    "vocoder": ["diffusers", "MMAudioVocoder"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2_5_VLProcessor"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}


def save_tiny_kandinsky6(folder: Path, seed: int = 0, piflow: int = 0, **transformer) -> Path:
    """Saves all components and model_index.json, about 1 MB; `transformer` overrides settings.

    piflow: velocities that the transformer predicts at once, with `PiflowScheduler`.
    """
    torch.manual_seed(seed)
    if piflow:
        grid = {"out_visual_dim": piflow * CHANNELS, "out_audio_dim": piflow * SOUNDS}
        transformer |= grid
    parts = {
        "transformer": tiny_transformer(**transformer),
        "vae": video_vae(),
        "audio_vae": audio_vae(),
        "vocoder": vocoder(),
        "text_encoder": _text_encoder(),
        "text_encoder_2": _pooling_encoder(),
        "tokenizer": _tokenizer(),
        "tokenizer_2": _second_tokenizer(),
        "scheduler": PiflowScheduler(n_grid=piflow)
        if piflow
        else FlowMatchEulerDiscreteScheduler(shift=5.0),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    _save_processor(folder / "tokenizer")
    index = dict(INDEX)
    if piflow:
        index["scheduler"] = ["diffusers", "PiflowScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_transformer(**options) -> Kandinsky6Transformer3DModel:
    settings = {
        "in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "in_audio_dim": SOUNDS,
        "out_audio_dim": SOUNDS, "in_text_dim": TEXT, "in_text_dim2": POOLED, "time_dim": 16,
        "model_dim": WIDTH, "model_dim_a": NARROW, "ff_dim": 2 * WIDTH, "ff_dim_a": 2 * NARROW,
        "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (2, 2, 4),
        "axes_dims_a": (2, 2, 4), "audio_freqs_scaling": 0.144, **PUBLISHED,
    }  # fmt: skip
    return Kandinsky6Transformer3DModel(**settings | options)


def video_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def audio_vae() -> MMAudioVAE:
    return MMAudioVAE(
        mel_bins=16, latent_channels=SOUNDS, hidden_channels=8, channel_multipliers=(1, 2),
        layers_per_block=1, scaling_factor=0.5302,
    )  # fmt: skip


def vocoder() -> MMAudioVocoder:
    """Of 512 samples for each mel frame, as the published one."""
    return MMAudioVocoder(
        num_mels=16, upsample_initial_channel=8, upsample_rates=(16, 32),
        upsample_kernel_sizes=(32, 64), resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
    )  # fmt: skip


def _text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300, "hidden_size": TEXT, "intermediate_size": TEXT,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1,
            "out_hidden_size": TEXT, "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def _pooling_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600, hidden_size=POOLED, intermediate_size=POOLED, num_hidden_layers=1,
            num_attention_heads=1, eos_token_id=2 * len(ByteLevel.alphabet()) + 1,
            bos_token_id=2 * len(ByteLevel.alphabet()),
        )
    )  # fmt: skip


def _tokenizer() -> Qwen2Tokenizer:
    """A token for every byte, and those of the template."""
    tokens = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=list(SPECIAL[1:]))


def _second_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def _save_processor(folder: Path) -> None:
    """What Qwen2.5-VL's processor keeps beside its tokenizer: settings for pictures and films."""
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    films = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(films))
