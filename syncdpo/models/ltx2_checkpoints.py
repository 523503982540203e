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

from syncdpo.models.diffusers_parts import PIECE_BYTES, PIECES
from syncdpo.models.ltx2_settings import PROJECTION, SETTINGS
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
        if component == "connectors" and self.text and not self.has_projection():
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

    def has_projection(self) -> bool:
        return any(name.startswith(PROJECTION) for name in self.names)

    def _projection(self, module: nn.Module, state: dict, dtype: torch.dtype) -> dict[str, Tensor]:
        """The text projections: here, in the text encoder's file, or a sentence in their place."""
        if self.has_projection():
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


CLASSES = {
    "transformer": lambda _: LTX2VideoTransformer3DModel,
    "connectors": lambda _: LTX2TextConnectors,
    "vae": lambda _: AutoencoderKLLTX2Video,
    "audio_vae": lambda _: AutoencoderKLLTX2Audio,
    "vocoder": lambda config: LTX2VocoderWithBWE if "bwe_act_fn" in config else LTX2Vocoder,
}


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
