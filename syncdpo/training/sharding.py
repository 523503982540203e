"""Modules on their devices: whole, in shards (FSDP2), or a frozen base that stays behind.

FSDP2 asks for more than accelerate's defaults: exact times and positions, a sharded reference.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from syncdpo.training.config import TrainConfig
from syncdpo.training.offload import offload_blocks


def keep_precision(accelerator: Accelerator) -> None:
    """Under FSDP2 with bf16: weights are gathered in bf16, and nothing else is rounded to it.

    accelerate's own policy also casts what every block is given, so that times (σ · 1000) and
    rotary positions lose all but 8 bits, and adds gradients up in bf16.

    Raises ValueError for the first version of FSDP, which has no such policy.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version: expected 2 in accelerate's configuration, got 1")
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            output_dtype=torch.float32,
            cast_forward_inputs=False,
        )


def check_shardable(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raises ValueError for what FSDP2 cannot cut into shards."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    for name, plain in (("base_precision", "bf16"), ("optimizer", "adamw"), ("offload", "none")):
        if getattr(config, name) != plain:
            raise ValueError(
                f"{name}: expected {plain} under FSDP2, whose shards are of plain tensors, got "
                f"{getattr(config, name)}; launch with configs/ddp_8_gpus.yaml instead"
            )


def place_trained(
    config: TrainConfig, accelerator: Accelerator, policy: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, Optimizer]:
    """`accelerator.prepare`, but an offloaded base stays in host memory.

    DDP would send all weights from the first process to the others, which have them already, and
    knows neither quantised ones nor those on the host: it is told to leave the frozen ones alone.
    """
    if config.offload == "blocks":
        offload_blocks(policy, accelerator.device)
    if config.offload == "blocks" or config.base_precision != "bf16":
        frozen = [name for name, p in policy.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(policy, frozen)
    placed = False if config.offload == "blocks" else None  # None: as accelerate sees fit
    return accelerator.prepare(policy, optimizer, device_placement=[placed, None])


def place_frozen(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """A module that is never trained, on the accelerator's device; this process's shard of it."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, module)
    return module.to(accelerator.device)
