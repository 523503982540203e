"""Tiny LTX-2 checkpoints as Lightricks lay them out, with random weights: one file, or several.

Settings are in the words of the published files' headers. Tensors get Lightricks' names by the
table below, the other way round than the package reads them; test_ltx2_real_client.py holds these
names against Lightricks' own classes.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_ltx2 import AUDIO_CHANNELS, BINS, CHANNELS, HEADS, LAYERS, TEXT, WIDTH

from syncdpo.models import ltx2_checkpoints, ltx2_settings

VIDEO, AUDIO = HEADS * WIDTH, HEADS * WIDTH // 2
TRANSFORMER = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "cross_attention_dim": VIDEO,
    "caption_channels": TEXT,
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": WIDTH // 2,
    "audio_in_channels": AUDIO_CHANNELS * BINS // 4,
    "audio_out_channels": AUDIO_CHANNELS * BINS // 4,
    "audio_cross_attention_dim": AUDIO,
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "connector_num_attention_heads": HEADS,
    "connector_attention_head_dim": TEXT // HEADS,
    "connector_num_layers": 1,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
    "rope_type": "split",
    "frequencies_precision": "float64",
    # The same in every published file, and asked for by Lightricks' own loader.
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
}
SINCE_23 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "connector_apply_gated_attention": True,
    "connector_attention_head_dim": WIDTH,
    "audio_connector_num_attention_heads": HEADS,
    "audio_connector_attention_head_dim": WIDTH // 2,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
}
SINCE_25 = {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": CHANNELS,
    "patch_size": 4,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "causal_decoder": False,
    "timestep_conditioning": False,
    "decoder_base_channels": 4,
}
DOWN = [
    ["res_x", {"num_layers": 2}], ["compress_space_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 1}], ["compress_time_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 1}],
    ["res_x", {"num_layers": 2}],
]  # fmt: skip
UP_20 = [
    ["res_x", {"num_layers": 2, "inject_noise": False}],
    ["compress_all", {"residual": True, "multiplier": 2}],
    ["res_x", {"num_layers": 1, "inject_noise": False}],
    ["compress_all", {"residual": True, "multiplier": 2}],
    ["res_x", {"num_layers": 1, "inject_noise": False}],
    ["compress_all", {"residual": True, "multiplier": 2}],
    ["res_x", {"num_layers": 1, "inject_noise": False}],
]
UP_23 = [
    ["res_x", {"num_layers": 2}], ["compress_space", {"multiplier": 2}],
    ["res_x", {"num_layers": 1}], ["compress_time", {"multiplier": 2}],
    ["res_x", {"num_layers": 1}], ["compress_all", {"multiplier": 1}],
    ["res_x", {"num_layers": 1}], ["compress_all", {"multiplier": 2}],
    ["res_x", {"num_layers": 2}],
]  # fmt: skip
AUDIO_VAE = {
    "model": {"params": {"sampling_rate": 16000, "ddconfig": {
        "ch": AUDIO_CHANNELS * BINS // 4, "out_ch": 2, "ch_mult": [1, 1, 1], "num_res_blocks": 1,
        "attn_resolutions": [], "in_channels": 2, "resolution": BINS, "z_channels": AUDIO_CHANNELS,
        "double_z": True, "norm_type": "pixel", "causality_axis": "height", "dropout": 0.0,
        "mid_block_add_attention": False, "mel_bins": BINS,
    }}},
    "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160, "causal": True}},
}  # fmt: skip
VOCODER_20 = {
    "upsample_initial_channel": 16, "upsample_rates": [2, 5], "upsample_kernel_sizes": [4, 11],
    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]], "resblock": "1",
    "output_sampling_rate": 8000, "activation": "leaky_relu", "stereo": True,
}  # fmt: skip
GENERATOR = {
    "upsample_initial_channel": 16, "resblock": "AMP1", "upsample_rates": [5, 2],
    "upsample_kernel_sizes": [11, 4], "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]], "stereo": True, "use_tanh_at_final": False,
    "activation": "snakebeta", "use_bias_at_final": False,
}  # fmt: skip
WIDER = {
    "apply_final_activation": False, "input_sampling_rate": 1000, "output_sampling_rate": 2000,
    "hop_length": 5, "n_fft": 32, "win_size": 32, "num_mels": 64,
}  # fmt: skip
CONFIGS = {
    "2.0": {
        "transformer": TRANSFORMER,
        "vae": VAE | {"encoder_blocks": DOWN, "decoder_blocks": UP_20},
        "audio_vae": AUDIO_VAE,
        "vocoder": VOCODER_20,
    },
    "2.3": {
        "transformer": TRANSFORMER | SINCE_23,
        "vae": VAE
        | {"encoder_blocks": DOWN, "decoder_blocks": UP_23, "spatial_padding_mode": "zeros"},
        "audio_vae": AUDIO_VAE,
        "vocoder": {"vocoder": GENERATOR, "bwe": GENERATOR | WIDER},
    },
}
CONFIGS["2.5"] = CONFIGS["2.3"] | {"transformer": TRANSFORMER | SINCE_23 | SINCE_25}

# Lightricks' names, by part; the first that fits a whole step of the path counts.
BACK = {
    "transformer": {
        "proj_in": "patchify_proj", "audio_proj_in": "audio_patchify_proj",
        "time_embed": "adaln_single", "audio_time_embed": "audio_adaln_single",
        "prompt_adaln": "prompt_adaln_single", "audio_prompt_adaln": "audio_prompt_adaln_single",
        "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
        "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
        "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
        "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
        "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
        "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
        "norm_q": "q_norm", "norm_k": "k_norm",
    },
    "connectors": {
        "video_connector": "model.diffusion_model.video_embeddings_connector",
        "audio_connector": "model.diffusion_model.audio_embeddings_connector",
        "transformer_blocks": "transformer_1d_blocks", "norm_q": "q_norm", "norm_k": "k_norm",
        "text_proj_in": "text_embedding_projection.aggregate_embed",
        "video_text_proj_in": "text_embedding_projection.video_aggregate_embed",
        "audio_text_proj_in": "text_embedding_projection.audio_aggregate_embed",
    },
    "vae": {},
    "audio_vae": {},
    "vocoder": {
        "upsamplers": "ups", "resnets": "resblocks", "conv_in": "conv_pre", "conv_out": "conv_post",
        "act_out": "act_post", "downsample": "downsample.lowpass",
    },
}  # fmt: skip
STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
PREFIX = {
    "transformer": "model.diffusion_model.",
    "connectors": "",
    "vae": "vae.",
    "audio_vae": "audio_vae.",
    "vocoder": "vocoder.",
}
PARTS = tuple(PREFIX)


def tensors(version: str, *parts: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of `parts`, all by default, under Lightricks' names."""
    result = {}
    for part in parts or PARTS:
        torch.manual_seed(seed)
        settings = _Header(CONFIGS[version])
        config = ltx2_settings.SETTINGS[part](settings)
        if part == "connectors":
            config |= {"text_proj_in_factor": LAYERS + 1}
            if version != "2.0":
                config |= {"video_hidden_dim": VIDEO, "audio_hidden_dim": AUDIO}
        module = ltx2_checkpoints.CLASSES[part](config)(**config)
        for name, tensor in _random(module).items():
            result[PREFIX[part] + _back(part, name)] = tensor
    return result


