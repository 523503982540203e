"""What the files of one clip that the LTX-2 trainer prepared must hold.

Latents, audio latents and conditions come as `torch.load` gave them; each is checked and brought to
what `LTX2.velocity` takes. What is wrong with a clip is `Unusable`, with a reason that follows its
name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from syncdpo.data.buckets import Bucket
from syncdpo.data.foreign_tensors import Unusable, kind_of

LARGEST = 1e4  # of a latent: normalised, they stay near 1, and the square of 1e20 is infinite
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ClipShape:
    """What is kept of a clip that was checked."""

    size: tuple[int, int, int]  # frames, height, width in latents
    rate: float  # pictures per second
    audio: int  # audio latents
    dtypes: dict[str, torch.dtype]
    fault: str  # how picture and sound differ in length, if they do


@dataclass(frozen=True)
class Layout:
    """What a model expects of the files."""

    model: str
    channels: int
    stride: int  # pictures of every latent but the first, which has `first`
    first: int
    down: int  # pixels of a latent
    across: int
    audio_channels: int
    audio_bins: int
    audio_rate: float  # latents per second
    tokens: int
    widths: dict[str, int]  # of the text features of each stream

    @classmethod
    def of(cls, model, root: Path) -> Layout:
        config = getattr(model, "config", None)
        if not isinstance(config, Mapping) or "audio_scale_factor" not in config:
            raise ValueError(
                f"data: {root} holds latents of LTX-2; expected an LTX-2 pipeline as model, "
                f"got {type(model).__name__}"
            )
        stride, down, across = model.config["vae_scale_factors"]
        connectors = model.parts.config("connectors")
        audio_channels = model.parts.config("audio_vae")["latent_channels"]
        return cls(
            model=model.parts.name,
            channels=model.config["in_channels"],
            stride=stride,
            first=model.config["causal_offset"],
            down=down,
            across=across,
            audio_channels=audio_channels,
            audio_bins=model.config["audio_in_channels"] // audio_channels,
            audio_rate=model.timelines[1].rate,
            tokens=model.text_tokens,
            widths={
                stream: connectors[f"{stream}_connector_num_attention_heads"]
                * connectors[f"{stream}_connector_attention_head_dim"]
                for stream in ("video", "audio")
            },
        )

    def pictures(self, latents: int) -> int:
        return (latents - 1) * self.stride + self.first

    def bucket(self, size: tuple[int, int, int], rate: float) -> Bucket:
        """The clip format of latents of that size."""
        frames, height, width = size
        return Bucket(self.pictures(frames), height * self.down, width * self.across, rate)

    def size(self, bucket: Bucket) -> tuple[int, int, int]:
        """The inverse of `bucket`."""
        frames = (bucket.frames - self.first) // self.stride + 1
        return frames, bucket.height // self.down, bucket.width // self.across


def packed_video(content: dict, layout: Layout) -> tuple[Tensor, tuple[int, int, int], float]:
    """Packed latents [S,C], their size and the frame rate."""
    missing = {"latents", "num_frames", "height", "width", "fps"} - content.keys()
    if missing:
        raise Unusable(f"it lacks the keys {', '.join(sorted(missing))}")
    size = tuple(_number(content, key) for key in ("num_frames", "height", "width"))
    if any(n != int(n) or n < 1 for n in size):
        raise Unusable(f"its size in latents is {size_text(size)}, expected whole numbers above 0")
    size = tuple(int(n) for n in size)
    rate = _number(content, "fps")
    if not rate > 0:
        raise Unusable(f"its fps is {rate:g}, expected more than 0")
    latents = _floats(content, "latents", "latents", LARGEST)
    spread, packed = [layout.channels, *size], [math.prod(size), layout.channels]
    if list(latents.shape) == spread:
        return latents.flatten(1).T, size, rate
    if list(latents.shape) == packed:
        return latents, size, rate
    raise Unusable(
        f"its latents are {list(latents.shape)}, expected {spread} or packed {packed}, for it says "
        f"{size_text(size)} (num_frames, height, width) and the model's have {layout.channels} "
        "channels"
    )


def packed_audio(content: dict, layout: Layout) -> Tensor:
    """Packed latents [L,C]."""
    latents = _floats(content, "latents", "audio latents", LARGEST)
    channels, bins = layout.audio_channels, layout.audio_bins
    if latents.ndim != 3 or (latents.shape[0], latents.shape[2]) != (channels, bins):
        raise Unusable(
            f"its audio latents are {list(latents.shape)}, expected [{channels}, time, {bins}]"
        )
    for key, expected in (("num_time_steps", latents.shape[1]), ("frequency_bins", bins)):
        if key in content and (found := _number(content, key)) != expected:
            raise Unusable(f"its {key} is {found:g}, its audio latents have {expected}")
    return latents.transpose(0, 1).flatten(1)


def mistimed(content: dict, count: int, pictures: int, rate: float, layout: Layout) -> str:
    """How the sound, of `count` latents, differs in length from the pictures; or "".

    As many latents as the pictures last, rounded, or one more: the trainer's codec makes a whole
    one of the last fraction. A `duration` within one latent.
    """
    seconds = pictures / rate
    lasts = f"its pictures {seconds:.2f} s at {rate:g} fps"
    wanted = round(seconds * layout.audio_rate)
    if not 0 < wanted <= count <= wanted + 1:
        return (
            f"expected {wanted or 1} audio latents, got {count}: its sound lasts "
            f"{count / layout.audio_rate:.2f} s, {lasts}"
        )
    duration = _number(content, "duration") if "duration" in content else seconds
    if abs(duration - seconds) * layout.audio_rate > 1 + 1e-6:
        return f"its duration is {duration:.2f} s, {lasts}"
    return ""


def packed_text(content: dict, layout: Layout) -> dict[str, Tensor]:
    """Both streams' text features and their mask, padded on the left."""
    keys = {"video": "video_prompt_embeds", "audio": "audio_prompt_embeds"}
    if keys["video"] not in content:
        keys["video"] = "prompt_embeds"
    alone = keys["audio"] in content
    if not alone:  # one text for both, where their widths allow it
        keys["audio"] = keys["video"]
    mask = _mask(content, layout)
    padding = layout.tokens - len(mask)
    sample = {}
    for stream, key in keys.items():
        features = _floats(content, key, f"conditions' {key}")
        width = layout.widths[stream]
        if list(features.shape) != [len(mask), width]:
            missing = "" if alone else "; there is no audio_prompt_embeds"
            raise Unusable(
                f"its {stream}_features: expected [tokens, channels] of "
                f"[{len(mask)}, {width}] in {key}, got {list(features.shape)}{missing}"
            )
        sample[f"{stream}_features"] = F.pad(features, (0, 0, padding, 0))
    return sample | {"text_mask": F.pad(mask, (padding, 0))}


