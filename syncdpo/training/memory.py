"""What a run will need, computed before it begins: bytes by part, and operations of a step.

The formulas are those of docs/ltx2.md and docs/kandinsky6.md; what depends on the model is in
`syncdpo.training.sizes`. Nothing is loaded.
"""

from __future__ import annotations

from dataclasses import replace

from syncdpo.data.precomputed import open_latents
from syncdpo.models import Model, load_model
from syncdpo.models.own import is_own
from syncdpo.training.config import TrainConfig
from syncdpo.training.sizes import Size, forward_flop, size_of

GB = 1e9
SPARE = 3 * GB  # for CUDA and fragmentation
RESIDENT = 3  # blocks of an offloaded base on the device: before, at and after the one at work
MOMENTS = {"adamw": 8, "adamw8bit": 2 + 8 / 256}  # bytes per trained weight


def needed_bytes(config: TrainConfig, size: Size, video: int, audio: int) -> dict[str, float]:
    """Bytes on the device at the peak of a step, by part; `video` and `audio` tokens per clip."""
    samples = config.batch_size * (2 if _pairs(config) and not config.split_pair else 1)
    # Counted for bf16 activations.
    scale = 1 if config.mixed_precision == "bf16" else 2
    block = samples * scale * size.saved_of_a_block(video, audio)
    base = size.base
    if config.offload == "blocks":
        base -= max(0, size.offloadable - RESIDENT * size.block)
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
        parts["checkpoints"] = samples * scale * 2 * size.inputs_of_blocks(video, audio)
        parts["one block"] = block + size.whole_block
    else:
        parts["all blocks"] = size.layers * (block + size.whole_block)
    return parts | {"spare": SPARE}


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
        away = size.offloadable / GB
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
    if hasattr(model, "transformer_tokens"):  # which takes several latents as one
        return model.transformer_tokens
    video, audio = (line.frames * line.tokens for line in model.timelines)
    return video, audio


def _model_with_format(config: TrainConfig) -> Model:
    if is_own(config.model):
        raise ValueError(
            "estimate: expected tiny, LTX-2 or Kandinsky 6, whose blocks the formulas are of, got "
            f"{config.model}"
        )
    model = load_model(config.model, sigma=config.sigma)
    if config.data:
        open_latents(config.data, model)
    return model
