"""LTX-2 as Lightricks publish it: `.safetensors` files with everything, or one file per component.

A file names its tensors by component and holds the settings of each as JSON in its header
(`config`), so nothing of a hub is asked for. Names are mapped by diffusers' own single-file
converters; what these leave out (2.3 and later, connectors, vocoder) follows in the tables below.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ltx2_audio_vae_to_diffusers,
    convert_ltx2_transformer_to_diffusers,
    convert_ltx2_vae_to_diffusers,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from syncdpo.models.ltx2_text import load_packed_text, load_packed_tokenizer

# Whose tensors a file holds, by how their names begin. In a file of one VAE alone they begin
# without the component's own name.
PREFIXES = {
    "transformer": ("model.diffusion_model.",),
    "connectors": (
        "model.diffusion_model.video_embeddings_connector.",
        "model.diffusion_model.audio_embeddings_connector.",
        "text_embedding_projection.",
    ),
    "vae": ("vae.",),
    "audio_vae": ("audio_vae.",),
    "vocoder": ("vocoder.",),
    "text_encoder": (
        "model.layers.",
        "model.embed_tokens.",
        "model.norm.",
        "model.language_model.",
    ),
}
BARE_VAE = ("encoder.", "decoder.", "per_channel_statistics.")
PROJECTION = "text_embedding_projection."
STATISTICS = {
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}
AFTER_DIFFUSERS = {  # what its converters, made for 2.0, leave as it was
    "transformer": {"prompt_adaln_single.": "prompt_adaln."},
    "vae": {
        "up_blocks.7.": "up_blocks.3.upsamplers.0.",
        "up_blocks.8.": "up_blocks.3.",
        "last_time_embedder": "time_embedder",
        "last_scale_shift_table": "scale_shift_table",
    },
}
CONNECTOR_NAMES = {
    "model.diffusion_model.": "",
    "_embeddings_connector.": "_connector.",
    "transformer_1d_blocks.": "transformer_blocks.",
    "text_embedding_projection.aggregate_embed.": "text_proj_in.",
    "text_embedding_projection.video_aggregate_embed.": "video_text_proj_in.",
    "text_embedding_projection.audio_aggregate_embed.": "audio_text_proj_in.",
    "q_norm.": "norm_q.",
    "k_norm.": "norm_k.",
}
VOCODER_NAMES = {
    "ups.": "upsamplers.",
    "resblocks.": "resnets.",
    "conv_pre.": "conv_in.",
    "conv_post.": "conv_out.",
    "act_post.": "act_out.",
    "downsample.lowpass.": "downsample.",
}
PIECES, PIECE_BYTES = 256, 4096


class LightricksFile:
    """One `.safetensors` file of Lightricks, as a source of components (see `Parts`).

    text: another file with the text projections, which 2.5 keeps beside the text encoder.

    Raises ValueError for a file that holds nothing of LTX-2, or not the settings of it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.text: LightricksFile | None = None
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata = file.metadata() or {}
                self.names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model: {path} is not a safetensors file ({error})") from error
        self.settings = _json(self.metadata.get("config", "{}"), path)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def version(self) -> str:
        """What the file says of its version, "" if nothing."""
        return str(self.metadata.get("model_version") or "")

    @cached_property
    def distilled(self) -> str:
        """How the file is known to be distilled, "" if it is not known to be."""
        marks = {"its name": self.path.name, "its header": self.version}
        return next((where for where, text in marks.items() if "distilled" in text.lower()), "")

    def take_text(self, other: LightricksFile) -> None:
        """Take the text projections from `other`, a text encoder's file.

        Raises ValueError where this file says that it was trained with another text encoder.
        """
        source = _json(self.metadata.get("gemma_source_checkpoint", "{}"), self.path)
        wanted = source.get("gemma_version")
        found = _json(other.metadata.get("gemma_config", "{}"), other.path).get("gemma_version")
        if wanted and found != wanted:
            raise ValueError(
                f"text_encoder: expected {wanted} for {self.name}, got {found} in {other.name}"
            )
        self.text = other

    def has(self, component: str) -> bool:
        if component == "scheduler":
            return self.has("transformer")
        if component == "tokenizer":
            return "tokenizer_json" in self.names
        return bool(self._names(component))

    def config(self, component: str) -> dict:
        """A component's settings in diffusers' words."""
        if component not in SETTINGS:
            raise ValueError(f"model: {self.name} holds no settings of {component}")
        return SETTINGS[component](self)

    def load(self, component: str, dtype: torch.dtype):
        """A component with its weights in `dtype`, in memory."""
        if component == "scheduler":
            return FlowMatchEulerDiscreteScheduler(**self.config("scheduler"))
        if component == "tokenizer":
            return load_packed_tokenizer(self.path)
        if component == "text_encoder":
            return load_packed_text(self.path, dtype)
        state = CONVERTERS[component](self._read(component, dtype))
        config = self.config(component)
        with init_empty_weights(include_buffers=False):
            module = CLASSES[component](config)(**config)
        if component == "connectors":
            state |= self._projection(module, state, dtype)
        return _fill(module, state, f"{component} of {self.name}").eval()

    def fingerprint(self, component: str) -> str:
        """16 hexadecimal digits of a component's names, sizes and up to 256 pieces of 4 KiB."""
        names = sorted(self._names(component))
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name in names:
                entry = header[name]
                digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode())
            for name in names[:: max(1, -(-len(names) // PIECES))]:
                start, end = header[name]["data_offsets"]
                file.seek(8 + length + start)
                digest.update(file.read(min(end - start, PIECE_BYTES)))
        if component == "connectors" and self.text and not self._has_projection():
            digest.update(self.text.fingerprint("connectors").encode())
        return digest.hexdigest()[:16]

    # --- tensors ----------------------------------------------------------------------------------

    def shape(self, name: str) -> list[int] | None:
        if name not in self.names:
            return None
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(name).get_shape()

    def _names(self, component: str) -> list[str]:
        found = [name for name in self.names if name.startswith(PREFIXES[component])]
        if component == "transformer":
            connectors = PREFIXES["connectors"]
            return [name for name in found if not name.startswith(connectors)]
        if component == "connectors" and not any("_embeddings_connector." in n for n in found):
            return [] if self.has("transformer") else found  # a text encoder's file: projections
        if not found and component in ("vae", "audio_vae") and component in self.settings:
            return [name for name in self.names if name.startswith(BARE_VAE)]
        return found

    def _read(self, component: str, dtype: torch.dtype) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in self._names(component)}
        small = [n for n, t in state.items() if t.is_floating_point() and t.element_size() < 2]
        if small or any(name.endswith(".weight_scale") for name in state):
            raise ValueError(
                f"model: {component} in {self.name} is quantised; expected the file with bf16 "
                "weights, for what is trained on rounded weights fits those alone"
            )
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }

    def _has_projection(self) -> bool:
        return any(name.startswith(PROJECTION) for name in self.names)

    def _projection(self, module: nn.Module, state: dict, dtype: torch.dtype) -> dict[str, Tensor]:
        """The text projections: here, in the text encoder's file, or a sentence in their place."""
        if self._has_projection():
            return {}
        if self.text:
            return _connectors(self.text._read("connectors", dtype))
        for name in ("text_proj_in", "video_text_proj_in", "audio_text_proj_in"):
            if hasattr(module, name):
                setattr(module, name, MissingProjection(self.name))
        return {}


class MissingProjection(nn.Module):
    """In the place of text projections that no file holds: training does without them."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *_) -> Tensor:
        raise ValueError(
            f"connectors: {self.name} holds no text projections; --text-encoder names the file of "
            "the text encoder, which does"
        )


# --- settings -------------------------------------------------------------------------------------


def _transformer_settings(file: LightricksFile) -> dict:
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


def _scale_factors(file: LightricksFile) -> tuple[int, int, int]:
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


def _connector_settings(file: LightricksFile) -> dict:
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


def _projection_settings(file: LightricksFile, source: dict) -> dict:
    """Widths of the text projections: of the tensors where there are any, else as published."""
    holder = file if file._has_projection() else file.text or file
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


def _video_settings(file: LightricksFile) -> dict:
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


def _blocks(blocks: list, file: LightricksFile) -> list[tuple[str, dict]]:
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


def _audio_settings(file: LightricksFile) -> dict:
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


def _vocoder_settings(file: LightricksFile) -> dict:
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


def _scheduler_settings(file: LightricksFile) -> dict:
    """As diffusers' published conversions have it: a distilled model's levels are not shifted."""
    return {
        "use_dynamic_shifting": not file.distilled,
        "shift_terminal": None if file.distilled else 0.1,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
    }


SETTINGS = {
    "transformer": _transformer_settings,
    "connectors": _connector_settings,
    "vae": _video_settings,
    "audio_vae": _audio_settings,
    "vocoder": _vocoder_settings,
    "scheduler": _scheduler_settings,
}
CLASSES = {
    "transformer": lambda _: LTX2VideoTransformer3DModel,
    "connectors": lambda _: LTX2TextConnectors,
    "vae": lambda _: AutoencoderKLLTX2Video,
    "audio_vae": lambda _: AutoencoderKLLTX2Audio,
    "vocoder": lambda config: LTX2VocoderWithBWE if "bwe_act_fn" in config else LTX2Vocoder,
}


def _section(file: LightricksFile, name: str) -> dict:
    section = file.settings.get(name)
    if not section:
        raise ValueError(
            f"model: expected the settings of {name} as JSON in the header of {file.name} "
            "(`config`), as Lightricks' files have them, got none: a copy that has lost its header "
            "cannot be told apart from other versions"
        )
    return section


def _json(text: str, path: Path) -> dict:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"model: {path} holds settings that are not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"model: {path} holds settings that are no JSON object")
    return settings


# --- names ----------------------------------------------------------------------------------------


def _connectors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(state, CONNECTOR_NAMES)


def _vocoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _renamed({k.removeprefix("vocoder."): v for k, v in state.items()}, VOCODER_NAMES)


def _converted(component: str, convert, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(convert(state), AFTER_DIFFUSERS.get(component, {}))


def _renamed(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        for old, new in table.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


CONVERTERS = {
    "transformer": partial(_converted, "transformer", convert_ltx2_transformer_to_diffusers),
    "vae": partial(_converted, "vae", convert_ltx2_vae_to_diffusers),
    "audio_vae": partial(_converted, "audio_vae", convert_ltx2_audio_vae_to_diffusers),
    "connectors": _connectors,
    "vocoder": _vocoder,
}


def _fill(module: nn.Module, state: dict, what: str) -> nn.Module:
    """Put `state` into `module`, every tensor; what is missing, left over or misshapen is named."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [
        (len(names), kind, min(names))
        for kind, names in (
            ("missing", expected.keys() - state.keys()),
            ("unknown", state.keys() - expected.keys()),
            (
                "of another shape",
                {n for n, t in state.items() if expected.get(n, t.shape) != tuple(t.shape)},
            ),
        )
        if names
    ]
    if problems:
        found = "; ".join(f"{count} {kind}, {name} among them" for count, kind, name in problems)
        raise ValueError(f"model: {what} does not fit its settings: tensors {found}")
    module.load_state_dict(state, assign=True)
    return module
