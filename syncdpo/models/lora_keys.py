"""What a LoRA's tensors are called in the tools that people use, and what they mean.

    diffusers              transformer.<module>.lora_A.weight, its alpha in the file's metadata
    ltx-trainer, ComfyUI   diffusion_model.<original module>.lora_A.weight; lora_down and alpha too
    ai-toolkit             as ltx-trainer, alpha folded in
    musubi-tuner           lora_unet_model_<original module, dots as _>.lora_down.weight, alpha
    peft                   base_model.model.<module>.lora_A.weight, alpha in adapter_config.json

Modules are called as in diffusers' transformer, or as in the model's own code, the original: that
of Lightricks, or Kandinsky 6's, whose names ComfyUI has (`visual_blocks.0.videoT`). Here every
module has one pair (A [rank, in], B [out, rank]) with W + B·A; a scale alpha / rank other than 1
is folded into B, in float32, as no two tools read one from the same place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

Pairs = dict[str, tuple[Tensor, Tensor]]

PREFIX = "diffusion_model."  # which ComfyUI, ltx-core and diffusers all know
# First components of module names that differ; below them, linear layers are called the same.
ORIGINAL = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
# Within the blocks of Kandinsky 6, as ComfyUI renames its published weights when it loads them.
KANDINSKY6 = {
    "visual_transformer_blocks.": "visual_blocks.",
    "video_dec_block.": "videoT.",
    "audio_dec_block.": "audioT.",
    ".attn.": ".self_attention.",
    ".feed_forward.net.0.proj": ".feed_forward.in_layer",
    ".feed_forward.net.2": ".feed_forward.out_layer",
}
KANDINSKY6_BLOCKS = re.compile(r"(visual|video_text|audio_text)_transformer_blocks\.")
PREFIXES = re.compile(
    r"(base_model\.model\.|model\.|diffusion_model\.|transformer\."
    r"|lora_unet_|lora_transformer_|lycoris_|model_)"
)
HALF = re.compile(
    r"\.(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up))(?:\.default)?\.weight$"
)
ENDINGS = re.compile(rf"{HALF.pattern}|\.(?P<alpha>alpha)$")
# What is no LoRA, though it stands in such a file: the kind by what its keys look like.
KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.oft_"),
    "LoCon": re.compile(r"\.lora_mid\."),
    "a LoRA with biases": re.compile(r"\.lora_[AB](\.default)?\.bias$"),
    "a difference of weights": re.compile(r"\.(diff|diff_b|set_weight)$"),
}
NAMED = 3  # keys that a sentence names


@dataclass(frozen=True)
class Lora:
    """pairs: by module, as diffusers calls it; unmatched: keys that belong to no module."""

    pairs: Pairs
    unmatched: list[str]


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a LoRA, or of a kin of it, and not a model's own weights."""
    return any(kind.search(key) for key in keys for kind in (HALF, *KINDS.values()))


def original_name(module: str) -> str:
    """What the model's own transformer calls a module that diffusers calls `module`."""
    if KANDINSKY6_BLOCKS.match(module):
        for ours, original in KANDINSKY6.items():
            module = module.replace(ours, original)
        return module
    first, dot, rest = module.partition(".")
    return ORIGINAL.get(first, first) + dot + rest