def _mask(content: dict, layout: Layout) -> Tensor:
    """Which tokens are text, [N], N at most the model's."""
    mask = _tensor(content, "prompt_attention_mask", "conditions' prompt_attention_mask")
    if mask.ndim != 1 or not 1 <= len(mask) <= layout.tokens:
        raise Unusable(
            f"its conditions' prompt_attention_mask is {list(mask.shape)}, "
            f"expected [tokens], {layout.tokens} at most"
        )
    if mask.is_complex() or not ((mask == 0) | (mask == 1)).all():
        raise Unusable("its conditions' prompt_attention_mask holds other numbers than 0 and 1")
    if not mask.any():
        raise Unusable("its conditions' prompt_attention_mask marks no token as text")
    return mask.bool()


def _number(content: dict, key: str) -> float:
    value = content[key]
    if _is_tensor(value) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = repr(value) if isinstance(value, (bool, str)) else kind_of(value)
        raise Unusable(f"its {key} is {shown[:40]}, expected a number")
    if not abs(value) < 1e9:  # nor NaN
        shown = f"{value}" if isinstance(value, float) else "huge"
        raise Unusable(f"its {key} is {shown}, expected a number below 1e9")
    return value


def _floats(content: dict, key: str, name: str, largest: float = math.inf) -> Tensor:
    """A tensor of finite floating numbers, in float32 where float64 is stored."""
    tensor = _tensor(content, key, name)
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise Unusable(f"its {name} are {kind}, expected floating numbers of 16, 32 or 64 bits")
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    # Not isfinite: of a large tensor that makes another one.
    lowest, highest = (end.item() for end in torch.aminmax(tensor)) if tensor.numel() else (0, 0)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise Unusable(f"its {name} hold NaN or infinite numbers")
    if max(-lowest, highest) > largest:
        raise Unusable(
            f"its {name} reach {max(-lowest, highest):.1e}, expected normalised ones, near 1"
        )
    return tensor


def _tensor(content: dict, key: str, name: str) -> Tensor:
    """An ordinary tensor of `content`."""
    if key not in content:
        raise Unusable(f"it lacks the key {key}: no {name}")
    value = content[key]
    if not _is_tensor(value):
        raise Unusable(f"its {name} is {kind_of(value)}, expected a tensor of values")
    return value.detach()


def _is_tensor(value) -> bool:
    """Not sparse or quantised, nor on the meta device, which keeps no values."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def size_text(size: tuple) -> str:
    return "x".join(f"{n:g}" for n in size)
