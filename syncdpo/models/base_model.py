"""Which base a LoRA belongs to: its family and version, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SAMPLES = 64  # numbers of each tensor that make the fingerprint
# Where our own files and those of musubi-tuner, ai-toolkit and others say a version.
VERSION_KEYS = ("base_version", "ss_ltx_version", "ss_base_model_version", "modelspec.architecture")
KANDINSKY6_SIZES = {1792: "6.0 Lite", 4096: "6.0 Pro"}  # by the width of the picture's stream


def is_kandinsky6(config: Mapping[str, Any] | object) -> bool:
    """Whether these are the settings of diffusers' Kandinsky 6 transformer."""
    known = isinstance(config, Mapping)
    return known and "in_visual_dim" in config and "in_audio_dim" in config


def version_of(config: Mapping[str, Any] | object) -> str | None:
    """2.0, 2.3 or 2.5, from the settings of diffusers' LTX-2 transformer; 6.0 Lite, 6.0 Pro, or 6.0
    of another size, from those of Kandinsky 6's; None for another class, whose settings may be of
    any kind.

    Since 2.3 the text is modulated, and projected before it comes here; 2.5 has no biases in the
    video's feed-forward layers, and may modulate the text by no σ.
    """
    if not isinstance(config, Mapping):
        return None
    if is_kandinsky6(config):
        return KANDINSKY6_SIZES.get(config["model_dim"], "6.0")
    if "cross_attn_mod" not in config:
        return None
    if not config["cross_attn_mod"]:
        return "2.0"
    newest = not config.get("ff_bias", True) or not config.get("use_prompt_adaln_single", True)
    return "2.5" if newest else "2.3"


def version_named(metadata: Mapping[str, str]) -> str | None:
    """The version of LTX-2 that a file of weights says it is for, if it says one."""
    for key in VERSION_KEYS:
        value = metadata.get(key, "")
        found = re.search(r"(?:^|ltx[a-z]*[-_ ]?)v?(2\.[0-9])(?![0-9])", value.lower())
        if found:
            return found[1]
    return None


@torch.no_grad()
def fingerprint(transformer: nn.Module) -> str:
    """16 hexadecimal digits that tell a model's weights from others, whatever file they came in.

    SHA-256 of all tensors' names and shapes and of 64 evenly spaced numbers of each, as bfloat16:
    the same whether the weights were loaded in float32 or bfloat16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        numbers = tensor.reshape(-1)
        count = min(SAMPLES, len(numbers))
        places = [i * (len(numbers) - 1) // max(count - 1, 1) for i in range(count)]
        sample = numbers[torch.tensor(places, dtype=torch.int64, device=numbers.device)].to(
            torch.bfloat16
        )
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
