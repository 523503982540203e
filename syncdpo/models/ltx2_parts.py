"""The components of an LTX-2 pipeline, each loaded when it is first needed, wherever they lie.

Training needs the transformer alone, preparing latents everything but the transformer: together
they do not fit on one GPU. Each component comes from a source: a pipeline in diffusers' layout, a
file of Lightricks, or a component's own folder. A source has `name`, `has(component)`,
`config(component)`, `load(component, dtype)`, `fingerprint(component)` and `distilled`.
"""

from __future__ import annotations

import hashlib
import inspect
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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from syncdpo.models.ltx2_checkpoints import PIECE_BYTES, PIECES, LightricksFile
from syncdpo.models.ltx2_text import load_text_folder, load_tokenizer_folder
from syncdpo.models.quantised import quantise

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
# What the published checkpoints have, where training has no need of the component itself.
ASSUMED = ("audio_vae", "scheduler")
OPTIONS = {  # which give components that the checkpoint lacks, or others in their place
    "text_encoder": ("text_encoder", "tokenizer"),
    "video_vae": ("vae",),
    "audio_vae": ("audio_vae", "vocoder"),
}
OPTION_OF = {part: option for option, parts in OPTIONS.items() for part in parts}
FULL_TRANSFORMER = "transformer_full"


class Parts:
    """The components of the checkpoint `name`, in `dtype`, to work on `device`.

    name: folder or hub id of a diffusers pipeline, or a `.safetensors` file of Lightricks.
    text_encoder_precision: one of `PRECISIONS`; the text encoder is quantised once it is read.
    others: by the names of `OPTIONS`, a file of Lightricks or a folder that gives those components.

    Raises ValueError for a checkpoint that holds no LTX-2 transformer with sound, and, once it is
    needed, for a component that none of them has.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        text_encoder_precision: str = "bf16",
        **others: str | Path | None,
    ):
        self.name, self.dtype, self.device = name, dtype, device
        self.text_encoder_precision = text_encoder_precision
        self._loaded: dict[str, object] = {}
        self._sound: nn.Module | None = None
        self._main = _checkpoint(name)
        self._others = {option: _other(option, path) for option, path in others.items() if path}
        text = self._others.get("text_encoder")
        if isinstance(self._main, LightricksFile) and isinstance(text, LightricksFile):
            self._main.take_text(text)

    @property
    def distilled(self) -> str:
        """How the transformer is known to be distilled, "" if it is not known to be."""
        return self._main.distilled

    def config(self, component: str) -> dict:
        """A component's settings: those of the checkpoint, over the defaults of its class."""
        parameters = inspect.signature(CLASSES[component].__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        if component in ASSUMED and not self._given(component):
            # A file's header may still say more than that the weights are elsewhere.
            stated = isinstance(self._main, LightricksFile)
            return defaults | (self._main.config(component) if stated else {})
        return defaults | self._source(component).config(component)

    def pipeline(self, *components: str) -> LTX2Pipeline:
        """An `LTX2Pipeline` of the components asked for, on `device`; the others are None."""
        self.find(*components)
        parts = {name: self[name] if name in components else None for name in NEEDED + OPTIONAL}
        return LTX2Pipeline(**parts).to(self.device)

    def find(self, *components: str) -> None:
        """Raises ValueError where one of them is missing, before the first is loaded."""
        for name in components:
            self._source(name)

    def put_aside(self) -> None:
        """What is loaded beside the transformer, from the GPU to the machine's memory."""
        for name, part in self._loaded.items():
            if isinstance(part, nn.Module) and name != "transformer":
                part.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sound_encoder(self) -> AutoencoderKLLTX2Audio:
        """The audio VAE to encode with, on `device`: in float32 whatever `dtype` is.

        As Lightricks' trainer has it; in bf16 it is off by more than the rounding of its latents.
        """
        if self._sound is None:
            if self.dtype == torch.float32:
                self._sound = self["audio_vae"]
            else:
                self._sound = self._load("audio_vae", torch.float32)
        return self._sound.to(self.device)

    def __getitem__(self, component: str):
        """One component, wherever it is; frozen, the transformer excepted."""
        if component not in self._loaded:
            self._loaded[component] = loaded = self._load(component, self.dtype)
            if component == "text_encoder":
                setting = "text_encoder_precision"
                quantise(loaded, self.text_encoder_precision, self.device, setting=setting)
        return self._loaded[component]

    def fingerprint(self, component: str) -> str:
        """16 hexadecimal digits that tell a component's weights from others, of the files alone."""
        return self._source(component).fingerprint(component)

    def _load(self, component: str, dtype: torch.dtype):
        loaded = self._source(component).load(component, dtype)
        if isinstance(loaded, nn.Module) and component != "transformer":
            loaded.requires_grad_(False)
        return loaded

    def _given(self, component: str):
        other = self._others.get(OPTION_OF.get(component, ""))
        return next((s for s in (other, self._main) if s and s.has(component)), None)

    def _source(self, component: str):
        found = self._given(component)
        if found is None:
            option = OPTION_OF.get(component)
            mend = "expected a checkpoint that has one"
            if option:
                mend = f"--{option.replace('_', '-')} names the file or folder that has one"
            raise ValueError(f"{component}: {self.name} has none; {mend}")
        return found


# --- sources in diffusers' and transformers' layouts ----------------------------------------------


class Pipeline:
    """A pipeline in diffusers' layout, by folder or hub id."""

    def __init__(self, name: str, index: dict):
        self.name, self._index = name, index

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

    def has(self, component: str) -> bool:
        return bool((self._index.get(component) or [None])[0])

    def config(self, component: str) -> dict:
        if component == "transformer" and self.full is not None:
            return self.full
        try:
            config = CLASSES[component].load_config(self.name, subfolder=component)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{component}: not found in {self.name} ({reason})") from error
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
        others = dict.fromkeys(set(NEEDED + OPTIONAL) - {component})
        pipeline = LTX2Pipeline.from_pretrained(
            self.name, dtype=dtype, use_safetensors=True, **others
        )
        return getattr(pipeline, component)

    def fingerprint(self, component: str) -> str:
        folder = Path(self.name)
        if not folder.is_dir():
            wanted = f"{component}/*.safetensors"
            folder = Path(snapshot_download(self.name, allow_patterns=wanted))
        return _fingerprint(folder / component)


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
        return _fingerprint(self._folders[component])


def _diffusers(component: str):
    import diffusers
    from diffusers.pipelines import ltx2

    return ltx2 if component == "vocoder" else diffusers


def _fingerprint(folder: Path) -> str:
    """SHA-256 of the names and sizes of safetensors files, and of 256 pieces of 4 KiB of each.

    Raises ValueError where there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model: expected safetensors weights in {folder}, got none")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for piece in range(PIECES):
                file.seek(piece * max(size - PIECE_BYTES, 0) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


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
    try:
        index = LTX2Pipeline.load_config(name)
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            "model: expected the folder or hub id of a diffusers LTX-2 pipeline, or a .safetensors "
            f"file of Lightricks, got {name} ({reason})"
        ) from error
    transformer = (index.get("transformer") or [None, None])[1]
    if transformer != LTX2VideoTransformer3DModel.__name__:
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
