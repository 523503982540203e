"""The size of a transformer and of what is trained of it, counted from its configuration.

Weights are counted on the meta device, so nothing is loaded; blocks of one kind are alike, and one
of each kind is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import nn

from syncdpo.models import Model
from syncdpo.models.base_model import is_kandinsky6
from syncdpo.models.quantised import BLOCKS, quantisable, scale_bytes, stored_bytes
from syncdpo.training.adapter import train_adapter
from syncdpo.training.config import TrainConfig

PER_TOKEN = 110  # bytes that autograd saves of one block, per picture token and channel
PER_TEXT_TOKEN = 31  # the same, of text and sound together, per text token and channel


@dataclass(frozen=True)
class Size:
    """Of a transformer and what of it is trained; weights in numbers, the base in bytes.

    cross: the width in which the streams attend to each other. text: tokens of a caption. block:
    bytes of one block's frozen weights as stored, those that can be offloaded, and offloadable: of
    all blocks. whole_block: of its layers dequantised, where the backward needs these all at once.
    """

    layers: int
    video: int
    audio: int
    cross: int
    text: int
    weights: int
    trained: int
    base: int
    block: int
    offloadable: int
    whole_block: int
    width: int  # bytes of a weight that is not quantised

    def saved_of_a_block(self, video: int, audio: int) -> float:
        """Bytes that autograd saves of one block, in bf16, for one sample of so many tokens."""
        return self.video * (PER_TOKEN * video + PER_TEXT_TOKEN * self.text)

    def inputs_of_blocks(self, video: int, audio: int) -> int:
        """Numbers in the inputs of all blocks, which gradient checkpointing keeps."""
        return self.layers * (self.video * video + self.audio * audio)

    def multiplications(self, video: int, audio: int) -> float:
        """N [14 D² S + 2 D² T + 14 A² L + 2 A² T + 4 D A′ S + 4 A A′ L + 2 D S (S + T)
        + 2 A L (L + T) + 4 A′ S L], of one forward of one sample; A′ is `cross`."""
        d, a, c = self.video, self.audio, self.cross
        s, sound, t = video, audio, self.text
        linear = 14 * d * d * s + 2 * d * d * t + 14 * a * a * sound + 2 * a * a * t
        linear += 4 * d * c * s + 4 * a * c * sound
        attention = 2 * d * s * (s + t) + 2 * a * sound * (sound + t) + 4 * c * s * sound
        return self.layers * (linear + attention)


# Of a fused block of Kandinsky 6, as above: per picture, sound and text token and channel.
KANDINSKY6_SAVED = (68, 80, 16)


@dataclass(frozen=True)
class Kandinsky6Size(Size):
    """feed, audio_feed: inner widths of the feed-forward layers; text_layers: of each stream."""

    feed: int = 0
    audio_feed: int = 0
    text_layers: int = 0

    def saved_of_a_block(self, video: int, audio: int) -> float:
        seen, heard, read = KANDINSKY6_SAVED
        return self.video * (seen * video + read * self.text) + self.audio * heard * audio

    def inputs_of_blocks(self, video: int, audio: int) -> int:
        texts = self.text_layers * (self.video + self.audio) * self.text
        return super().inputs_of_blocks(video, audio) + texts

    def multiplications(self, video: int, audio: int) -> float:
        """N [(8 D² + 2 D E) S + 2 D² T + (8 A² + 2 A F) L + 2 A² T + 2 D A (S + L)
        + 2 D S (S + T + L) + 2 A L (L + T + S)]
        + M [(4 D² + 2 D E + 4 A² + 2 A F) T + 2 (D + A) T²], E and F the inner widths, M the text
        blocks of each stream."""
        d, a, e, f = self.video, self.audio, self.feed, self.audio_feed
        s, sound, t = video, audio, self.text
        block = (8 * d * d + 2 * d * e) * s + (8 * a * a + 2 * a * f) * sound
        block += 2 * (d * d + a * a) * t + 2 * d * a * (s + sound)
        block += 2 * d * s * (s + t + sound) + 2 * a * sound * (sound + t + s)
        reading = (4 * d * d + 2 * d * e + 4 * a * a + 2 * a * f) * t + 2 * (d + a) * t * t
        return self.layers * block + self.text_layers * reading


def forward_flop(size: Size, video: int, audio: int) -> float:
    """F = 2 · multiplications: floating-point operations of one forward of one sample."""
    return 2 * size.multiplications(video, audio)


def size_of(config: TrainConfig, model: Model) -> Size:
    """What `config` makes of `model`'s transformer, whose blocks of a kind are alike."""
    settings = dict(getattr(model, "config", None) or model.transformer.config)
    width = 2 if hasattr(model, "config") else 4  # bf16 on a GPU, but for the embedded model
    wanted = model.of_audio if config.trained == "audio" else lambda name: True
    with torch.device("meta"):
        transformer, layers = _one_of_each_block(settings)
        shapes = {f"{n}.weight": tuple(x.weight.shape) for n, x in quantisable(transformer).items()}
        numbers = {name: p.numel() for name, p in transformer.named_parameters()}
        precise = _kept_in_float32(transformer)
        if config.lora_rank:
            train_adapter(transformer, config.lora_rank, model.lora_targets, wanted, config.seed)
        trained = {
            name: p.numel()
            for name, p in transformer.named_parameters()
            if p.requires_grad and wanted(name)
        }
    stored = {n: number * (4 if n in precise else width) for n, number in numbers.items()}
    scales = dict.fromkeys(layers, 0)
    if config.base_precision != "bf16":
        stored |= {name: stored_bytes(s, config.base_precision) for name, s in shapes.items()}
        for name, shape in shapes.items():
            scales[_block_of(name, layers)] += scale_bytes(shape, config.base_precision)
    needed_whole = config.base_precision in ("fp8", "int8")  # nf4's backward does it layer by layer
    blocks = {
        kind: sum(held for name, held in stored.items() if _block_of(name, layers) == kind)
        - scales[kind]
        for kind in layers
    }
    largest = max(layers, key=layers.get)
    whole = sum(numbers[name] for name in shapes if _block_of(name, layers) == largest)
    counts = {
        "weights": _all_blocks(numbers, layers),
        "trained": _all_blocks(trained, layers),
        "base": _all_blocks(stored, layers),
        "block": blocks[largest],
        "offloadable": sum(blocks[kind] * count for kind, count in layers.items()),
        "whole_block": width * whole if needed_whole else 0,
        "width": width,
        "text": getattr(model, "text_tokens", 1),
    }
    return _kandinsky6(settings, counts) if is_kandinsky6(settings) else _ltx2(settings, counts)


