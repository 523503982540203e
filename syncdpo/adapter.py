"""The LoRA that is trained, and the model without it: its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from accelerate.utils import set_seed
from peft import LoraConfig
from torch import nn


def train_adapter(transformer: nn.Module, rank: int, targets: Sequence[str], seed: int) -> None:
    """Freeze all but a LoRA: the one that was loaded, or else a fresh one, which changes nothing.

    Raises ValueError where the loaded one has another rank.
    """
    transformer.requires_grad_(False)
    if loaded := loaded_adapter(transformer):
        if loaded.r != rank:
            raise ValueError(f"lora_rank: expected {loaded.r}, as the LoRA in weights, got {rank}")
        transformer.set_adapter("default")
        return
    set_seed(seed)  # the adapter's random half
    # Dropout would make the margin noise: policy and reference must see the same network.
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(targets))
    )


def merge_adapter(transformer: nn.Module) -> None:
    """Add a loaded LoRA, if there is one, to the weights, all of which stay trainable."""
    if loaded_adapter(transformer):
        transformer.fuse_lora()
        transformer.unload_lora()
        transformer.requires_grad_()  # which peft had frozen


def loaded_adapter(transformer: nn.Module) -> LoraConfig | None:
    return getattr(transformer, "peft_config", {}).get("default")


@contextlib.contextmanager
def adapter_switched_off(transformer: nn.Module) -> Iterator[None]:
    trained = [p for p in transformer.parameters() if p.requires_grad]
    transformer.disable_adapters()
    for parameter in trained:  # frozen with the adapter, FSDP2 would take them for the base's
        parameter.requires_grad_()
    try:
        yield
    finally:
        transformer.enable_adapters()
