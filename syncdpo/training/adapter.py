"""The LoRA that is trained, and the model without it: its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from accelerate.utils import set_seed
from peft import LoraConfig
from torch import nn


def train_adapter(
    transformer: nn.Module,
    rank: int,
    targets: Sequence[str],
    wanted: Callable[[str], bool],
    seed: int,
) -> None:
    """Freeze all but a LoRA: the one that was loaded, or else a fresh one, which changes nothing.

    A fresh one reaches the `targets`, modules by the ends of their names, that are `wanted`.
    Raises ValueError where the loaded one has another rank.
    """
    transformer.requires_grad_(False)
    if loaded := loaded_adapter(transformer):
        if loaded.r != rank:
            raise ValueError(f"lora_rank: expected {loaded.r}, as the LoRA in weights, got {rank}")
        transformer.set_adapter("default")
        return
    set_seed(seed)  # the adapter's random half
    ends = tuple(f".{target}" for target in targets)
    modules = [n for n, _ in transformer.named_modules() if n.endswith(ends) and wanted(n)]
    # Dropout would make the margin noise: policy and reference must see the same network.
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=modules)
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
    trained = {parameter: parameter.requires_grad for parameter in transformer.parameters()}
    # peft freezes what it switches off, which FSDP2 would take for the base's, and switches on
    # with all of it trainable.
    transformer.disable_adapters()
    _set_trained(trained)
    try:
        yield
    finally:
        transformer.enable_adapters()
        _set_trained(trained)


def _set_trained(trained: dict[nn.Parameter, bool]) -> None:
    for parameter, wanted in trained.items():
        parameter.requires_grad_(wanted)
