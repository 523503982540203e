"""What each of two processes does that `accelerate launch` started on the CPU: the runs below."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from micro import run

from syncdpo.train import PRECISION

# Settings of each run, for one process; every one makes batches of four.
RUNS = {
    "full": {},
    "cached": {"cache_reference": 3, "beta_audio": 10.0, "clips": 9, "trained": "audio"},
    "lora": {
        "lora_rank": 2, "batch_size": 2, "accumulation": 2, "split_pair": True,
        "gradient_checkpointing": True, "checkpoint_every": 7,
    },
    "onward": {"weights": "lora", "lora_rank": 3},  # from the run above, against it
    "watched": {
        "validation": 0.5, "validate_every": 7, "keep": "best", "clips": 16, "checkpoint_every": 7,
    },
    "dpo": {"method": "dpo", "beta_video": 10.0, "cache_reference": 2},
    "bf16": {"mixed_precision": "bf16", "dtype": torch.bfloat16, "lora_rank": 2},
}  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, settings in RUNS.items():
        accelerator = start(PRECISION[settings.get("mixed_precision", "fp32")])
        print(f"{accelerator.distributed_type.value} in {accelerator.num_processes} processes")
        share = settings_in(folder, name)
        share["batch_size"] = share.get("batch_size", 4) // 2
        run(folder / name, **share)
        if "checkpoint_every" in settings:  # once more, from the last checkpoint but one
            if accelerator.is_main_process:
                max((folder / name).glob("checkpoint-*")).unlink()
            accelerator.wait_for_everyone()
            run(folder / name, resume=True, **share)
    accelerator.end_training()


def settings_in(folder: Path, name: str) -> dict:
    """The settings of a run whose folder, as all the others', is in `folder`."""
    settings = dict(RUNS[name])
    if "weights" in settings:
        settings["weights"] = str(folder / settings["weights"])
    return settings


def start(precision: str) -> Accelerator:
    """As the launcher's configuration says, for this precision.

    accelerate takes up FSDP only where it finds a GPU; PyTorch shards on the CPU as well.
    """
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator


if __name__ == "__main__":
    main(Path(sys.argv[1]))
