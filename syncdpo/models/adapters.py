"""A LoRA on a transformer, put there by peft, whatever the transformer's class is.

diffusers' models have methods for this, which also tell their pipelines of it; any other module has
peft alone. Between the two only adding and removing differ.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn


def add_adapter(transformer: nn.Module, config: LoraConfig, name: str) -> None:
    """Put an adapter around the modules that `config` names, and switch to it."""
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(config, name)
        return
    inject_adapter_in_model(config, transformer, name)
    set_adapter(transformer, name)


def remove_adapters(transformer: nn.Module) -> None:
    """Take all adapters off; what they did goes with them, unless they were merged."""
    if hasattr(transformer, "unload_lora"):
        transformer.unload_lora()
        return
    recurse_remove_peft_layers(transformer)
    del transformer.peft_config


def set_adapter(transformer: nn.Module, name: str) -> None:
    """Let one of several adapters act; peft makes it trainable, and freezes the others."""
    for layer in adapted_layers(transformer):
        layer.set_adapter([name])


def enable_adapters(transformer: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off; peft freezes what it switches off."""
    for layer in adapted_layers(transformer):
        layer.enable_adapters(enabled)


def merge_adapters(transformer: nn.Module) -> None:
    """Add what the adapters do to the weights beneath."""
    for layer in adapted_layers(transformer):
        layer.merge()


def adapted_layers(transformer: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in transformer.modules() if isinstance(module, LoraLayer))
