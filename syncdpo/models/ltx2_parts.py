"""The components of a diffusers LTX-2 pipeline, each loaded when it is first needed.

Training needs the transformer alone, preparing latents everything but the transformer: together
they do not fit on one GPU.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

NEEDED = (
    "transformer", "scheduler", "vae", "audio_vae", "vocoder", "text_encoder", "tokenizer",
    "connectors",
)  # fmt: skip
OPTIONAL = ("processor", "prompt_enhancer", "duration_head")
CLASSES = {
    "transformer": LTX2VideoTransformer3DModel,
    "audio_vae": AutoencoderKLLTX2Audio,
    "connectors": LTX2TextConnectors,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
PIECES, PIECE_BYTES = 256, 4096


class Parts:
    """The components of the pipeline `name` (folder or hub id), in `dtype`, to work on `device`.

    Raises ValueError for a checkpoint that is not LTX-2, or lacks a component, audio's included.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device):
        self.name, self.dtype, self.device = name, dtype, device
        self._loaded: dict[str, object] = {}
        _check(name)

    def config(self, component: str) -> dict:
        """A component's settings: those of the checkpoint, over the defaults of its class."""
        parameters = inspect.signature(CLASSES[component].__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return defaults | CLASSES[component].load_config(self.name, subfolder=component)

    def pipeline(self, *components: str) -> LTX2Pipeline:
        """An `LTX2Pipeline` of the components asked for, on `device`; the others are None."""
        parts = {name: self[name] if name in components else None for name in NEEDED + OPTIONAL}
        return LTX2Pipeline(**parts).to(self.device)

    def __getitem__(self, component: str):
        """One component, wherever it is; frozen, the transformer excepted."""
        if component not in self._loaded:
            others = dict.fromkeys(set(NEEDED + OPTIONAL) - {component})
            pipeline = LTX2Pipeline.from_pretrained(self.name, dtype=self.dtype, **others)
            self._loaded[component] = loaded = getattr(pipeline, component)
            if isinstance(loaded, nn.Module) and component != "transformer":
                loaded.requires_grad_(False)
        return self._loaded[component]

    def fingerprint(self, component: str) -> str:
        """16 hexadecimal digits that tell a component's weights from others, without loading them.

        SHA-256 of the names and sizes of its safetensors files and of 256 evenly spaced pieces of
        4 KiB of each. Raises ValueError where there are none.
        """
        folder = Path(self.name)
        if not folder.is_dir():
            wanted = f"{component}/*.safetensors"
            folder = Path(snapshot_download(self.name, allow_patterns=wanted))
        files = sorted((folder / component).glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"model: expected safetensors weights in {folder / component}, got none"
            )
        digest = hashlib.sha256()
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for piece in range(PIECES):
                    file.seek(piece * max(size - PIECE_BYTES, 0) // (PIECES - 1))
                    digest.update(file.read(PIECE_BYTES))
        return digest.hexdigest()[:16]


def _check(name: str) -> None:
    try:
        index = LTX2Pipeline.load_config(name)
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model: expected the folder or hub id of a diffusers LTX-2 pipeline, got {name} "
            f"({reason})"
        ) from error
    missing = [part for part in NEEDED if not (index.get(part) or [None])[0]]
    transformer = (index.get("transformer") or [None, None])[1]
    if missing or transformer != LTX2VideoTransformer3DModel.__name__:
        lacks = f", which lacks {', '.join(missing)}" if missing else ""
        raise ValueError(
            "model: expected a diffusers LTX-2 pipeline with sound, got "
            f"{index.get('_class_name', 'another format')} in {name}{lacks}"
        )
