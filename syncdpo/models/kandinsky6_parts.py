"""The components of a Kandinsky 6 pipeline, as its checkpoints in diffusers' layout hold them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    PiflowScheduler,
)
from diffusers.models.transformers.transformer_kandinsky6 import (
    Kandinsky6Modulation,
    Kandinsky6TimeEmbeddings,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from syncdpo.models.diffusers_parts import (
    Components,
    Layout,
    PipelineFolder,
    pipeline_index,
    transformer_class,
)

LAYOUT = Layout(
    Kandinsky6TI2VAPipeline,
    {
        "transformer": Kandinsky6Transformer3DModel,
        "vae": AutoencoderKLHunyuanVideo,
        "audio_vae": MMAudioVAE,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    },
    (
        "transformer", "scheduler", "vae", "audio_vae", "vocoder", "text_encoder", "tokenizer",
        "text_encoder_2", "tokenizer_2",
    ),
)  # fmt: skip
# Of the reference picture in image-to-video alone, so no gradient reaches it from text-to-video.
IDLE = "visual_token_type_embeddings"


class Parts(Components):
    """The components of the Kandinsky 6 pipeline `name`, a folder or hub id (see `Components`).

    Raises ValueError for another pipeline, and for one without an audio VAE.
    """

    layout = LAYOUT

    def __init__(self, name: str, *options, **named):
        super().__init__(name, _checkpoint(name), *options, **named)

    @property
    def by_policy(self) -> bool:
        """Whether the transformer predicts PiFlow's many velocities, not one."""
        return self._main.by_policy

    def _load(self, component: str, dtype: torch.dtype):
        loaded = super()._load(component, dtype)
        return prepared(loaded) if component == "transformer" else loaded


class Kandinsky6Folder(PipelineFolder):
    """A pipeline in diffusers' layout, by folder or hub id."""

    layout = LAYOUT

    @cached_property
    def by_policy(self) -> bool:
        named = (self._index.get("scheduler") or [None, None])[1] == PiflowScheduler.__name__
        config = self.layout.defaults("transformer") | self.config("transformer")
        return named or config["out_visual_dim"] != config["in_visual_dim"]

    @cached_property
    def distilled(self) -> str:
        if self.by_policy:
            return "its PiFlow, whose transformer predicts many velocities at once,"
        return "its name" if "distill" in Path(self.name).name.lower() else ""

    def load(self, component: str, dtype: torch.dtype):
        if component == "tokenizer":
            return TextProcessor(AutoTokenizer.from_pretrained(self.name, subfolder="tokenizer"))
        return super().load(component, dtype)


class TextProcessor:
    """Qwen2.5-VL's processor as far as text goes: the same tokens (the tests compare them).

    The whole one also prepares pictures and films, which takes torchvision.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images=None, videos=None, **options) -> BatchEncoding:
        if images is not None or videos is not None:
            raise ValueError("images: expected text alone")
        return self.tokenizer(text, **options)


def prepared(transformer: Kandinsky6Transformer3DModel) -> Kandinsky6Transformer3DModel:
    """A transformer to train: what its class keeps in float32 is computed in float32, too."""
    for module in transformer.modules():
        if type(module) in PRECISE:
            module.__class__ = PRECISE[type(module)]
    if hasattr(transformer, IDLE):
        transformer.get_submodule(IDLE).requires_grad_(False)
        transformer.never_trained = (f"{IDLE}.weight",)
    return transformer


# Under autocast their float32 weights would be rounded to bfloat16 in every product, which they are
# not in the pipeline.
class PreciseModulation(Kandinsky6Modulation):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class PreciseTimeEmbeddings(Kandinsky6TimeEmbeddings):
    def forward(self, timestep: Tensor) -> Tensor:
        with torch.autocast(timestep.device.type, enabled=False):
            return super().forward(timestep)


PRECISE: dict[type[nn.Module], type[nn.Module]] = {
    Kandinsky6Modulation: PreciseModulation,
    Kandinsky6TimeEmbeddings: PreciseTimeEmbeddings,
}


def _checkpoint(name: str) -> Kandinsky6Folder:
    index = pipeline_index(name, "the folder or hub id of a diffusers Kandinsky 6 pipeline")
    if transformer_class(index) != Kandinsky6Transformer3DModel.__name__:
        raise ValueError(
            "model: expected a diffusers Kandinsky 6 pipeline, got "
            f"{index.get('_class_name', 'another format')} in {name}"
        )
    folder = Kandinsky6Folder(name, index)
    if not folder.has("audio_vae"):
        raise ValueError(
            f"model: expected Kandinsky 6 with sound, got a pipeline without an audio VAE in "
            f"{name}; the published ones have audio_vae and vocoder in their model_index.json"
        )
    return folder
