"""The LoRA that is trained, and the model that it is measured against: its reference."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

from accelerate import PartialState
from accelerate.utils import set_seed
from peft import LoraConfig
from torch import nn

from syncdpo.models.adapters import (
    adapted_layers,
    add_adapter,
    enable_adapters,
    merge_adapters,
    remove_adapters,
    set_adapter,
)
from syncdpo.models.lora_keys import Pairs, lora_settings
from syncdpo.models.weights import ADAPTER, place_lora, scaled_pairs

REFERENCE = "reference"  # the adapter as it was loaded


def train_adapter(
    transformer: nn.Module,
    rank: int,
    targets: Sequence[str],
    wanted: Callable[[str], bool],
    seed: int,
) -> None:
    """Freeze all but a LoRA: the one that was loaded, or else a fresh one, which changes nothing.

    It reaches the `targets`, modules by the ends of their names, that are `wanted`, with `rank`,
    and what the loaded one reaches. Where that has no matrices, or fewer rows, fresh ones are
    added to it, times 0; where it has more, it keeps them.
    """
    transformer.requires_grad_(False)
    loaded = loaded_pairs(transformer)
    if loaded:
        remove_adapters(transformer)
    ends = tuple(f".{target}" for target in targets)
    # A dot before the name as well, for one that stands at the top.
    modules = [n for n, _ in transformer.named_modules() if f".{n}".endswith(ends) and wanted(n)]
    _check_targets(transformer, modules, targets)
    ranks = {name: len(a) for name, (a, _) in loaded.items()}
    _say_wider(ranks, rank)
    ranks |= {name: max(rank, ranks.get(name, 0)) for name in modules}
    set_seed(seed)  # the adapter's random half
    add_adapter(transformer, LoraConfig(**lora_settings(ranks)), ADAPTER)
    for name, (a, b) in loaded.items():
        layer = transformer.get_submodule(name)
        first, second = (half[ADAPTER].weight for half in (layer.lora_A, layer.lora_B))
        # In the loaded one's precision, which may be more than the model's.
        first.data, second.data = first.data.to(a.dtype), second.data.to(b.dtype)
        first.data[: len(a)], second.data[:, : len(a)] = a, b


def _check_targets(transformer: nn.Module, modules: Sequence[str], targets: Sequence[str]) -> None:
    """Raises ValueError where the targets name nothing that is wanted, or no linear layer."""
    kind = type(transformer).__name__
    if not modules:
        raise ValueError(
            f"lora_targets: expected ends of names of modules in {kind} that are to be trained, "
            f"got {', '.join(targets)}, which none has"
        )
    for name in modules:
        layer = transformer.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"lora_targets: expected linear layers, got {name} of {kind}, which is "
                f"{type(layer).__name__}"
            )


def _say_wider(ranks: dict[str, int], rank: int) -> None:
    wider = [r for r in ranks.values() if r > rank]
    if wider and PartialState().is_main_process:
        print(
            f"lora_rank: {rank}, but {len(wider)} modules of the LoRA in weights keep their own, "
            f"up to {max(wider)}",
            file=sys.stderr,
        )


def merge_adapter(transformer: nn.Module) -> None:
    """Add a loaded LoRA, if there is one, to the weights, all of which stay trainable.

    In float32, which the weights that it changes then stay in: rounded to bfloat16, much of a
    LoRA would be lost.
    """
    if loaded_adapter(transformer):
        for layer in adapted_layers(transformer):
            layer.float()
        merge_adapters(transformer)
        remove_adapters(transformer)
        transformer.requires_grad_()  # which peft had frozen
        for name in getattr(transformer, "never_trained", ()):
            transformer.get_parameter(name).requires_grad_(False)


def loaded_adapter(transformer: nn.Module) -> LoraConfig | None:
    return getattr(transformer, "peft_config", {}).get(ADAPTER)


def loaded_pairs(transformer: nn.Module) -> Pairs:
    """The matrices of the adapter, by module, its scale in B; none where there is none."""
    state = {name: p.detach() for name, p in transformer.named_parameters() if ".lora_" in name}
    return scaled_pairs(transformer, state)


def keep_reference(transformer: nn.Module) -> None:
    """A frozen copy of the adapter as it now is; `as_reference` puts it in the adapter's place."""
    trained = _trained(transformer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        place_lora(transformer, loaded_pairs(transformer), adapter=REFERENCE)
    set_adapter(transformer, ADAPTER)
    for parameter in transformer.parameters():
        parameter.requires_grad_(trained.get(parameter, False))


@contextlib.contextmanager
def as_reference(transformer: nn.Module) -> Iterator[None]:
    """The model under the adapter that was kept as its reference, or else without any."""
    if REFERENCE not in transformer.peft_config:
        with adapter_switched_off(transformer):
            yield
        return
    trained = _trained(transformer)
    set_adapter(transformer, REFERENCE)
    _set_trained(trained)
    try:
        yield
    finally:
        set_adapter(transformer, ADAPTER)
        _set_trained(trained)


@contextlib.contextmanager
def adapter_switched_off(transformer: nn.Module) -> Iterator[None]:
    trained = _trained(transformer)
    # peft freezes what it switches off, which FSDP2 would take for the base's, and switches on
    # with all of it trainable.
    enable_adapters(transformer, False)
    _set_trained(trained)
    try:
        yield
    finally:
        enable_adapters(transformer, True)
        _set_trained(trained)


def _trained(transformer: nn.Module) -> dict[nn.Parameter, bool]:
    return {parameter: parameter.requires_grad for parameter in transformer.parameters()}


def _set_trained(trained: dict[nn.Parameter, bool]) -> None:
    for parameter, wanted in trained.items():
        parameter.requires_grad_(wanted)
