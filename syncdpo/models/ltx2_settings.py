"""What the JSON in a header of Lightricks' says of each component, in diffusers' words.

What a header leaves out is as diffusers' published conversions have it, or follows from the shapes
of the tensors.
"""

from __future__ import annotations

from typing import Protocol

PROJECTION = "text_embedding_projection."  # how the names of its tensors begin


class Header(Protocol):
    """settings: of all components, as the file has them; the rest as of `LightricksFile`."""

    name: str
    settings: dict
    distilled: str
    text: Header | None

    def shape(self, name: str) -> list[int] | None:
        """Of a tensor; None where there is none of that name."""

    def has_projection(self) -> bool:
        """Whether the text projections are in this file, or in that of the text encoder."""


def _transformer_settings(file: Header) -> dict:
    source = _section(file, "transformer")
    get = source.get
    time, height, width = get("positional_embedding_max_pos", [20, 2048, 2048])
    copied = (
        "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers",
        "cross_attention_dim", "norm_eps", "caption_channels", "timestep_scale_multiplier",
        "audio_num_attention_heads", "audio_attention_head_dim", "audio_in_channels",
        "audio_out_channels", "audio_cross_attention_dim", "ff_bias", "audio_ff_bias",
        "use_prompt_adaln_single", "use_keyframes_abs_pos_embedding",
    )  # fmt: skip
    modulated, gated = (get(k, False) for k in ("cross_attention_adaln", "apply_gated_attention"))
    sound = _audio_settings(file)
    return {name: source[name] for name in copied if source.get(name) is not None} | {
        "pos_embed_max_pos": time,
        "base_height": height,
        "base_width": width,
        "audio_pos_embed_max_pos": get("audio_positional_embedding_max_pos", [20])[0],
        "rope_theta": get("positional_embedding_theta", 10000.0),
        "rope_type": get("rope_type", "interleaved"),
        "rope_double_precision": str(get("frequencies_precision")).lower() == "float64",
        "cross_attn_timestep_scale_multiplier": get("av_ca_timestep_scale_multiplier", 1),
        "gated_attn": gated,
        "audio_gated_attn": gated,
        "cross_attn_mod": modulated,
        "audio_cross_attn_mod": modulated,
        "perturbed_attn": modulated,
        "use_prompt_embeddings": not _projects_before_connectors(source),
        "vae_scale_factors": _scale_factors(file),
        "audio_sampling_rate": sound["sample_rate"],
        "audio_hop_length": sound["mel_hop_length"],
    }


def _projects_before_connectors(source: dict) -> bool:
    """Since 2.3 the text is projected once, before the connectors; files say so in two ways."""
    early = source.get("caption_projection_first_linear", True) is False
    return source.get("caption_proj_before_connector", early)


def _scale_factors(file: Header) -> tuple[int, int, int]:
    """How many pictures and pixels a video latent stands for: as published where not said."""
    vae = file.settings.get("vae") or {}
    blocks = (vae.get("encoder") or vae).get("encoder_blocks") or (vae.get("encoder") or {}).get(
        "blocks"
    )
    if not blocks:
        return 8, 32, 32
    kinds = [kind for kind, _ in blocks]
    time = 2 ** sum(kind.startswith(("compress_time", "compress_all")) for kind in kinds)
    space = 2 ** sum(kind.startswith(("compress_space", "compress_all")) for kind in kinds)
    space *= (vae.get("encoder") or vae).get("patch_size", 4)
    return time, space, space


def _connector_settings(file: Header) -> dict:
    source = _section(file, "transformer")
    heads = source.get("connector_num_attention_heads", 30)
    size = source.get("connector_attention_head_dim", 128)
    layers = source.get("connector_num_layers", 2)
    registers = source.get("connector_num_learnable_registers", 128)
    gated = source.get("connector_apply_gated_attention", False)
    settings = {}
    for stream, prefix in (("video", ""), ("audio", "audio_")):
        stem = f"{prefix}connector_"
        settings |= {
            f"{stream}_connector_num_attention_heads": source.get(
                f"{stem}num_attention_heads", heads
            ),
            f"{stream}_connector_attention_head_dim": source.get(f"{stem}attention_head_dim", size),
            f"{stream}_connector_num_layers": source.get(f"{stem}num_layers", layers),
            f"{stream}_connector_num_learnable_registers": registers,
            f"{stream}_gated_attn": gated,
        }
    settings |= {
        "connector_rope_base_seq_len": source.get("connector_positional_embedding_max_pos", [1])[0],
        "rope_theta": 10000.0,  # Lightricks' connectors take no other
        "rope_double_precision": str(source.get("frequencies_precision")).lower() == "float64",
        "rope_type": source.get("rope_type", "interleaved"),
    }
    return settings | _projection_settings(file, source)


