"""Weights on disk, as diffusers reads them: safetensors only."""

from pathlib import Path

import torch
from diffusers import LTX2Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FULL = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def of_audio(name: str) -> bool:
    """Whether a parameter or module of an LTX-2 transformer, by its name, serves the audio's half:
    the sound and how it attends to the picture, not how the picture attends to the sound."""
    return "audio" in name and "audio_to_video" not in name


def save_weights(folder: Path, transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Write a transformer's state dict to `folder`.

    LoRA, where `transformer` carries an adapter: what `LTX2Pipeline.load_lora_weights` takes.
    Full weights else: what `LTX2VideoTransformer3DModel.from_pretrained` takes.
    """
    if getattr(transformer, "peft_config", None):
        LTX2Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict=state),
            **_collate_lora_metadata({"transformer": transformer}),
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        transformer.save_config(folder)
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, folder / FULL, metadata={"format": "pt"})


def load_weights(path: Path, transformer: nn.Module) -> None:
    """Put full or LoRA weights, a file or the folder that holds it, into `transformer`.

    A LoRA becomes its adapter "default", the one that training goes on with and that is saved.
    Raises FileNotFoundError where there are none, ValueError where they belong to another model.
    """
    file = path if path.is_file() else next(
        (path / name for name in (LORA, FULL) if (path / name).is_file()), None
    )  # fmt: skip
    if file is None:
        raise FileNotFoundError(f"weights: expected {LORA} or {FULL} in {path}")
    if file.suffix != ".safetensors":
        raise ValueError(f"weights: expected a .safetensors file, got {file}")
    if file.name == LORA:
        transformer.load_lora_adapter(str(file.parent), weight_name=LORA, adapter_name="default")
        return
    state = load_file(file)
    expected = {name: tuple(p.shape) for name, p in transformer.state_dict().items()}
    differing = {n for n, t in state.items() if expected.get(n) != tuple(t.shape)}
    differing |= expected.keys() - state.keys()
    if differing:
        raise ValueError(
            f"weights: {file} belongs to another model; {len(differing)} tensors differ, "
            f"{min(differing)} among them"
        )
    with torch.no_grad():
        transformer.load_state_dict(state)
