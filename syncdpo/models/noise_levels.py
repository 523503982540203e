"""How noise levels are drawn in training."""

import torch
from torch import Tensor

LOWEST_SIGMA = 1e-3
UNIFORM_SHARE = 0.1
PERCENTILES = (-2.5758, 3.0902)  # of the normal distribution: 0.5 % and 99.9 %


def draw_sigma(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels [B] in [0.001, 1], float32: how LTX-2's own trainer draws them.

    σ = sigmoid(N(0,1) + shift), stretched so that its 0.5 and 99.9 percentiles come to 0 and 1;
    one in ten is uniform, so that no level is forgotten where `shift` is large.
    """
    low, high = torch.sigmoid(shift + torch.tensor(PERCENTILES))
    sigma = torch.sigmoid(torch.randn(batch, generator=generator) + shift)
    sigma = (sigma - low) / (high - low)
    sigma = torch.where(sigma < LOWEST_SIGMA, 2 * LOWEST_SIGMA - sigma, sigma).clamp(max=1)
    uniform = LOWEST_SIGMA + (1 - LOWEST_SIGMA) * torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < UNIFORM_SHARE, uniform, sigma)