def save_lightricks(
    path: Path, version: str, *parts: str, seed: int = 0, bare: bool = False, **metadata: str
) -> Path:
    """Saves `parts`, all by default, as one file with its header. bare: without a VAE's prefix."""
    weights = tensors(version, *parts, seed=seed)
    if bare:
        weights = {name.removeprefix("vae."): tensor for name, tensor in weights.items()}
    sections = {"connectors": "transformer"}
    wanted = {sections.get(part, part) for part in parts or PARTS}
    config = {name: section for name, section in CONFIGS[version].items() if name in wanted}
    header = {"config": json.dumps(config), "model_version": f"{version}.0"} | metadata
    save_file({n: t.contiguous() for n, t in weights.items()}, path, metadata=header)
    return path


class _Header:
    """What the settings are read from, without a file."""

    name, text, names, distilled = "tiny", None, (), ""

    def __init__(self, settings: dict):
        self.settings = settings

    def has_projection(self) -> bool:
        return False

    def shape(self, name: str) -> None:
        return None


def _random(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a size that keeps signals near 1, also where they are made as zeros or ones."""
    state = {}
    for name, tensor in module.state_dict().items():
        if name.endswith("latents_std"):
            tensor = 0.5 + torch.rand_like(tensor)
        elif tensor.ndim >= 2:
            tensor = torch.randn_like(tensor) / max(1, tensor[0].numel()) ** 0.5
        elif "mel_basis" not in name and "filter" not in name:
            tensor = tensor + 0.2 * torch.randn_like(tensor)
        state[name] = tensor
    return state


def _back(part: str, name: str) -> str:
    if part in ("vae", "audio_vae") and name in STATISTICS:
        return STATISTICS[name]
    if part == "vae":
        return _back_vae(name)
    return ".".join(BACK[part].get(step, step) for step in name.split("."))


def _back_vae(name: str) -> str:
    """diffusers nests what Lightricks number through: residual blocks and resamplings by turns."""
    name = name.replace("resnets", "res_blocks")
    side, *steps = name.split(".")
    if steps[0] == "mid_block":
        return ".".join([side, *(("down_blocks", "8") if side == "encoder" else ("up_blocks", "0")),
                         *steps[1:]])  # fmt: skip
    if steps[0] == "down_blocks":
        place = 2 * int(steps[1])
        resampling = steps[2] == "downsamplers"
        rest = steps[4:] if resampling else steps[2:]
        return ".".join([side, "down_blocks", str(place + resampling), *rest])
    if steps[0] == "up_blocks":
        place = 2 * int(steps[1])
        resampling = steps[2] == "upsamplers"
        rest = steps[4:] if resampling else steps[2:]
        return ".".join([side, "up_blocks", str(place + (1 if resampling else 2)), *rest])
    return name