def _projection_settings(file: Header, source: dict) -> dict:
    """Widths of the text projections: of the tensors where there are any, else as published."""
    holder = file if file.has_projection() else file.text or file
    both = holder.shape(f"{PROJECTION}aggregate_embed.weight")
    video = holder.shape(f"{PROJECTION}video_aggregate_embed.weight")
    audio = holder.shape(f"{PROJECTION}audio_aggregate_embed.weight")
    apart = bool(video) if video or both else _projects_before_connectors(source)
    width = source.get("caption_channels") or 3840
    settings = {"caption_channels": width, "per_modality_projections": apart, "proj_bias": apart}
    if both or video:
        settings["text_proj_in_factor"] = (video or both)[1] // width
    if video:
        settings |= {"video_hidden_dim": video[0], "audio_hidden_dim": audio[0]}
    return settings


def _video_settings(file: Header) -> dict:
    """From lists of blocks to diffusers' tuples; a decoder that is none of these is refused."""
    source = _section(file, "vae")
    if source.get("_class_name", "CausalVideoAutoencoder") != "CausalVideoAutoencoder":
        raise ValueError(
            f"vae: {file.name} holds the {source['_class_name']}, whose decoder diffusers keeps in "
            "another class; --video-vae names the file with the convolutional decoder "
            "(…-video-vae-conv-…), whose encoder is the same"
        )
    encoder = _blocks(source["encoder_blocks"], file)
    decoder = _blocks(source["decoder_blocks"][::-1], file)
    channels, downs, kinds_down = source.get("latent_channels", 128), [], []
    for kind, options in encoder[1::2]:
        channels *= options.get("multiplier", 2)
        downs.append(channels)
        kinds_down.append(_KINDS[kind.removesuffix("_res")])
    channels, ups = 8 * source.get("decoder_base_channels", 128), []
    for _, options in decoder[1::2]:
        ups.append(channels)
        channels //= options.get("multiplier", 1)
    conditioned = any("last_scale_shift_table" in name for name in file.names)
    return {
        "in_channels": source.get("in_channels", 3),
        "out_channels": source.get("out_channels", 3),
        "latent_channels": source.get("latent_channels", 128),
        "patch_size": source.get("patch_size", 4),
        "block_out_channels": tuple(downs),
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(downs),
        "layers_per_block": tuple(options["num_layers"] for _, options in encoder[::2]),
        "spatio_temporal_scaling": (True,) * len(downs),
        "downsample_type": tuple(kinds_down),
        "decoder_block_out_channels": tuple(ups[::-1]),
        "decoder_layers_per_block": tuple(o["num_layers"] for _, o in decoder[::2])[::-1],
        "decoder_spatio_temporal_scaling": (True,) * len(ups),
        "decoder_inject_noise": tuple(o.get("inject_noise", False) for _, o in decoder[::2])[::-1],
        "upsample_type": tuple(_KINDS[kind] for kind, _ in decoder[1::2]),
        "upsample_residual": tuple(o.get("residual", False) for _, o in decoder[1::2])[::-1],
        "upsample_factor": tuple(o.get("multiplier", 1) for _, o in decoder[1::2])[::-1],
        "timestep_conditioning": conditioned,
        "encoder_causal": True,
        "decoder_causal": source.get("causal_decoder", False),
        "encoder_spatial_padding_mode": source.get("encoder_spatial_padding_mode", "zeros"),
        "decoder_spatial_padding_mode": source.get("spatial_padding_mode", "reflect"),
        "temporal_compression_ratio": _scale_factors(file)[0],
        "spatial_compression_ratio": _scale_factors(file)[1],
    }


_KINDS = {
    "compress_space": "spatial",
    "compress_time": "temporal",
    "compress_all": "spatiotemporal",
}


