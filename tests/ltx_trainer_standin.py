"""ltx-trainer and ltx-core where they are not installed: the names and call signatures that a
custom strategy uses, and no more of what they do than that."""

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modality:
    latent: Tensor
    sigma: Tensor
    timesteps: Tensor
    positions: Tensor
    context: Tensor
    enabled: bool = True
    context_mask: Tensor | None = None
    attention_mask: Tensor | None = None


@dataclass
class ModelInputs:
    video: Modality | None
    audio: Modality | None
    video_targets: Tensor | None
    audio_targets: Tensor | None
    video_loss_mask: Tensor | None
    audio_loss_mask: Tensor | None


class TrainingStrategyConfigBase:
    """Settings by keyword, each one an annotated attribute."""

    def __init__(self, **settings: Any):
        unknown = settings.keys() - type(self).__annotations__.keys()
        if unknown:
            raise ValueError(f"settings: expected known names, got {sorted(unknown)}")
        for name, value in settings.items():
            setattr(self, name, value)


class TrainingStrategy:
    def __init__(self, config: TrainingStrategyConfigBase):
        self.config = config
        # [B, C, F, H, W] and [B, C, T, F] as tokens
        self._video_patchifier = SimpleNamespace(patchify=lambda x: x.flatten(2).transpose(1, 2))
        self._audio_patchifier = SimpleNamespace(patchify=lambda x: x.transpose(1, 2).flatten(2))
        self.video_scale_factors = SimpleNamespace(time=8, height=32, width=32)

    def _get_video_positions(
        self,
        num_frames: int,
        height: int,
        width: int,
        batch_size: int,
        fps: float,
        device: torch.device,
    ) -> Tensor:
        return torch.zeros(batch_size, 3, num_frames * height * width, 2, device=device) / fps

    def _get_audio_positions(
        self, num_time_steps: int, batch_size: int, device: torch.device
    ) -> Tensor:
        return torch.zeros(batch_size, 1, num_time_steps, 2, device=device)


def modules() -> dict[str, ModuleType]:
    """What to put into `sys.modules`."""
    base = ModuleType("ltx_trainer.training_strategies.base_strategy")
    base.DEFAULT_FPS, base.ModelInputs = 24, ModelInputs
    base.TrainingStrategy, base.TrainingStrategyConfigBase = (
        TrainingStrategy,
        TrainingStrategyConfigBase,
    )
    strategies = ModuleType("ltx_trainer.training_strategies")
    strategies.base_strategy = base
    modality = ModuleType("ltx_core.model.transformer.modality")
    modality.Modality = Modality
    names = ("ltx_trainer", "ltx_core", "ltx_core.model", "ltx_core.model.transformer")
    return {name: ModuleType(name) for name in names} | {
        module.__name__: module for module in (base, strategies, modality)
    }
