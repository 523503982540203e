"""Weights on disk: full ones as diffusers reads them, LoRAs as every tool does; safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from syncdpo.models.adapters import add_adapter
from syncdpo.models.base_model import is_kandinsky6, version_named, version_of
from syncdpo.models.lora_keys import (
    Pairs,
    is_lora,
    linear_modules,
    lora_settings,
    named,
    original_name,
    read_lora,
    refuse_other_kinds,
    written_lora,
)

FULL = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
COMFYUI_LORA = "comfyui_lora.safetensors"  # the same LoRA, where ComfyUI wants other names
ADAPTER = "default"  # the one that is loaded, trained and saved
CHECKPOINTS = ("checkpoint-", "best-")  # of a run: beginnings of names that wait to be finished
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def of_audio(name: str) -> bool:
    """Whether a parameter or module of an LTX-2 transformer, by its name, serves the audio's half:
    the sound and how it attends to the picture, not how the picture attends to the sound."""
    return "audio" in name and "audio_to_video" not in name


# --- out ------------------------------------------------------------------------------------------


def save_weights(
    folder: Path,
    transformer: nn.Module,
    state: dict[str, Tensor],
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a transformer's state dict to `folder`.

    LoRA, where `transformer` carries an adapter: what ComfyUI, ltx-core's loader and
    `LTX2Pipeline.load_lora_weights` take; of Kandinsky 6 what `transformer.load_lora_adapter`
    takes, and a second file for ComfyUI. Full weights else: what its `from_pretrained` takes.

    about: what the file's metadata says beside its format, its rank and the version of its base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = getattr(transformer, "config", None)
    version = version_of(config)
    if getattr(transformer, "peft_config", None):
        pairs = scaled_pairs(transformer, state)
        # A model that is neither LTX-2 nor Kandinsky 6 has no names but its own.
        files = {LORA: written_lora(pairs, spelled=original_name if version else str)}
        if is_kandinsky6(config):
            comfyui = written_lora(pairs)
            files = {LORA: written_lora(pairs, "transformer.", str), COMFYUI_LORA: comfyui}
    else:
        if hasattr(transformer, "save_config"):  # diffusers'
            transformer.save_config(folder)
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        files = {FULL: (tensors, {"format": "pt"})}
    told = dict(about or {}) | ({"base_version": version} if version else {})
    for name, (tensors, metadata) in files.items():
        save_file(tensors, folder / name, metadata=told | metadata)


def lora_pairs(state: Mapping[str, Tensor]) -> Pairs:
    """{module: (A, B)} from a state dict, whose keys name the adapter or, as peft's own, do not."""
    pairs = {}
    for key, a in state.items():
        for ending in (f".lora_A.{ADAPTER}.weight", ".lora_A.weight"):
            if key.endswith(ending):
                pairs[key.removesuffix(ending)] = (a, state[key.replace(".lora_A.", ".lora_B.")])
    return pairs


def scaled_pairs(transformer: nn.Module, state: Mapping[str, Tensor]) -> Pairs:
    """The adapter's pairs, with its scale, which is 1 for those that are trained here, in B."""
    refuse_other_kinds(state)
    scales = {
        name: module.scaling[ADAPTER]
        for name, module in transformer.named_modules()
        if ADAPTER in getattr(module, "scaling", {})
    }
    pairs = lora_pairs(state)
    return {
        name: (a, b if scales[name] == 1 else b.float() * scales[name])
        for name, (a, b) in pairs.items()
    }


# --- in -------------------------------------------------------------------------------------------