def _blocks(blocks: list, file: Header) -> list[tuple[str, dict]]:
    """Residual blocks and resamplings by turns, as every LTX-2 has them."""
    found = [(kind, o if isinstance(o, dict) else {"num_layers": o}) for kind, o in blocks]
    alternating = all(
        kind == "res_x" if place % 2 == 0 else kind.removesuffix("_res") in _KINDS
        for place, (kind, _) in enumerate(found)
    )
    if not alternating or len(found) % 2 == 0:
        raise ValueError(
            f"vae: expected res_x and compress_… by turns in {file.name}, got "
            f"{', '.join(kind for kind, _ in found)}"
        )
    return found


def _audio_settings(file: Header) -> dict:
    section = file.settings.get("audio_vae") or {}
    parameters = (section.get("model") or {}).get("params") or {}
    source = parameters.get("ddconfig") or {}
    before = section.get("preprocessing") or {}
    transform, mel = before.get("stft") or {}, before.get("mel") or {}
    return {
        "base_channels": source.get("ch", 128),
        "output_channels": source.get("out_ch", 2),
        "ch_mult": tuple(source.get("ch_mult", (1, 2, 4))),
        "num_res_blocks": source.get("num_res_blocks", 2),
        "attn_resolutions": tuple(source.get("attn_resolutions") or ()) or None,
        "in_channels": source.get("in_channels", 2),
        "resolution": source.get("resolution", 256),
        "latent_channels": source.get("z_channels", 8),
        "norm_type": source.get("norm_type", "pixel"),
        "causality_axis": source.get("causality_axis", "height"),
        "dropout": source.get("dropout", 0.0),
        "mid_block_add_attention": source.get("mid_block_add_attention", False),
        "sample_rate": parameters.get("sampling_rate", 16000),
        "mel_hop_length": transform.get("hop_length", 160),
        "is_causal": transform.get("causal", True),
        "mel_bins": source.get("mel_bins") or mel.get("n_mel_channels") or 64,
        "double_z": source.get("double_z", True),
    }


def _vocoder_settings(file: Header) -> dict:
    source = _section(file, "vocoder")
    if "bwe" not in source:
        return _generator(source, "") | {
            "act_fn": "leaky_relu",
            "output_sampling_rate": source.get("output_sampling_rate", 24000),
        }
    wide = source["bwe"]
    return (
        _generator(source["vocoder"], "")
        | _generator(wide, "bwe_")
        | {
            "act_fn": source["vocoder"].get("activation", "snakebeta"),
            "bwe_act_fn": wide.get("activation", "snakebeta"),
            "filter_length": wide["n_fft"],
            "window_length": wide.get("win_size", wide["n_fft"]),
            "hop_length": wide["hop_length"],
            "num_mel_channels": wide["num_mels"],
            "input_sampling_rate": wide["input_sampling_rate"],
            "output_sampling_rate": wide["output_sampling_rate"],
        }
    )


def _generator(source: dict, prefix: str) -> dict:
    # diffusers' published 2.3 has no bound after its first stage, where Lightricks clamp.
    bound = "tanh" if source.get("use_tanh_at_final", True) else "clamp"
    settings = {
        "hidden_channels": source.get("upsample_initial_channel", 1024),
        "upsample_kernel_sizes": source.get("upsample_kernel_sizes", [16, 15, 8, 4, 4]),
        "upsample_factors": source.get("upsample_rates", [6, 5, 2, 2, 2]),
        "resnet_kernel_sizes": source.get("resblock_kernel_sizes", [3, 7, 11]),
        "resnet_dilations": source.get("resblock_dilation_sizes", [[1, 3, 5]] * 3),
        "final_act_fn": bound if source.get("apply_final_activation", not prefix) else None,
        "final_bias": source.get("use_bias_at_final", True),
    }
    return {f"{prefix}{name}": value for name, value in settings.items()}


def _scheduler_settings(file: Header) -> dict:
    """As diffusers' published conversions have it: a distilled model's levels are not shifted."""
    return {
        "use_dynamic_shifting": not file.distilled,
        "shift_terminal": None if file.distilled else 0.1,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
    }


def _section(file: Header, name: str) -> dict:
    section = file.settings.get(name)
    if not section:
        raise ValueError(
            f"model: expected the settings of {name} as JSON in the header of {file.name} "
            "(`config`), as Lightricks' files have them, got none: a copy that has lost its header "
            "cannot be told apart from other versions"
        )
    return section


SETTINGS = {
    "transformer": _transformer_settings,
    "connectors": _connector_settings,
    "vae": _video_settings,
    "audio_vae": _audio_settings,
    "vocoder": _vocoder_settings,
    "scheduler": _scheduler_settings,
}
