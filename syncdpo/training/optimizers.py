"""AdamW, its moments in 32 or in 8 bits, and those of 8 bits as tensors that a file can hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from syncdpo.training.config import TrainConfig

BETAS = (0.9, 0.99)


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """`config.optimizer` over the parameters that are trained.

    adamw8bit is bitsandbytes': moments in blocks of 256 share a float32 scale; those of a parameter
    with less than 4,096 elements stay in float32. Raises ValueError where it is not installed.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = {"lr": config.learning_rate, "betas": BETAS, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return AdamW(trained, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer: adamw8bit needs bitsandbytes, which cannot be imported ({error}): "
            "pip install 'syncdpo[quant]'"
        ) from error
    return AdamW8bit(trained, **options)


def moments_of(policy: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state of adamw8bit by the names of `policy`'s parameters, on the CPU."""
    state = _plain(optimizer).state
    return {
        # Cloned, for all parameters share their tables of 8-bit values, which a file must not.
        name: {key: torch.as_tensor(value).cpu().clone() for key, value in state[parameter].items()}
        for name, parameter in trained_parameters(policy)
        if parameter in state
    }


def set_moments(
    policy: nn.Module, optimizer: Optimizer, moments: dict[str, dict[str, Tensor]]
) -> None:
    """Put back what `moments_of` gave, bit for bit."""
    state = _plain(optimizer).state
    for name, parameter in trained_parameters(policy):
        if name in moments:
            state[parameter] = {
                # The count of steps is a plain number there.
                key: int(value) if key == "step" else value.to(parameter.device)
                for key, value in moments[name].items()
            }


def trained_parameters(policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """By their names without what DDP puts before them."""
    named = policy.named_parameters()
    return [(name.removeprefix("module."), p) for name, p in named if p.requires_grad]


def _plain(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # which accelerate wraps