def linear_modules(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of all that a LoRA can reach, whether or not one is there already."""
    layers = {
        name: getattr(module, "base_layer", module)
        for name, module in transformer.named_modules()
        if ".base_layer" not in f".{name}" and ".lora_" not in f".{name}"
    }
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear)
    }


def read_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], modules: dict[str, tuple[int, int]]
) -> Lora:
    """The pairs of a LoRA in any of the formats above, float32, for these `modules`.

    Raises ValueError for another kind of adapter, for values that are not finite, and where a
    pair is not whole or its shapes do not fit its module.
    """
    refuse_other_kinds(tensors)
    known = _spellings(modules)
    found: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        ending = ENDINGS.search(key)
        module = _module(key[: ending.start()], known) if ending else None
        if module is None:
            unmatched.append(key)
            continue
        parts = found.setdefault(module, {})
        if ending.lastgroup in parts:
            raise ValueError(f"weights: {key} is the second {ending.lastgroup} of {module}")
        parts[ending.lastgroup] = _finite(key, tensor)
    scale_of = _scales(metadata)
    pairs = {
        module: _pair(module, parts, modules[module], scale_of)
        for module, parts in sorted(found.items())
    }
    return Lora(pairs, unmatched)


def written_lora(
    pairs: Pairs, prefix: str = PREFIX, spelled: Callable[[str], str] = original_name
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ComfyUI, ltx-core and diffusers load as W + B·A.

    prefix, spelled: how a tool calls a module.

    There are no keys for alpha: diffusers refuses them, ltx-core takes no notice. It equals the
    rank, which is what all three suppose where there is none, and diffusers is told so, as its
    older versions do not suppose it where ranks differ.
    """
    tensors, ranks = {}, {}
    for module, (a, b) in pairs.items():
        name = prefix + spelled(module)
        tensors[f"{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{name}.lora_B.weight"] = b.contiguous()
        ranks[module] = len(a)
    config = {f"transformer.{name}": value for name, value in lora_settings(ranks).items()}
    spoken = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
    metadata = {
        "format": "pt",
        "lora_rank": spoken,
        "lora_alpha": spoken,
        "lora_adapter_metadata": json.dumps(config, sort_keys=True),
    }
    return tensors, metadata


def lora_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig`: these modules, each with its rank, each with scale 1."""
    every = list(ranks.values())
    rank = max(every, key=every.count)
    # One pattern per rank: peft tries every pattern on every module.
    others = {
        f"^(?:{'|'.join(re.escape(name) for name in ranks if ranks[name] == other)})": other
        for other in sorted(set(every) - {rank})
    }
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        # Dropout would make the margin noise: policy and reference must see the same network.
        "lora_dropout": 0.0,
    }


def named(keys: list[str]) -> str:
    """A few keys by their names and the others by their number."""
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """Raises ValueError where there is more than a LoRA's two matrices and their alpha."""
    for key in keys:
        for kind, pattern in KINDS.items():
            if pattern.search(key):
                raise ValueError(
                    f"weights: expected a plain LoRA, got {kind} ({key}), which is not supported; "
                    "merge it into the model's weights with the tool that made it"
                )


def _spellings(modules) -> dict[str, str]:
    """Every way to spell a module, prefixes aside, to its name in diffusers."""
    spellings = {}
    for module in modules:
        for name in (module, original_name(module)):
            spellings |= {name: module, name.replace(".", "_"): module}
    return spellings


def _module(spelled: str, known: dict[str, str]) -> str | None:
    while spelled not in known:
        prefix = PREFIXES.match(spelled)
        if prefix is None:
            return None
        spelled = spelled[prefix.end() :]
    return known[spelled]


def _finite(key: str, tensor: Tensor) -> Tensor:
    if tensor.is_complex() or not tensor.float().isfinite().all():
        raise ValueError(f"weights: expected finite numbers in {key}, got NaN or infinity")
    return tensor.float()


def _pair(module: str, parts: dict[str, Tensor], size: tuple[int, int], scale_of):
    missing = {"A", "B"} - parts.keys()
    if missing:
        raise ValueError(f"weights: {module} of the LoRA lacks its matrix {' and '.join(missing)}")
    a, b = parts["A"], parts["B"]
    (rows, columns), rank = size, len(a) if a.ndim else 0
    if not rank or a.shape != (rank, columns) or b.shape != (rows, rank):
        raise ValueError(
            f"weights: {module} expects a LoRA of A [rank, {columns}] and B [{rows}, rank], got "
            f"{list(a.shape)} and {list(b.shape)}: it belongs to another model or version"
        )
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ValueError(f"weights: expected one number as alpha of {module}")
        return a, b * (parts["alpha"].item() / rank)
    return a, b * scale_of(module, rank)


def _scales(metadata: Mapping[str, str]):
    """(module, rank) → the scale that diffusers' or peft's settings in a file give it; 1 else."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings = {name.removeprefix("transformer."): v for name, v in settings.items()}
        patterns = dict(settings.get("alpha_pattern") or {})
        alpha = settings.get("lora_alpha")
        alpha = alpha if alpha is None else float(alpha)
        patterns = {pattern: float(value) for pattern, value in patterns.items()}
        root = bool(settings.get("use_rslora"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights: expected settings of peft in the LoRA's metadata, got {error}"
        ) from error

    def scale(module: str, rank: int) -> float:
        key = module if module in patterns else get_pattern_key(patterns, module)
        value = patterns.get(key, alpha)
        return 1.0 if value is None else value / (math.sqrt(rank) if root else rank)

    return scale
