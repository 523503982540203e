"""What a run will need, computed before it begins: bytes by part, and operations of a step.

The formulas are those of docs/ltx2.md. Weights are counted on the meta device, from the model's own
configuration, so nothing is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import LTX2VideoTransformer3DModel

from syncdpo.data.precomputed import open_latents
from syncdpo.models import Model, load_model
from syncdpo.models.own import is_own
from syncdpo.models.quantised import BLOCKS, quantisable, scale_bytes, stored_bytes
from syncdpo.training.adapter import train_adapter
from syncdpo.training.config import TrainConfig

GB = 1e9
SPARE = 3 * GB  # for CUDA and fragmentation
PER_TOKEN = 110  # bytes that autograd saves of one block, per picture token and channel
PER_TEXT_TOKEN = 31  # the same, of text and sound together, per text token and channel
RESIDENT = 3  # blocks of an offloaded base on the device: before, at and after the one at work
MOMENTS = {"adamw": 8, "adamw8bit": 2 + 8 / 256}  # bytes per trained weight


@dataclass(frozen=True)
class Size:
    """Of a transformer and what of it is trained; weights in numbers, the base in bytes.

    cross: the width in which the streams attend to each other. text: tokens of a caption. block:
    bytes of one block's frozen weights as stored, those that can be offloaded. whole_block: of its
    layers dequantised, where the backward needs these all at once.
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
    whole_block: int
    width: int  # bytes of a weight that is not quantised


def size_of(config: TrainConfig, model: Model) -> Size:
    """What `config` makes of `model`'s transformer, whose blocks are alike: one is counted."""
    settings = dict(getattr(model, "config", None) or model.transformer.config)
    width = 2 if hasattr(model, "config") else 4  # LTX-2 is bf16 on a GPU
    wanted = model.of_audio if config.trained == "audio" else lambda name: True
    with torch.device("meta"):
        transformer = LTX2VideoTransformer3DModel.from_config(settings | {"num_layers": 1})
        shapes = {f"{n}.weight": tuple(x.weight.shape) for n, x in quantisable(transformer).items()}
        numbers = {name: p.numel() for name, p in transformer.named_parameters()}
        if config.lora_rank:
            train_adapter(transformer, config.lora_rank, model.lora_targets, wanted, config.seed)
        trained = {
            name: p.numel()
            for name, p in transformer.named_parameters()
            if p.requires_grad and wanted(name)
        }
    stored = {name: number * width for name, number in numbers.items()}
    kept = 0
    if config.base_precision != "bf16":
        stored |= {name: stored_bytes(s, config.base_precision) for name, s in shapes.items()}
        kept = sum(scale_bytes(shape, config.base_precision) for shape in shapes.values())
    needed_whole = config.base_precision in ("fp8", "int8")  # nf4's backward does it layer by layer
    layers = settings["num_layers"]
    video, audio = (
        settings[f"{stream}num_attention_heads"] * settings[f"{stream}attention_head_dim"]
        for stream in ("", "audio_")
    )
    return Size(
        layers=layers,
        video=video,
        audio=audio,
        cross=audio,
        text=getattr(model, "text_tokens", 1),
        weights=_all_blocks(numbers, layers),
        trained=_all_blocks(trained, layers),
        base=_all_blocks(stored, layers),
        block=sum(held for name, held in stored.items() if _in_a_block(name)) - kept,
        whole_block=width * sum(numbers[name] for name in shapes) if needed_whole else 0,
        width=width,
    )


def _all_blocks(counted: dict[str, int], layers: int) -> int:
    """The sum over all parameters, of which `counted` has those of one block and of the rest."""
    return sum(n * (layers if _in_a_block(name) else 1) for name, n in counted.items())


def _in_a_block(name: str) -> bool:
    return name.startswith(f"{BLOCKS}.")


def needed_bytes(config: TrainConfig, size: Size, video: int, audio: int) -> dict[str, float]:
    """Bytes on the device at the peak of a step, by part; `video` and `audio` tokens per clip."""
    samples = config.batch_size * (2 if _pairs(config) and not config.split_pair else 1)
    streams = size.video * video + size.audio * audio
    # Counted for bf16 activations.
    scale = 1 if config.mixed_precision == "bf16" else 2
    block = samples * scale * size.video * (PER_TOKEN * video + PER_TEXT_TOKEN * size.text)
    base = size.base
    if config.offload == "blocks":
        base -= max(0, size.layers - RESIDENT) * size.block
    parts = {
        # What trains all weights holds them in float32.
        "base": base if config.lora_rank else size.width * (size.weights - size.trained),
        "trained weights": 4 * size.trained,
        "gradients": 4 * size.trained,
        "optimizer": MOMENTS[config.optimizer] * size.trained,
    }
    if not config.lora_rank and _pairs(config) and not config.cache_reference:
        parts["reference"] = size.width * size.weights
    if config.gradient_checkpointing:
        parts["checkpoints"] = samples * scale * 2 * size.layers * streams
        parts["one block"] = block + size.whole_block
    else:
        parts["all blocks"] = size.layers * (block + size.whole_block)
    return parts | {"spare": SPARE}


