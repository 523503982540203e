"""The LoRA that is trained, and the model that it is measured against: its reference."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

from accelerate import PartialState
from accelerate.utils import set_seed
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

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
        transformer.unload_lora()
    ends = tuple(f".{target}" for target in targets)
    modules = [n for n, _ in transformer.named_modules() if n.endswith(ends) and wanted(n)]
    ranks = {name: len(a) for name, (a, _) in loaded.items()}
    _say_wider(ranks, rank)
    ranks |= {name: max(rank, ranks.get(name, 0)) for name in modules}
    set_seed(seed)  # the adapter's random half
    transformer.add_adapter(LoraConfig(**lora_settings(ranks)), ADAPTER)
    for name, (a, b) in loaded.items():
        layer = transformer.get_submodule(name)
        first, second = (half[ADAPTER].weight for half in (layer.lora_A, layer.lora_B))
        # In the loaded one's precision, which may be more than the model's.
        first.data, second.data = first.data.to(a.dtype), second.data.to(b.dtype)
        first.data[: len(a)], second.data[:, : len(a)] = a, b


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
        for module in transformer.modules():
            if isinstance(module, LoraLayer):
                module.float()
        transformer.fuse_lora()
        transformer.unload_lora()
        transformer.requires_grad_()  # which peft had frozen


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
    transformer.set_adapter(ADAPTER)
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
    transformer.set_adapter(REFERENCE)
    _set_trained(trained)
    try:
        yield
    finally:
        transformer.set_adapter(ADAPTER)
        _set_trained(trained)


@contextlib.contextmanager
def adapter_switched_off(transformer: nn.Module) -> Iterator[None]:
    trained = _trained(transformer)
    # peft freezes what it switches off, which FSDP2 would take for the base's, and switches on
    # with all of it trainable.
    transformer.disable_adapters()
    _set_trained(trained)
    try:
        yield
    finally:
        transformer.enable_adapters()
        _set_trained(trained)


def _trained(transformer: nn.Module) -> dict[nn.Parameter, bool]:
    return {parameter: parameter.requires_grad for parameter in transformer.parameters()}


def _set_trained(trained: dict[nn.Parameter, bool]) -> None:
    for parameter, wanted in trained.items():
        parameter.requires_grad_(wanted)
