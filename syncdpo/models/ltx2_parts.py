"""The components of an LTX-2 pipeline, each loaded when it is first needed, wherever they lie.

Each comes from a source (see `syncdpo.models.diffusers_parts`): a pipeline in diffusers' layout, a
file of Lightricks, or a component's own folder.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from syncdpo.models.diffusers_parts import (
    Components,
    Layout,
    PipelineFolder,
    folder_fingerprint,
    pipeline_index,
    transformer_class,
)
from syncdpo.models.ltx2_checkpoints import LightricksFile
from syncdpo.models.ltx2_text import load_text_folder, load_tokenizer_folder

NEEDED = (
    "transformer", "scheduler", "vae", "audio_vae", "vocoder", "text_encoder", "tokenizer",
    "connectors",
)  # fmt: skip
OPTIONAL = ("processor", "prompt_enhancer", "duration_head")
CLASSES = {
    "transformer": LTX2VideoTransformer3DModel,
    "vae": AutoencoderKLLTX2Video,
    "audio_vae": AutoencoderKLLTX2Audio,
    "connectors": LTX2TextConnectors,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
LAYOUT = Layout(LTX2Pipeline, CLASSES, NEEDED, OPTIONAL)
# What the published checkpoints have, where training has no need of the component itself.
ASSUMED = ("audio_vae", "scheduler")
OPTIONS = {  # which give components that the checkpoint lacks, or others in their place
    "text_encoder": ("text_encoder", "tokenizer"),
    "video_vae": ("vae",),
    "audio_vae": ("audio_vae", "vocoder"),
}
OPTION_OF = {part: option for option, parts in OPTIONS.items() for part in parts}
FULL_TRANSFORMER = "transformer_full"


class Parts(Components):
    """The components of the checkpoint `name`, in `dtype`, to work on `device`.

    name: folder or hub id of a diffusers pipeline, or a `.safetensors` file of Lightricks.
    text_encoder_precision: one of `PRECISIONS`; the text encoder is quantised once it is read.
    others: by the names of `OPTIONS`, a file of Lightricks or a folder that gives those components.

    Raises ValueError for a checkpoint that holds no LTX-2 transformer with sound, and, once it is
    needed, for a component that none of them has.
    """

    layout = LAYOUT

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        text_encoder_precision: str = "bf16",
        **others: str | Path | None,
    ):
        super().__init__(name, _checkpoint(name), dtype, device, text_encoder_precision)
        self._others = {option: _other(option, path) for option, path in others.items() if path}
        text = self._others.get("text_encoder")
        if isinstance(self._main, LightricksFile) and isinstance(text, LightricksFile):
            self._main.take_text(text)

    def config(self, component: str) -> dict:
        """A component's settings: those of the checkpoint, over the defaults of its class."""
        if component in ASSUMED and not self._given(component):
            # A file's header may still say more than that the weights are elsewhere.
            stated = isinstance(self._main, LightricksFile)
            defaults = self.layout.defaults(component)
            return defaults | (self._main.config(component) if stated else {})
        return super().config(component)

    def _given(self, component: str):
        other = self._others.get(OPTION_OF.get(component, ""))
        return next((s for s in (other, self._main) if s and s.has(component)), None)

    def _mend(self, component: str) -> str:
        option = OPTION_OF.get(component)
        if option is None:
            return super()._mend(component)
        return f"--{option.replace('_', '-')} names the file or folder that has one"


# --- sources in diffusers' and transformers' layouts ----------------------------------------------