def _ltx2(settings: Mapping, counts: dict) -> Size:
    video, audio = (
        settings[f"{stream}num_attention_heads"] * settings[f"{stream}attention_head_dim"]
        for stream in ("", "audio_")
    )
    return Size(layers=settings["num_layers"], video=video, audio=audio, cross=audio, **counts)


def _kandinsky6(settings: Mapping, counts: dict) -> Kandinsky6Size:
    audio = settings["model_dim_a"] or settings["model_dim"]
    return Kandinsky6Size(
        layers=settings["num_visual_blocks"],
        video=settings["model_dim"],
        audio=audio,
        cross=audio,
        feed=settings["ff_dim"],
        audio_feed=settings["ff_dim_a"] or settings["ff_dim"],
        text_layers=settings["num_text_blocks"],
        **counts,
    )


def _one_of_each_block(settings: Mapping) -> tuple[nn.Module, dict[str, int]]:
    """A transformer with one block of each kind, and how many there are of which, by `BLOCKS`."""
    if not is_kandinsky6(settings):
        transformer = LTX2VideoTransformer3DModel.from_config({**settings, "num_layers": 1})
        return transformer, {BLOCKS[-1]: settings["num_layers"]}
    from syncdpo.models.kandinsky6_parts import LAYOUT, prepared

    kind = LAYOUT.classes["transformer"]
    one = {**settings, "num_visual_blocks": 1, "num_text_blocks": 1}
    reading, visual = settings["num_text_blocks"], settings["num_visual_blocks"]
    counts = dict(zip(BLOCKS, (reading, reading, visual), strict=False))
    return prepared(kind.from_config(one)), counts


def _kept_in_float32(transformer: nn.Module) -> set[str]:
    """Parameters that diffusers loads in float32 whatever it is asked for.

    By whole names of modules: of Kandinsky 6's modulations only those of its last layers (0.42).
    """
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    return {name for name, _ in transformer.named_parameters() if kept & set(name.split("."))}


def _all_blocks(counted: dict[str, int], layers: Mapping[str, int]) -> int:
    """The sum over all parameters, of which `counted` has those of one block of each kind."""
    return sum(n * layers.get(_block_of(name, layers), 1) for name, n in counted.items())


def _block_of(name: str, layers: Mapping[str, int]) -> str | None:
    """The kind of block that a parameter belongs to; None outside of blocks."""
    return next((kind for kind in layers if name.startswith(f"{kind}.")), None)