def forward_flop(size: Size, video: int, audio: int) -> float:
    """F = 2 N [14 D² S + 2 D² T + 14 A² L + 2 A² T + 4 D A′ S + 4 A A′ L
    + 2 D S (S + T) + 2 A L (L + T) + 4 A′ S L], floating-point operations of one sample."""
    d, a, c = size.video, size.audio, size.cross
    s, sound, t = video, audio, size.text
    linear = 14 * d * d * s + 2 * d * d * t + 14 * a * a * sound + 2 * a * a * t
    linear += 4 * d * c * s + 4 * a * c * sound
    attention = 2 * d * s * (s + t) + 2 * a * sound * (sound + t) + 4 * c * s * sound
    return 2 * size.layers * (linear + attention)


def step_flop(config: TrainConfig, size: Size, video: int, audio: int) -> float:
    """Of one optimizer step in one process: forwards, their recomputation, and the backward."""
    pairs = _pairs(config)
    forwards = 1 + config.gradient_checkpointing + (1 if config.lora_rank else 2)
    forwards += pairs and not config.cache_reference
    forwards += pairs and config.split_pair
    samples = config.batch_size * config.accumulation * (2 if pairs else 1)
    return samples * forwards * forward_flop(size, video, audio)


def describe_needs(config: TrainConfig, *, tflops: float | None = None) -> str:
    """The estimate in lines; `tflops`, 10¹² operations a second that the GPU reaches, gives time.

    Takes the clips' format from `config.data`, or else the model's own. Raises ValueError where
    model or data cannot be read.
    """
    model = _model_with_format(config)
    size, streams = size_of(config, model), _tokens(model)
    parts = needed_bytes(config, size, *streams)
    lines = [f"{name:<20}{held / GB:8.2f} GB" for name, held in parts.items()]
    lines.append(f"{'in all':<20}{sum(parts.values()) / GB:8.2f} GB on each GPU")
    if config.offload == "blocks":
        away = size.layers * size.block / GB
        lines.append(f"{'host memory':<20}{away:8.2f} GB for the blocks, of each process")
    flop = step_flop(config, size, *streams)
    lines.append(f"{'a step':<20}{flop / 1e12:8.1f} TFLOP")
    if tflops is not None:
        if not tflops > 0:
            raise ValueError(f"tflops: expected more than 0, got {tflops}")
        seconds = flop / 1e12 / tflops
        lines.append(f"{'':<20}{seconds:8.2f} s at {tflops:g} TFLOP/s, if nothing else takes time")
        lines.append(f"{config.steps:<5}{'steps':<15}{seconds * config.steps / 3600:8.2f} h")
    tokens = " and ".join(f"{count:,}" for count in streams)
    return "\n".join([f"{tokens} tokens of picture and sound per clip", *lines])


def out_of_memory(config: TrainConfig) -> str:
    """One sentence for a run that found no memory: what it needs, and what would save most."""
    if is_own(config.model):
        some = "; ".join(said for said, _ in _cheaper(config)) or "shorter or smaller clips"
        return (
            f"the GPU ran out of memory; how much {config.model} needs is not known here, less "
            f"with one of {some}"
        )
    model = _model_with_format(config)

    def total(candidate: TrainConfig) -> float:
        return sum(needed_bytes(candidate, size_of(candidate, model), *_tokens(model)).values())

    whole = total(config)
    saved = {said: whole - total(replace(config, **change)) for said, change in _cheaper(config)}
    most = sorted((said for said in saved if saved[said] > 0), key=saved.get, reverse=True)[:3]
    advice = ", ".join(f"{said} (saves {saved[said] / GB:.1f} GB)" for said in most)
    return (
        f"the GPU ran out of memory: this run needs about {whole / GB:.1f} GB; most would be saved "
        f"by {advice or 'shorter or smaller clips'}; `syncdpo train --estimate` shows the parts"
    )


def _cheaper(config: TrainConfig) -> list[tuple[str, dict]]:
    """Settings that need less memory than `config`'s, in words and as changes to it."""
    changes = [
        {"gradient_checkpointing": True},
        {"optimizer": "adamw8bit"},
        *([{"split_pair": True}] if _pairs(config) else []),
    ]
    if config.lora_rank:
        changes.append({"base_precision": "nf4"})
        changes.append({"offload": "blocks"})
    else:
        changes.append({"lora_rank": 32})
    if config.batch_size > 1:
        half = {"batch_size": config.batch_size // 2, "accumulation": config.accumulation * 2}
        changes.append(half)
    named = []
    for change in changes:
        said = ", ".join(f"{name}: {_yaml(value)}" for name, value in change.items())
        if change.get("offload") == "blocks":  # which asks for it
            change = change | {"gradient_checkpointing": True}
        if any(getattr(config, name) != value for name, value in change.items()):
            named.append((said, change))
    return named


def _yaml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _pairs(config: TrainConfig) -> bool:
    return config.compares


def _tokens(model: Model) -> tuple[int, int]:
    """(S, L): of the picture and of the sound, per clip."""
    video, audio = (line.frames * line.tokens for line in model.timelines)
    return video, audio


def _model_with_format(config: TrainConfig) -> Model:
    if is_own(config.model):
        raise ValueError(
            "estimate: expected tiny or LTX-2, whose blocks the formulas are of, got "
            f"{config.model}"
        )
    model = load_model(config.model, sigma=config.sigma)
    if config.data:
        open_latents(config.data, model)
    return model
