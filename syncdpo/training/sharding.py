"""What FSDP2 asks for beyond accelerate's defaults: exact times and positions, a sharded reference.

Under any other launch nothing here does anything.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


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


def place_frozen(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """A module that is never trained, on the accelerator's device; this process's shard of it."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, module)
    return module.to(accelerator.device)
