"""The public door to every kernel: tensors first, options keyword-only, checks once."""

from .paired_noise import noise, paired_noise

__all__ = ["noise", "paired_noise"]
