"""The components of a diffusers pipeline, each loaded when it is first needed.

Training needs the transformer alone, preparing latents everything but the transformer: together
they do not fit on one GPU. Each component comes from a source, which has `name`, `has(component)`,
`config(component)`, `load(component, dtype)`, `fingerprint(component)` and `distilled`: here a
pipeline in diffusers' layout; a family may have others.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from syncdpo.models.quantised import quantise

PIECES, PIECE_BYTES = 256, 4096  # of a file's weights, those that make its fingerprint


@dataclass(frozen=True)
class Layout:
    """What the pipelines of one family consist of.

    classes: of the components whose settings are asked for without loading them.
    needed: for `generate`; optional: what the pipeline's class takes beside that, and gets as None.
    """

    pipeline: type[DiffusionPipeline]
    classes: Mapping[str, type]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        return self.needed + self.optional

    def defaults(self, component: str) -> dict:
        """The settings of a component's class where a checkpoint says nothing."""
        parameters = inspect.signature(self.classes[component].__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}


class Components:
    """The components of the checkpoint `name`, in `dtype`, to work on `device`.

    main: the source of what no other one gives.
    text_encoder_precision: one of `PRECISIONS`; the text encoder is quantised once it is read.

    Raises ValueError, once it is needed, for a component that no source has.
    """

    layout: Layout

    def __init__(
        self,
        name: str,
        main,
        dtype: torch.dtype,
        device: torch.device,
        text_encoder_precision: str = "bf16",
    ):
        self.name, self.dtype, self.device = name, dtype, device
        self.text_encoder_precision = text_encoder_precision
        self._main = main
        self._loaded: dict[str, object] = {}
        self._sound: nn.Module | None = None

    @property
    def distilled(self) -> str:
        """How the transformer is known to be distilled, "" if it is not known to be."""
        return self._main.distilled

    def config(self, component: str) -> dict:
        """A component's settings: those of the checkpoint, over the defaults of its class."""
        return self.layout.defaults(component) | self._source(component).config(component)

    def pipeline(self, *components: str) -> DiffusionPipeline:
        """A pipeline of the components asked for, on `device`; the others are None."""
        self.find(*components)
        parts = {
            name: self[name] if name in components else None for name in self.layout.components
        }
        return self.layout.pipeline(**parts).to(self.device)

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

    def sound_encoder(self) -> nn.Module:
        """The audio VAE to encode with, on `device`: in float32 whatever `dtype` is.

        In bf16 its latents are off by more than their own rounding.
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
        """The source that has a component, or None."""
        return self._main if self._main.has(component) else None

    def _source(self, component: str):
        found = self._given(component)
        if found is None:
            raise ValueError(f"{component}: {self.name} has none; {self._mend(component)}")
        return found

    def _mend(self, component: str) -> str:
        return "expected a checkpoint that has one"


class PipelineFolder:
    """A pipeline in diffusers' layout, by folder or hub id; `index` is its model_index.json."""

    layout: Layout
    distilled = ""

    def __init__(self, name: str, index: dict):
        self.name, self._index = name, index

    def has(self, component: str) -> bool:
        return bool((self._index.get(component) or [None])[0])

    def config(self, component: str) -> dict:
        try:
            return self.layout.classes[component].load_config(self.name, subfolder=component)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{component}: not found in {self.name} ({reason})") from error

    def load(self, component: str, dtype: torch.dtype):
        others = dict.fromkeys(set(self.layout.components) - {component})
        pipeline = self.layout.pipeline.from_pretrained(
            self.name, dtype=dtype, use_safetensors=True, **others
        )
        return getattr(pipeline, component)

    def fingerprint(self, component: str) -> str:
        folder = Path(self.name)
        if not folder.is_dir():
            wanted = f"{component}/*.safetensors"
            folder = Path(snapshot_download(self.name, allow_patterns=wanted))
        return folder_fingerprint(folder / component)


def folder_fingerprint(folder: Path) -> str:
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


def pipeline_index(name: str, expected: str) -> dict:
    """model_index.json of a folder or hub id. Raises ValueError, naming what was expected."""
    try:
        return DiffusionPipeline.load_config(name)
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: expected {expected}, got {name} ({reason})") from error


def transformer_class(index: dict) -> str | None:
    """The name of the transformer's class, as model_index.json has it."""
    return (index.get("transformer") or [None, None])[1]