def load_weights(
    path: Path,
    transformer: nn.Module,
    *,
    allow_partial: bool = False,
    dtype: torch.dtype | None = None,
) -> str:
    """Put full or LoRA weights, a file or the folder that holds it, into `transformer`.

    A LoRA, in whichever of the formats of `syncdpo.models.lora_keys`, becomes its adapter
    "default", the one that training goes on with and that is saved.

    allow_partial: take what fits of a LoRA that has more than this model.
    dtype: of a LoRA; the transformer's own by default.

    Returns a sentence about what was left out, or nothing. Raises FileNotFoundError where there are
    no weights, ValueError where they are not for this model.
    """
    file = weights_file(path)
    tensors, metadata = _read(file)
    _check_version(file, metadata, transformer)
    if is_lora(tensors):
        return _load_lora(file, tensors, metadata, transformer, allow_partial, dtype)
    expected = {name: tuple(p.shape) for name, p in transformer.state_dict().items()}
    differing = {n for n, t in tensors.items() if expected.get(n) != tuple(t.shape)}
    differing |= expected.keys() - tensors.keys()
    if differing:
        raise ValueError(
            f"weights: {file} belongs to another model; {len(differing)} tensors differ, "
            f"{min(differing)} among them"
        )
    with torch.no_grad():
        transformer.load_state_dict(tensors)
    return ""


def weights_file(path: Path) -> Path:
    """The file of weights that `path` is or holds: by our own names, or the only one there is."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"weights: expected a .safetensors file, got {path}")
        return path
    for name in (LORA, FULL):
        if (path / name).is_file():
            return path / name
    found = weights_in(path)
    if len(found) > 1:
        raise ValueError(
            f"weights: expected one .safetensors file in {path}, got {named(found)}; name the one "
            "that you mean"
        )
    if not found:
        raise FileNotFoundError(f"weights: expected {LORA} or {FULL} in {path}")
    return path / found[0]


def weights_in(folder: Path) -> list[str]:
    """The names of all files of weights in a folder, but a run's checkpoints."""
    names = (file.name for file in sorted(folder.glob("*.safetensors")))
    return [name for name in names if not name.startswith(CHECKPOINTS)]


def holds_lora(path: Path) -> bool:
    """Whether the weights at `path` are a LoRA, by their names alone."""
    file = weights_file(path)
    try:
        with safe_open(file, "pt") as opened:
            return is_lora(list(opened.keys()))
    except SafetensorError as error:
        raise ValueError(f"weights: {file} cannot be read: {error}") from error


def place_lora(
    transformer: nn.Module,
    pairs: Pairs,
    dtype: torch.dtype | None = None,
    adapter: str = ADAPTER,
) -> None:
    """Give `transformer` an adapter of copies of these pairs; in their own dtype by default."""
    settings = lora_settings({name: len(a) for name, (a, _) in pairs.items()})
    add_adapter(transformer, LoraConfig(**settings), adapter)
    for name, pair in pairs.items():
        layer = transformer.get_submodule(name)
        for half, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            weight = half[adapter].weight
            weight.data = value.to(weight.device, dtype or value.dtype, copy=True)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"weights: {file} cannot be read: {error}") from error
    settings = file.with_name(PEFT_SETTINGS)
    if file.name == PEFT_FILE and settings.is_file():
        metadata.setdefault("lora_adapter_metadata", settings.read_text())
    return tensors, metadata


def _check_version(file: Path, metadata: Mapping[str, str], transformer: nn.Module) -> None:
    made_for, version = version_named(metadata), version_of(getattr(transformer, "config", None))
    if made_for and version and made_for != version:
        raise ValueError(
            f"weights: {file} was made for LTX-2 of version {made_for}, as its metadata says; "
            f"the model is version {version}"
        )


def _load_lora(
    file: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    transformer: nn.Module,
    allow_partial: bool,
    dtype: torch.dtype | None,
) -> str:
    lora = read_lora(tensors, metadata, linear_modules(transformer))
    if not lora.pairs:
        raise ValueError(
            f"weights: nothing of the LoRA in {file} belongs to this model; it names "
            f"{named(lora.unmatched)}"
        )
    note = ""
    if lora.unmatched:
        note = (
            f"weights: {len(lora.unmatched)} of {len(tensors)} tensors in {file} belong to no "
            f"module of this model: {named(lora.unmatched)}"
        )
        if not allow_partial:
            raise ValueError(f"{note}; --allow-partial takes the others")
    place_lora(transformer, lora.pairs, dtype or next(transformer.parameters()).dtype)
    return note and f"{note}; they are left out"
