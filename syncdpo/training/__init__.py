"""What `syncdpo.train` leans on, so that the script itself can be read from top to bottom.

Its settings (`config`), everything random in it (`dice`), the LoRA and the model without it
(`adapter`), checkpoints and log (`checkpoint`), and what FSDP2 asks for (`sharding`). The settings
can be listed without waiting for torch.
"""

from .config import TrainConfig, TrainingDiverged, dump_config, load_config

__all__ = ["TrainConfig", "TrainingDiverged", "dump_config", "load_config"]
