"""Kernels run on the device of their inputs, whichever is the current one."""

import pytest
import torch

from syncdpo.ops import Segments, dpo_loss, noise, paired_noise, replace_segments, shift

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _results(device: str) -> list[torch.Tensor]:
    seed = torch.arange(2, device=device)
    half = torch.full((2,), 0.5, device=device)
    x = noise((2, 8, 16), seed)
    loser = shift(x, half, impl="kernel")
    segments = Segments(half, half, seed.flip(0), half)
    replaced, _ = replace_segments(x, None, segments, video_rate=4.0, audio_rate=None)
    policy = paired_noise(x, loser, half, seed, impl="kernel").requires_grad_()
    target = torch.cat([x, replaced])
    loss = dpo_loss(policy, torch.zeros_like(target), target, beta=1.0, impl="kernel")
    return [loser, replaced, policy.detach(), loss.detach(), *torch.autograd.grad(loss, policy)]


def test_kernels_run_where_their_inputs_are():
    with torch.cuda.device(0):
        first, second = _results("cuda:0"), _results("cuda:1")
    for own, other in zip(first, second, strict=True):
        assert other.device.index == 1
        assert torch.equal(own, other.to(own.device))