class Pipeline(PipelineFolder):
    """A pipeline in diffusers' layout, by folder or hub id."""

    layout = LAYOUT

    @cached_property
    def full(self) -> dict | None:
        """Settings of the transformer that 2.5 keeps beside the distilled one; None elsewhere."""
        try:
            return LTX2VideoTransformer3DModel.load_config(self.name, subfolder=FULL_TRANSFORMER)
        except OSError:
            return None

    @cached_property
    def distilled(self) -> str:
        if self.full is not None:
            return ""
        if "distilled" in Path(self.name).name.lower():
            return "its name"
        if not self.has("scheduler"):
            return ""
        scheduler = self.config("scheduler")
        # So that the distilled model's own noise levels are used as they are.
        plain = scheduler.get("use_dynamic_shifting") is False
        plain = plain and scheduler.get("shift_terminal") is None
        return "its scheduler" if plain else ""

    def config(self, component: str) -> dict:
        if component == "transformer" and self.full is not None:
            return self.full
        config = super().config(component)
        # What the folder holds is the distilled one's.
        if component == "scheduler" and self.full is not None:
            config |= {"use_dynamic_shifting": True, "shift_terminal": 0.1}
        return config

    def load(self, component: str, dtype: torch.dtype):
        if component == "transformer" and self.full is not None:
            return LTX2VideoTransformer3DModel.from_pretrained(
                self.name, subfolder=FULL_TRANSFORMER, dtype=dtype, use_safetensors=True
            )
        if component == "scheduler":
            return FlowMatchEulerDiscreteScheduler.from_config(self.config(component))
        return super().load(component, dtype)


class ComponentFolder:
    """Folders of components: one's own, or a pipeline's with one below for each."""

    distilled = ""

    def __init__(self, folder: Path, components: tuple[str, ...]):
        self.name = str(folder)
        below = {part: folder / part for part in components if (folder / part).is_dir()}
        # The audio VAE's own folder holds no vocoder; a text encoder's holds its tokenizer, too.
        alone = [part for part in components if part != "vocoder"]
        self._folders = below or dict.fromkeys(alone, folder)

    def has(self, component: str) -> bool:
        folder = self._folders.get(component)
        wanted = "tokenizer*.json" if component == "tokenizer" else "config.json"
        return folder is not None and any(folder.glob(wanted))

    def config(self, component: str) -> dict:
        return CLASSES[component].load_config(self._folders[component])

    def load(self, component: str, dtype: torch.dtype):
        folder = self._folders[component]
        if component == "text_encoder":
            return load_text_folder(folder, dtype)
        if component == "tokenizer":
            return load_tokenizer_folder(folder)
        name = json.loads((folder / "config.json").read_text()).get("_class_name", "")
        kind = getattr(_diffusers(component), name, None)
        if kind is None:
            raise ValueError(
                f"{component}: expected a model of diffusers in {folder}, got {name!r}"
            )
        return kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )

    def fingerprint(self, component: str) -> str:
        return folder_fingerprint(self._folders[component])


def _diffusers(component: str):
    import diffusers
    from diffusers.pipelines import ltx2

    return ltx2 if component == "vocoder" else diffusers


# --- which source it is ---------------------------------------------------------------------------


def _checkpoint(name: str) -> Pipeline | LightricksFile:
    if Path(name).is_file() or name.endswith(".safetensors"):
        file = _file("model", Path(name))
        if not file.has("transformer"):
            raise ValueError(
                f"model: expected a transformer of LTX-2 in {name}, whose names begin with "
                f"model.diffusion_model., got {', '.join(file.names[:1]) or 'no tensors'}"
            )
        if file.config("transformer").get("audio_num_attention_heads") is None:
            raise ValueError(f"model: expected LTX-2 with sound in {name}, got one without")
        return file
    expected = "the folder or hub id of a diffusers LTX-2 pipeline, or a .safetensors file of"
    index = pipeline_index(name, f"{expected} Lightricks")
    if transformer_class(index) != LTX2VideoTransformer3DModel.__name__:
        raise ValueError(
            "model: expected a diffusers LTX-2 pipeline with sound, got "
            f"{index.get('_class_name', 'another format')} in {name}"
        )
    return Pipeline(name, index)


def _other(option: str, path: str | Path) -> LightricksFile | ComponentFolder:
    path = Path(path)
    parts = OPTIONS[option]
    source = ComponentFolder(path, parts) if path.is_dir() else _file(option, path)
    if not source.has(parts[0]):
        raise ValueError(
            f"{option}: expected a {parts[0]} in {path}, a file of Lightricks or a folder with "
            "config.json, got none"
        )
    return source


def _file(option: str, path: Path) -> LightricksFile:
    if not path.is_file():
        raise ValueError(f"{option}: there is no {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{option}: expected a folder or a .safetensors file, got {path}")
    return LightricksFile(path)
